"""The flow that turns newest data into a candidate and, if the gate lets it pass, a champion.

A thin order of tasks: every decision is made in the rooms. One retrain at a time per workload: the deployment's
concurrency limit drops a request that comes while one runs (`flows.schedule`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.names import run_name
from flows.site import Site, now_of
from flows.watch import RETRAIN
from monitoring.drift import calibrate
from noria.lake import Lake
from noria.metrics import recalibration
from noria.records import DatasetRef, Verdict, Version, Window
from noria.runtime import open_session, score
from noria.workload import Scorer, Workload, load
from registry.bundle import Contents, Facts
from registry.gate import Contest, judge, report
from registry.promote import promote
from registry.proof import Proof
from registry.run import Run
from registry.store import Store
from training.fit import Trained, fit
from training.quantize import figures
from training.windows import Choice, choose

WEIGHTS = "weights.npz"
"""Artifact of a run: what a warm start begins with."""


@flow(name="retrain", flow_run_name=run_name, persist_result=True)
def retrain(workload: str, now: str | None = None, reason: str = "manual", because: str = "") -> dict[str, Any]:
    """Train, register and judge a candidate on what is known at `now`.

    Args:
        workload: import string, as module:NAME.
        now: ISO time; None for the clock, or for the end of a recorded stream.
        reason: initial, quality, drift, age, probation or manual; the policy goes by it afterwards.
        because: the same in sentences, for people.
    """
    site, contract = Site.here(), load(workload)
    end = now_of(contract, now)
    store = Store(site.address("mlflow_uri"))
    return attempt(site, store, contract, end, reason=reason, because=because)


def attempt(
    site: Site, store: Store, workload: Workload, now: datetime, *, reason: str, because: str
) -> dict[str, Any]:
    """One retrain, noted on the workload from its beginning to its end, so that the policy knows of it."""
    last = store.notes(workload.name).get(RETRAIN, {})
    note = {"requested": now.isoformat(), "reason": reason, "because": because, "refusals": last.get("refusals", 0)}
    store.note(workload.name, {RETRAIN: {**note, "verdict": None}})
    try:
        lake = site.lake(workload)
        if site.settings.ingest:
            ingest(lake, workload, now)
        ref, table = assemble(lake, workload, Window.last(max(workload.training.windows), now))
        name = f"{now:%Y-%m-%d} {reason}"
        tags = {"noria.reason": reason, "noria.because": because, "noria.flow_run": str(flow_run.id or "")}
        with store.run(workload.name, name, tags) as run:
            rival = Rival.of(site, store, workload)
            if rival:
                # A first model takes all there is; a successor asks how far back the past still resembles the present.
                choice = choose_window(workload, table, rival.score if workload.training.warm_start else None)
                run.tags({"noria.window_because": choice.reason()})
                ref, table = assemble(lake, workload, Window(choice.start, now))
            run.dataset(ref)
            held_out = workload.training.held_out if rival else None
            trained = train(site, workload, table, warm=rival.weights if rival else None, held_out=held_out)
            version = register(store, run, workload, ref, trained)
            verdict = gate(run, workload, trained, rival)
        act(store, version, verdict, reason, now)
    except BaseException:
        store.note(workload.name, {RETRAIN: {**note, "verdict": "failed", "refusals": note["refusals"] + 1}})
        raise
    refusals = 0 if verdict.action == "promoted" else note["refusals"] + 1
    outcome = {
        "verdict": verdict.action,
        "version": version.number,
        "reasons": list(verdict.reasons),
        "refusals": refusals,
    }
    store.note(workload.name, {RETRAIN: {**note, **outcome}})
    return {**note, **outcome}


@dataclass(frozen=True)
class Rival:
    """The champion, as a retrain sees it."""

    version: Version
    score: Scorer
    weights: bytes | None

    @classmethod
    def of(cls, site: Site, store: Store, workload: Workload) -> Rival | None:
        """The workload's champion; None when there is none yet."""
        champion = store.version(workload.name, "champion")
        if champion is None:
            return None
        session = open_session(store.fetch(champion, site.settings.bundles).model)
        weights = store.file(champion, WEIGHTS) if workload.training.warm_start else None
        return cls(champion, lambda rows: score(session, workload.schema.tensors(rows)), weights)


@task(name="ingest", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE)
def ingest(lake: Lake, workload: Workload, now: datetime) -> int:
    """Read the workload's source from where the last time ended; returns the rows that came. Safe to repeat."""
    until = int(now.timestamp())
    known = lake.appended("records", "ingest")
    start = max(datetime.fromtimestamp(known, now.tzinfo), now - max(workload.training.windows))
    if start >= now:
        return 0
    rows = workload.schema.conform(workload.records(Window(start, now)))
    lake.append("records", rows, batch=("ingest", until))
    get_run_logger().info("%d new rows of %s from its source", len(rows), workload.name)
    return len(rows)


@task(name="assemble", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def assemble(lake: Lake, workload: Workload, window: Window) -> tuple[DatasetRef, pa.Table]:
    """The window's rows whose labels are known at its end, and the reference that reads them back."""
    return lake.dataset(window, window.end)


@task(name="choose window", cache_policy=NO_CACHE)
def choose_window(workload: Workload, table: pa.Table, rival: Scorer | None) -> Choice:
    """How far back to look, judged by cheap models on the newest rows."""
    choice = choose(workload, table, champion=rival)
    get_run_logger().info(choice.reason())
    return choice


@task(name="train", cache_policy=NO_CACHE)
def train(site: Site, workload: Workload, table: pa.Table, *, warm: bytes | None, held_out: int | None) -> Trained:
    """Fit on Ray, compare with baselines, export and prove the graph."""
    log = get_run_logger()
    return fit(
        workload,
        table,
        storage=site.settings.root / "training",
        ray_address=site.settings.ray_address or None,
        warm=warm,
        held_out=held_out,
        progress=log.info,
    )


@task(name="register", retries=1, retry_delay_seconds=2, cache_policy=NO_CACHE)
def register(store: Store, run: Run, workload: Workload, ref: DatasetRef, trained: Trained) -> Version:
    """Log what happened and make the candidate a version."""
    log_training(run, trained)
    reference = trained.reference()
    contents = Contents(
        model=trained.model,
        facts=Facts.of(workload),
        schema=workload.schema,
        bands=workload.bands,
        proof=Proof.make(trained.model, workload.schema, trained.prepared.split.test),
        reference=reference,
        dataset=ref,
        evaluations=trained.evaluations,
        thresholds=calibrate(reference, workload.schema, workload.drift),
        parity=trained.parity,
    )
    return store.register(run, contents)


@task(name="gate", cache_policy=NO_CACHE)
def gate(run: Run, workload: Workload, trained: Trained, rival: Rival | None) -> Verdict:
    """Candidate, champion and baselines on the newest labelled rows, which the candidate was not fitted on."""
    split, target = trained.prepared.split, workload.schema.target
    labels = split.test.column(target).to_numpy()
    scores = {
        "candidate": trained.scores["test"],
        "naive": trained.naive(split.test),
        "boosted": trained.boosted(split.test),
    }
    if rival is not None:
        scores["champion"] = rival.score(split.test)
        known = split.validation
        offset = recalibration(
            known.column(target).to_numpy(), rival.score(known), task=workload.task, log=workload.log_target
        )
        scores["recalibrated"] = offset(scores["champion"])
    contest = Contest(labels, scores, workload.slices(split.test))
    verdict = judge(contest, workload.gate, task=workload.task, loss=workload.loss, log=workload.log_target)
    text = report(verdict, unit=workload.unit)
    run.text("gate.md", text)
    key = f"gate-{workload.name}".replace("_", "-")
    create_markdown_artifact(text, key=key, description="What the gate said of the last candidate")
    return verdict


@task(name="act", cache_policy=NO_CACHE)
def act(store: Store, version: Version, verdict: Verdict, reason: str, now: datetime) -> None:
    """Write the verdict on the version; move the alias if it may pass."""
    store.tag(
        version,
        {
            "noria.verdict": verdict.action,
            "noria.verdict_because": " ".join(verdict.reasons),
            "noria.asked_because": reason,
        },
    )
    get_run_logger().info("version %d %s: %s", version.number, verdict.action, " ".join(verdict.reasons))
    if verdict.action == "promoted":
        promote(store, version, reason=reason, now=now)


def log_training(run: Run, trained: Trained) -> None:
    """Curves, counts and pictures of a training, for the MLflow UI; and the weights, for a warm start."""
    for epoch, entry in enumerate(trained.history):
        run.metrics({name: float(value) for name, value in entry.items()}, step=epoch)
    run.metrics({f"seconds/{stage}": seconds for stage, seconds in trained.seconds.items()})
    run.params(
        {"warm_start": trained.warm, "rows": trained.prepared.rows, "duplicates_removed": trained.prepared.duplicates}
    )
    if int8 := trained.parity.get("int8"):
        run.metrics(figures(int8))
        run.tags(
            {"noria.int8": "taken" if int8["taken"] else "refused", "noria.int8_because": " ".join(int8["reasons"])}
        )
    run.text("diagnosis.md", "\n".join(f"- {sentence}" for sentence in trained.diagnosis))
    run.figure("curves.png", trained.figure())
    run.data("quarantine.json", trained.prepared.quarantine)
    run.file(WEIGHTS, trained.weights)
