"""The demo's weeks, one by one: requests, truths, watch, the retrain it asks for, and the story they amount to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import version as installed
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from flows import links
from flows.live import STYLES, LiveView
from flows.site import Site, read_state
from flows.traffic import Answered, Traffic
from flows.watch import watch
from noria.errors import ServiceError
from noria.records import Window
from noria.runtime import open_session, score
from noria.workload import Workload
from registry.store import Store

PACKAGES = (
    "ray",
    "mlflow",
    "torch",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "evidently",
    "prefect",
    "deltalake",
    "numpy",
    "scikit-learn",
)
PATIENCE = 300.0
"""Seconds that a retrain may take before the demo gives up."""
SPREAD = 60.0
"""Seconds over which the first day of a week is spread while a retrain goes on."""


@dataclass
class Request:
    """A retrain that the watch asked for, and what became of it."""

    requested: datetime
    reason: str
    known: set[Any]
    """Flow runs that existed before."""
    verdict: str = ""
    version: int | None = None
    because: str = ""
    serving_from: str | None = None
    run: FlowRun | None = field(default=None, repr=False)


class Turn:
    """State of the demo between weeks."""

    def __init__(self, site: Site, workload: Workload, path: str, timer: Any, *, label_delay: int) -> None:
        self.site, self.workload, self.path, self.timer = site, workload, path, timer
        self.delay = timedelta(weeks=label_delay)
        self.store = Store(site.address("mlflow_uri"))
        self.traffic = Traffic(site.address("serving_url"), workload)
        self.answered: dict[datetime, Answered] = {}
        self.told: set[datetime] = set()
        self.weeks: list[dict[str, Any]] = []
        self.retrains: list[Request] = []
        self.pending: Request | None = None
        self.frozen: Callable[[pa.Table], np.ndarray]
        self.first: dict[str, float] = {}
        self.begin: datetime | None = None

    def first_model(self, window: Window, view: LiveView) -> None:
        """Train, gate, promote and serve the first version."""
        span = f"{window.start:%Y-%m} to {window.end - timedelta(days=1):%Y-%m}"
        view.say(f"training the first model on {span}", long=True)
        with self.timer.stage("first model"):
            request = Request(window.end, "initial", self._runs())
            run_deployment(
                f"retrain/{self.workload.name}",
                parameters={"now": window.end.isoformat(), "reason": "initial"},
                timeout=0,
            )
            self._await(request, lambda: time.sleep(0.1))
            champion = self.store.version(self.workload.name, "champion")
            if champion is None:
                raise ServiceError(
                    f"The first model was not promoted ({request.because or request.verdict}); see the Prefect UI."
                )
            bundle = self.store.fetch(champion, self.site.settings.bundles)
            session = open_session(bundle.model)
            self.frozen = lambda rows: score(session, self.workload.schema.tensors(rows))
            self.traffic.follow(champion.number)
        errors = {name: found.metrics["error"] for name, found in bundle.evaluations.items()}
        self.first = {"error": errors["candidate"], "naive_error": errors["naive"], "boosted_error": errors["boosted"]}
        view.note(
            f"version {champion.number} serves: error {errors['candidate']:.2f} {self.workload.unit} "
            f"on its newest tenth; boosted trees {errors['boosted']:.2f}, naive rule {errors['naive']:.2f}",
            "green",
        )

    def week(self, window: Window, view: LiveView) -> None:
        """One week of the world, and what the watch says at its end."""
        self.begin = self.begin or window.start
        named = f"week ending {window.end - timedelta(days=1):%Y-%m-%d}"
        rows, _ = self.workload.clean(self.workload.records(window))
        rows = rows.sort_by(self.workload.schema.event_time)
        answered = self.answered[window.end] = Answered()
        if self.pending is not None:
            with self.timer.stage("retrain"):
                rows = self._trickle(rows, window, answered, view)
        view.say(f"{named}: {len(rows):,} trips are asked for")
        with self.timer.stage("requests"):
            self.traffic.send(rows, answered)
            self._tell_truths(window.end)
            self.traffic.settle()
        view.say(f"{named}: watching")
        before = self._runs()
        # Tagged as a deployment's run is, so that people find it in Prefect and on the home page.
        with self.timer.stage("watch"), tags("noria", self.workload.name):
            outcome = watch(workload=self.path, now=window.end.isoformat())
        self._record(window, answered, outcome, view)
        if outcome["decision"] == "retrain":
            self.pending = Request(window.end, " ".join(outcome["reasons"]), before)
            self.retrains.append(self.pending)

    def finish(self, view: LiveView) -> None:
        """See the last retrain through, and hand in the last truths."""
        if self.pending is not None:
            with self.timer.stage("retrain"):
                self._await(self.pending, lambda: time.sleep(0.1))
                self._conclude(self.pending, view)
        view.say("the last truths arrive")
        with self.timer.stage("requests"):
            self._tell_truths(max(self.answered) + self.delay)
            self.traffic.settle()

    def story(self) -> dict[str, Any]:
        """Everything that the report shows, but for time and memory."""
        lake = self.site.lake(self.workload)
        end = max(self.answered)
        window = Window(self.begin or end - self.delay, end)
        services = read_state(self.site.settings.root).get("services", {})
        pages = {
            "home": services["home"]["url"] if "home" in services else "",
            "Prefect": links.deployments(self.site),
            "MLflow": links.model(self.site, self.workload.name),
            "Evidently": links.dashboard(self.site, self.workload.name),
            "server": f"{self.site.settings.serving_url}/docs",
        }
        return {
            "workload": self.workload.name,
            "unit": self.workload.unit,
            "notes": self.workload.notes,
            "weeks": self.weeks,
            "retrains": [
                {
                    "requested": one.requested.isoformat(), "reason": one.reason, "verdict": one.verdict,
                    "version": one.version, "serving_from": self._serving_from(one), "because": one.because,
                }
                for one in self.retrains
            ],
            "first_model": self.first,
            "requests": self.traffic.counts(),
            "predictions_logged": len(lake.predictions(window)),
            "labels_joined": len(lake.judged(window, end + self.delay)),
            "addresses": {label: page for label, page in pages.items() if page},
            "versions": {name: _installed(name) for name in PACKAGES if _installed(name)},
        }  # fmt: skip

    def _record(self, window: Window, answered: Answered, outcome: dict[str, Any], view: LiveView) -> None:
        rows = pa.concat_tables(answered.rows) if answered.rows else None
        frozen = np.abs(self.frozen(rows) - np.array(answered.labels)).mean() if rows is not None else 0.0
        entry = {
            "week_end": f"{window.end - timedelta(days=1):%Y-%m-%d}",
            "rows": len(answered.ids),
            "frozen_error": float(frozen),
            "loop_error": float(answered.errors().mean()) if answered.ids else 0.0,
            "verdict": outcome["verdict"],
            "decision": outcome["decision"],
            "version": answered.versions[-1] if answered.versions else None,
            "reasons": outcome["reasons"],
        }
        self.weeks.append(entry)
        view.week(entry)
        if outcome["decision"] != "hold" and outcome["verdict"] != "unknown":
            view.note(f"{entry['week_end']} {outcome['decision']}: {' '.join(outcome['reasons'])}", STYLES["retrain"])

    def _tell_truths(self, now: datetime) -> None:
        for end, answered in self.answered.items():
            if end + self.delay <= now and end not in self.told:
                self.traffic.feedback(answered, now)
                self.told.add(end)

    def _trickle(self, rows: pa.Table, window: Window, answered: Answered, view: LiveView) -> pa.Table:
        """Answer the first day's requests one by one while the retrain goes on; returns the rows still to be sent."""
        assert self.pending is not None
        view.say(f"{window.start:%Y-%m-%d}: retraining, while requests go on", long=True)
        days = (window.end - window.start).days
        first_day, done = max(1, len(rows) // days), 0
        pause = max(0.1, SPREAD / first_day)

        def one() -> None:
            nonlocal done
            if done < min(first_day, len(rows)):
                self.traffic.send(rows.slice(done, 1), answered)
                done += 1
            time.sleep(pause if done < first_day else 0.1)

        self._await(self.pending, one)
        self._conclude(self.pending, view, one)
        self.pending = None
        return rows.slice(done)

    def _runs(self) -> set[Any]:
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])), limit=200)
        return {run.id for run in runs}

    def _await(self, request: Request, meanwhile: Callable[[], None]) -> None:
        """Until the retrain that the request led to has ended; then its verdict, from the registry."""
        deadline, looked = time.monotonic() + PATIENCE, 0.0
        while time.monotonic() < deadline:
            meanwhile()
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                request.run = self._find(request)
                if request.run is not None and request.run.state is not None and request.run.state.is_final():
                    break
        else:
            raise ServiceError(
                f"The retrain asked for at {request.requested:%Y-%m-%d} did not end in {PATIENCE:.0f} s; "
                "see the Prefect UI."
            )
        completed = request.run.state.is_completed()
        note = self.store.notes(self.workload.name).get("noria.retrain", {}) if completed else {}
        request.verdict = note.get("verdict", "failed")
        request.version = note.get("version")
        request.because = " ".join(note.get("reasons", [])) or str(request.run.state.message or "")

    def _find(self, request: Request) -> FlowRun | None:
        with get_client(sync_client=True) as client:
            if request.run is not None:
                wanted = FlowRunFilter(id=FlowRunFilterId(any_=[request.run.id]))
                return next(iter(client.read_flow_runs(flow_run_filter=wanted)), None)
            runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])), limit=200)
        return next((run for run in runs if run.id not in request.known), None)

    def _conclude(self, request: Request, view: LiveView, meanwhile: Callable[[], None] = lambda: None) -> None:
        style = STYLES.get(request.verdict, "bold")
        view.note(f"{request.requested:%Y-%m-%d} version {request.version} {request.verdict}: {request.because}", style)
        if request.verdict == "promoted" and request.version is not None:
            deadline = time.monotonic() + 30
            while self.traffic.status().get("version") != request.version and time.monotonic() < deadline:
                meanwhile()
            self.traffic.follow(request.version, patience=1.0)

    def _serving_from(self, request: Request) -> str | None:
        """Event time of the first row that the request's version answered."""
        for answered in self.answered.values():
            if request.version in answered.versions:
                at = answered.versions.index(request.version)
                times = pa.concat_tables(answered.rows).column(self.workload.schema.event_time)
                return str(times[at].as_py().isoformat())
        return None


def _installed(name: str) -> str:
    try:
        return installed(name)
    except ImportError:
        return ""
