"""The flow that asks whether the champion is still right, shows it, and asks for a retrain when the policy says so.

A retrain is asked for by an event; the automation made by `flows.schedule` runs the deployment. So the Prefect UI shows
what triggered what, and a retrain never runs inside a watch.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from flows.requests import EVENT, resource, retrain_is_running
from flows.site import Site, now_of
from monitoring.policy import Evidence, decide
from monitoring.publish import publish
from monitoring.window import Observation, observe
from noria.records import Decision, Version, Window, moment
from noria.workload import Workload, load
from registry.bundle import Bundle
from registry.store import Store


@flow(name="watch", flow_run_name="{workload}", log_prints=False)
def watch(workload: str, now: str | None = None) -> dict[str, Any]:
    """Judge the champion of a workload on the window that ends `now` (ISO time; default: the clock)."""
    site, contract = Site.here(), load(workload)
    end = now_of(contract, now)
    store = Store(site.address("mlflow_uri"))
    champion = store.version(contract.name, "champion")
    if champion is None:
        return _outcome("unknown", Decision("unknown", (f"{contract.name} has no champion yet; train and promote a version.",)))
    bundle = store.fetch(champion, site.settings.bundles)
    seen = look(site, contract, bundle, champion, end)
    show(seen, site)
    decision = judge(store, contract, champion, seen, end)
    tell(store, contract, champion, seen, decision)
    if decision.action == "retrain":
        ask(contract, decision, end)
    return _outcome(seen.report.verdict, decision)
