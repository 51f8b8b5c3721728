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


@flow(name="watch", flow_run_name="watch {now}", persist_result=True)
def watch(workload: str, now: str | None = None) -> dict[str, Any]:
    """Judge the champion of a workload (import string) on the window that ends `now` (ISO time; default: the clock)."""
    site, contract = Site.here(), load(workload)
    end = now_of(contract, now)
    store = Store(site.address("mlflow_uri"))
    champion = store.version(contract.name, "champion")
    if champion is None:
        reason = f"{contract.name} has no champion yet; train one with `noria train {contract.name}`."
        return {"verdict": "unknown", "decision": "unknown", "reasons": [reason], "version": None}
    seen = observe_champion(site, store, contract, champion, end)
    publish_report(site, seen)
    decision = apply_policy(store, contract, champion, seen.report, end)
    tell(store, champion, seen.report, decision)
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
def publish_report(site: Site, seen: Observation) -> None:
    """Add the report to the workspace behind the dashboards."""
    publish(seen, site.settings.evidently)


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
def tell(store: Store, champion: Version, report: DriftReport, decision: Decision) -> None:
    """Leave the verdict where people look: on the version in MLflow, and as an artifact of this run."""
    said = {
        "verdict": report.verdict,
        "decision": decision.action,
        "window_end": report.window.end.isoformat(),
        "rows": report.rows,
        "reasons": list(decision.reasons),
    }
    store.tag(champion, {SEEN: json.dumps(said)})
    key = f"watch-{report.workload}".replace("_", "-")
    create_markdown_artifact(markdown(report, decision), key=key, description="What the last watch saw and decided")


def markdown(report: DriftReport, decision: Decision) -> str:
    """The evidence and the decision, for the Prefect UI."""
    lines = [
        f"# {report.workload}: {report.verdict} → {decision.action}",
        f"Version {report.version}, {report.rows:,} predictions in {report.window}.",
        "",
        *(f"- {reason}" for reason in decision.reasons),
    ]
    drifts = [*report.columns, *([report.prediction] if report.prediction else [])]
    if drifts:
        lines += [
            "",
            "| column | distance | threshold | drifted | missing | missing in reference |",
            "|---|--:|--:|---|--:|--:|",
        ]
        lines += [
            f"| {one.column} | {one.distance:.3f} | {one.threshold:.3f} | {'**yes**' if one.drifted else 'no'} "
            f"| {one.missing:.1%} | {one.missing_reference:.1%} |"
            for one in drifts
        ]
    if report.quality:
        lines += ["", "| on labelled rows | value |", "|---|--:|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in report.quality.metrics.items()]
    return "\n".join(lines)
