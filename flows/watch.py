"""The flow that asks whether the champion is still right, shows it, and asks for a retrain when the policy says so.

A retrain is asked for by an event; the automation made by `flows.schedule` runs the deployment. So the Prefect UI shows
what triggered what, and a retrain never runs inside a watch.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import links
from flows.findings import markdown
from flows.names import run_name
from flows.requests import ask, retrain_is_running
from flows.site import Site, now_of
from monitoring.policy import ALARMS, Evidence, decide
from monitoring.publish import publish
from monitoring.window import Observation, observe
from noria.records import Decision, DriftReport, Version, Window, moment
from noria.workload import Workload, load
from registry.promote import PROMOTED_AT, REASON
from registry.store import Store

SEEN = "noria.watch"
"""Tag of a version: what the last watch said of it, as JSON."""
RETRAIN = "noria.retrain"
"""Note on a workload: the last retrain and what became of it."""


@flow(name="watch", flow_run_name=run_name, persist_result=True)
def watch(workload: str, now: str | None = None) -> dict[str, Any]:
    """Judge the champion on the window that ends `now`.

    Args:
        workload: import string, as module:NAME.
        now: ISO time; None for the clock, or for the end of a recorded stream.
    """
    site, contract = Site.here(), load(workload)
    end = now_of(contract, now)
    store = Store(site.address("mlflow_uri"))
    champion = store.version(contract.name, "champion")
    if champion is None:
        reason = f"{contract.name} has no champion yet; train one with `noria train {contract.name}`."
        return {"verdict": "unknown", "decision": "unknown", "reasons": [reason], "version": None}
    seen = observe_champion(site, store, contract, champion, end)
    page = publish_report(site, seen)
    decision = apply_policy(store, contract, champion, seen.report, end)
    tell(site, store, champion, seen=seen, decision=decision, page=page)
    if decision.action == "retrain":
        ask(contract.name, decision.cause, " ".join(decision.reasons), end)
    return {
        "verdict": seen.report.verdict,
        "decision": decision.action,
        "reasons": list(decision.reasons),
        "version": champion.number,
    }


@task(name="observe", cache_policy=NO_CACHE)
def observe_champion(site: Site, store: Store, workload: Workload, champion: Version, end: datetime) -> Observation:
    """What the champion saw in the window that ends `end`, against its own reference."""
    bundle = store.fetch(champion, site.settings.bundles)
    window = Window.last(workload.drift.window, end)
    return observe(lake=site.lake(workload), bundle=bundle, version=champion, window=window, workload=workload)


@task(name="publish to Evidently", cache_policy=NO_CACHE)
def publish_report(site: Site, seen: Observation) -> str:
    """Add the report to the workspace behind the dashboards; returns its page below Evidently's address."""
    return publish(seen, site.settings.evidently)


@task(name="decide", cache_policy=NO_CACHE)
def apply_policy(store: Store, workload: Workload, champion: Version, report: DriftReport, end: datetime) -> Decision:
    """What the policy makes of the evidence."""
    last = store.notes(workload.name).get(RETRAIN, {})
    evidence = Evidence(
        report=report,
        now=end,
        promoted_at=moment(champion.tags.get(PROMOTED_AT) or champion.created),
        reason=_known(champion.tags.get(REASON, "")),
        last_request=moment(last["requested"]) if "requested" in last else None,
        last_verdict=last.get("verdict"),
        running=retrain_is_running(workload.name),
        refusals=last.get("refusals", 0),
    )
    return decide(evidence, workload.policy)


def _known(reason: str) -> Any:
    """A version's reason as the policy knows it; what a person wrote counts as theirs."""
    return reason if reason in (*ALARMS, "initial", "age") else "manual"


@task(name="tell", cache_policy=NO_CACHE)
def tell(site: Site, store: Store, champion: Version, *, seen: Observation, decision: Decision, page: str) -> None:
    """Leave the verdict where people look: on the version in MLflow, and in the log and an artifact of this run."""
    report, log = seen.report, get_run_logger()
    said = {
        "verdict": report.verdict,
        "decision": decision.action,
        "window_end": report.window.end.isoformat(),
        "rows": report.rows,
        "reasons": list(decision.reasons),
        "page": page,
    }
    store.tag(champion, {SEEN: json.dumps(said)})
    log.info("%s: %s, so %s", report.workload, report.verdict, decision.action)
    for reason in decision.reasons:
        log.info(reason)
    found = {
        "the report with every column": links.evidently(site, page),
        "the dashboard over time": links.dashboard(site, report.workload),
        f"version {report.version} in MLflow": links.model(site, report.workload, report.version),
    }
    create_markdown_artifact(
        markdown(report, decision, unit=seen.workload.unit, links=found),
        key=f"watch-{report.workload}".replace("_", "-"),
        description="What the last watch saw and decided",
    )
