"""What one worker counts. Counting is adding to a list; Prometheus' words are made when somebody asks for the page.

Labels are bounded: a workload of which no version is loaded, and a route or reason that is none of ours, share one
value each, whatever clients send. Safe from several threads on an interpreter with a global lock: nothing between
reading a number and writing it back lets another thread run. Not here: how good the predictions are (`monitoring`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence, Set
from importlib.metadata import version as installed
from pathlib import Path

from prometheus_client import ProcessCollector

from serving import exposition, tally
from serving.families import BY_NAME, SECONDS, SHORT_SECONDS, Numbers, add, empty, spread, spread_number
from serving.tally import Tally

ROUTES = frozenset({"predict", "infer", "feedback", "grpc_infer", "metadata", "health", "repository", "page"})
BECAUSE = {408: "timeout", 413: "body_size", 431: "header_size", 503: "not_ready"}
"""Why a request is turned away, by its status, where nothing else is said."""
REASONS = frozenset({"queue_full", "deadline", "rate", "auth", "connections", "shedding", *BECAUSE.values()})
SWAPS = ("serving", "failed")
OTHER = "other"
"""The label of a route or reason that is not among these."""
OK = 200
OF_LANES = (BY_NAME["noria_batch_rows"], BY_NAME["noria_rows_total"])
DURATION = "noria_request_duration_seconds"
OF_ANSWERS = (BY_NAME["noria_requests_total"], BY_NAME[DURATION])

Key = tuple[str, str, int, int]
"""Route, workload ("" when there is none of that name), version (0: none), status."""
logger = logging.getLogger(__name__)


class _Lane:
    """The lists that a batch of one version adds to, found once."""

    __slots__ = ("requests", "routes", "rows", "runs", "waits")

    def __init__(self, numbers: Numbers, workload: str, version: int) -> None:
        def held(name: str, *labels: str) -> list[float]:
            return numbers[name].setdefault(labels, [0.0] * BY_NAME[name].width)

        self.rows = [0.0] * BY_NAME["noria_batch_rows"].width
        """Of this version; the family has one series for all of a workload."""
        self.requests = held("noria_batch_requests", workload)
        self.runs = held("noria_model_run_duration_seconds", workload, str(version))
        self.waits = held("noria_queue_duration_seconds", workload)
        self.routes: dict[str, list[float]] = {}


class Metrics:
    """The numbers of one process. `source` names its life, as in the prediction log, and is never used again."""

    def __init__(self, folder: Path | None = None, source: str = "worker") -> None:
        self.folder, self.source = folder, source
        self.before: list[Callable[[], None]] = []
        """Called before the numbers are read off, to set what is looked up rather than counted."""
        self._numbers = empty()
        self._answers: dict[Key, list[float]] = {}
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._workloads: set[str] = set()
        self._process = ProcessCollector(registry=None)
        self._lock = threading.Lock()
        self._written = True
        self._set("noria_build_info", (installed("noria"),), 1)
        self._begin("")

    def batch(
        self,
        workload: str,
        version: int,
        routes: Sequence[str],
        seconds: Sequence[float],
        waits: Sequence[float] = (),
        *,
        rows: int,
        run: float,
    ) -> None:
        """Count one run of a model and the answers with status 200 that came of it.

        `routes` and `seconds` tell of each answer where it was asked and how long it took since its request was whole,
        [requests] both; `waits` how long each waited for the run; `run` how long that took. An answer with another
        status is counted by `answered`.
        """
        lane = self._lanes.get((workload, version)) or self._lane(workload, version)
        count = len(seconds)
        spread_number(lane.rows, rows)
        spread_number(lane.requests, count)
        spread(lane.runs, SHORT_SECONDS, (run,))
        if count and routes.count(routes[0]) == count:
            held = lane.routes.get(routes[0]) or self._of_lane(lane, routes[0], workload, version)
            spread(held, SECONDS, seconds)
        else:
            last = ""
            for route, taken in zip(routes, seconds, strict=True):
                if route is not last:
                    held = lane.routes.get(route) or self._of_lane(lane, route, workload, version)
                    last = route
                spread(held, SECONDS, (taken,))
        if waits:
            spread(lane.waits, SHORT_SECONDS, waits)

    def answered(self, route: str, workload: str, version: int, status: int, seconds: float, rows: int = 0) -> None:
        """Count one answer that no batch counts.

        `version` is the one that answered, never what a client sent; 0: none. `rows` are those scored, or for the route
        `feedback` the labels taken.
        """
        held = self._answers.get((route, workload, version, status)) or self._answer(route, workload, version, status)
        spread(held, SECONDS, (seconds,))
        if rows and route == "feedback":
            self._add("noria_labels_total", (self._known(workload),), rows)
        elif rows and version:
            self._add("noria_rows_total", (workload, str(version)), rows)

    def turned_away(self, route: str, workload: str, status: int, reason: str = "") -> None:
        """Count one answer to a request that went no further, and why (one of REASONS, where there is one).

        It has no duration: it was not whole, or nothing was done, and many of them would hide how long others take.
        """
        labels = (route if route in ROUTES else OTHER, self._known(workload), "", str(status))
        self._add("noria_requests_total", labels, 1)
        if reason := reason or BECAUSE.get(status, ""):
            self.refused(workload, reason)

    def queued(self, workload: str, depth: int) -> None:
        """So many requests of a workload wait now."""
        self._numbers["noria_queue_requests"][(workload,)] = [depth]

    def refused(self, workload: str, reason: str) -> None:
        """Count one request that was refused to protect the others; one of REASONS. Its answer is counted apart."""
        labels = (self._known(workload), reason if reason in REASONS else OTHER)
        self._add("noria_refusals_total", labels, 1)

    def loaded(self, workload: str, version: int, provider: str) -> None:
        """This process answers with a version, run by ONNX Runtime's `provider` (`CPUExecutionProvider`)."""
        self._begin(workload)
        self.unloaded(workload, version)
        self._set("noria_model_info", (workload, str(version), _provider(provider)), 1)
        self._lane(workload, version)

    def unloaded(self, workload: str, version: int) -> None:
        """This process does not answer with a version any more; what was counted stays."""
        held = self._numbers["noria_model_info"]
        for labels in [labels for labels in held if labels[:2] == (workload, str(version))]:
            del held[labels]

    def swapped(self, workload: str, status: str, seconds: float | None = None) -> None:
        """Count one try to serve another version, which is one of SWAPS since, and how long a good one took."""
        self._begin(workload)
        self._add("noria_swaps_total", (workload, status), 1)
        if seconds is not None:
            self._observe("noria_swap_duration_seconds", (workload,), seconds)

    def log_lag(self, workload: str, rows: int, segments: int, oldest: float | None) -> None:
        """What this process holds of the log that is not in the lake; `oldest` row's time in seconds since 1970."""
        self._set("noria_log_pending_rows", (workload,), rows)
        self._set("noria_log_pending_segments", (workload,), segments)
        self._set("noria_log_lag_seconds", (workload,), max(0.0, time.time() - oldest) if rows and oldest else 0.0)

    def log_lag_only(self, workloads: Set[str]) -> None:
        """Tell nothing of what waits of others than these: what went and is in the lake would lag for ever."""
        for name in ("noria_log_pending_rows", "noria_log_pending_segments", "noria_log_lag_seconds"):
            for labels in [labels for labels in self._numbers[name] if labels[0] not in workloads]:
                del self._numbers[name][labels]

    def log_lost(self, total: int) -> None:
        """So many answered rows and labels could not be logged since this process began."""
        self._set("noria_log_lost_rows_total", (), total)

    def log_synced(self, seconds: float) -> None:
        """Count one sync of the log to the disk."""
        self._observe("noria_log_sync_duration_seconds", (), seconds)

    def shadowed(
        self, workload: str, version: int, *, scored: int = 0, failed: int = 0, dropped: int = 0,
        runs: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """Count rows that a shadow scored, could not answer, and let go because it fell behind.

        `runs` are its runs, counted as the family's histogram: one number a bucket, those above, the sum of seconds.
        """
        for result, rows in (("scored", scored), ("failed", failed), ("dropped", dropped)):
            self._add("noria_shadow_rows_total", (workload, str(version), result), rows)
        name = "noria_shadow_run_duration_seconds"
        held = self._numbers[name].setdefault((workload, str(version)), [0.0] * BY_NAME[name].width)
        for place, count in enumerate(runs[: len(held)]):
            held[place] += count

    def shadow_stands(self, workload: str, *, failed: bool, restarts: int) -> None:
        """Whether its challenger was given up, and how often more its process ended by itself."""
        self._set("noria_shadow_failed", (workload,), failed)
        self._add("noria_shadow_restarts_total", (workload,), restarts)

    def shadow_waits(self, workload: str, rows: int, oldest: float | None) -> None:
        """Rows that wait for the shadow; `oldest` row's time in seconds since 1970."""
        self._set("noria_shadow_pending_rows", (workload,), rows)
        self._set("noria_shadow_lag_seconds", (workload,), max(0.0, time.time() - oldest) if oldest else 0.0)

    def connected(self, connections: int) -> None:
        """So many client connections are open now."""
        self._set("noria_connections", (self.source,), connections)

    def numbers(self) -> Numbers:
        """What this process counted until now. A copy, safe to take beside the event loop."""
        for look in self.before:
            look()
        found = {name: {key: held.copy() for key, held in kept.copy().items()} for name, kept in self._numbers.items()}
        for (workload, version), lane in self._lanes.copy().items():
            batches: Numbers = {"noria_batch_rows": {(workload,): lane.rows}}
            add(found, {**batches, "noria_rows_total": {(workload, str(version)): [lane.rows[-1]]}}, OF_LANES)
        for (route, workload, version, status), held in self._answers.copy().items():
            labels = (route, workload, str(version) if version else "", str(status))
            counted: Numbers = {"noria_requests_total": {labels: [sum(held[:-1])]}, DURATION: {labels[:2]: held}}
            add(found, counted, OF_ANSWERS)
        for metric in self._process.collect():
            for sample in metric.samples:
                if sample.name in BY_NAME:
                    found[sample.name][(self.source,)] = [sample.value]
        return found

    def dump(self, *, ended: bool = False) -> Tally:
        """Write the numbers to this process's file: each second, and with `ended` as the last thing it does.

        A disk that cannot be written is said once and does no harm: the numbers stay in memory.
        """
        with self._lock:  # so that an earlier reading never replaces a later one
            now = Tally(self.source, self.numbers(), ended=ended)
            if self.folder is not None:
                try:
                    tally.write(self.folder, now)
                    self._written = True
                except OSError as error:
                    if self._written:
                        logger.warning("The metrics cannot be written to %s: %s", self.folder, error.strerror or error)
                    self._written = False
        return now

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The text that Prometheus reads, of all workers together, and its content type by the Accept header.

        It writes this process's file too: a number that was once shown is still there if the process is killed, because
        to Prometheus a counter that goes down is one that began again.
        """
        return exposition.page(tally.total(self.folder, self.dump()), accept)

    def _lane(self, workload: str, version: int) -> _Lane:
        self._workloads.add(workload)
        return self._lanes.setdefault((workload, version), _Lane(self._numbers, workload, version))

    def _of_lane(self, lane: _Lane, route: str, workload: str, version: int) -> list[float]:
        held = lane.routes[route] = self._answer(route, workload, version, OK)
        return held

    def _answer(self, route: str, workload: str, version: int, status: int) -> list[float]:
        if version:
            self._workloads.add(workload)
        key = (route if route in ROUTES else OTHER, self._known(workload), version, status)
        return self._answers.setdefault(key, [0.0] * (len(SECONDS) + 2))

    def _begin(self, workload: str) -> None:
        """A workload is known now. What is rare begins at zero: Prometheus sees no rise in a series' first number."""
        for reason in REASONS:
            self._add("noria_refusals_total", (workload, reason), 0)
        if workload:
            self._workloads.add(workload)
            for status in SWAPS:
                self._add("noria_swaps_total", (workload, status), 0)

    def _known(self, workload: str) -> str:
        return workload if workload in self._workloads else ""

    def _add(self, name: str, labels: tuple[str, ...], amount: float) -> None:
        held = self._numbers[name].get(labels)
        if held is None:
            held = self._numbers[name].setdefault(labels, [0.0])
        held[0] += amount

    def _set(self, name: str, labels: tuple[str, ...], value: float) -> None:
        self._numbers[name][labels] = [value]

    def _observe(self, name: str, labels: tuple[str, ...], value: float) -> None:
        family = BY_NAME[name]
        held = self._numbers[name].get(labels)
        if held is None:
            held = self._numbers[name].setdefault(labels, [0.0] * family.width)
        spread(held, family.bounds, (value,))


def _provider(name: str) -> str:
    """`cpu` of `CPUExecutionProvider`."""
    return name.removesuffix("ExecutionProvider").lower()
