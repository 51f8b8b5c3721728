"""What becomes of answered rows: their ids and actions, their line in the log, the counters, and the trace.

Called by the batcher. Not here: how a batch runs (`serving.batch`), the log's files (`serving.capture`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from noria.runtime import SCORE
from serving.batch import NO_ID, Call, Recorded, Run, encode_without_ids
from serving.capture import Log
from serving.commit import GroupCommit
from serving.entries import Entry
from serving.ids import MOST_ROWS, Ids, at_row, expand
from serving.metrics import Metrics
from serving.model import Model
from serving.tracing import Request as Traced
from serving.tracing import Run as TracedRun
from serving.tracing import Tracer
from serving.wire import Answer

OK = 200
FLUSH_SECONDS, FLUSH_ROWS = 0.002, 256
"""How long, and how many, answered rows may wait to be logged with `ack=fast`. What waits shares one line and one
write; a worker that is killed takes it along."""
ROUTES = {
    "predict": "/predict/{workload}",
    "infer": "/v2/models/{workload}/infer",
    "feedback": "/feedback/{workload}",
    "grpc_infer": "inference.GRPCInferenceService/ModelInfer",
}
"""How a trace names the routes; looking at pages and health is not traced."""


class Records:
    """The batcher's recorder."""

    def __init__(
        self, log: Log, ids: Ids, metrics: Metrics, tracer: Tracer | None, durable: Callable[[str], bool]
    ) -> None:
        """`durable`: whether the answers of a workload wait for the disk."""
        self.log, self.ids, self.metrics, self.tracer, self.durable = log, ids, metrics, tracer, durable
        self.commit = GroupCommit(log, metrics.log_synced)
        self._waiting: list[tuple[Model, Entry]] = []
        self._rows = 0
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._soon = False

    def record(
        self,
        model: Model,
        run: Run,
        tensors: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        *,
        late: bool,
    ) -> Recorded:
        """Give the rows of a run their ids and actions, and log them; later, where neither the workload nor the caller
        minds."""
        durable = self.durable(model.workload)
        rows, late = run.rows, late and not durable
        actions = model.bundle.bands.actions(outputs[SCORE]) if model.bundle else []
        # Where no answer tells the ids, they are made for all runs of a line at once.
        told = not late or any(map(_tells_ids, run.calls))
        first = self.ids.base(model.workload, rows) if told else 0
        entry = Entry(first, rows, tensors, outputs, _times(run), actions, (run.ended - run.taken) * 1000)
        # An id is a promise that the row is known: where the log could not be written there is none.
        run.failures = self.log.failures
        known = told and (late or self.log.predictions(model, [entry]))
        if known and durable:
            run.told = outputs, actions
        return Recorded(expand(first, rows) if known else NO_ID * rows, actions, entry if late else None)

    def release(self, model: Model, runs: Sequence[Run], send: Callable[[], None]) -> None:
        """Send at once, or after the log is on the disk; without ids where it does not get there."""
        if not runs or not self.durable(model.workload):
            send()
            return

        def synced(safe: bool) -> None:
            if not safe:
                for run in runs:
                    encode_without_ids(model, run)
            send()

        self.commit.after(synced, min([run.failures for run in runs]))

    def answered(
        self, model: Model, calls: Sequence[Call], runs: Sequence[Run], loop: asyncio.AbstractEventLoop
    ) -> None:
        """Count a batch whose answers were sent, and see to it that what was left for later is logged, together with
        other batches."""
        # Counted at once, because what was just used is quickly read, and quickly let go.
        now = time.perf_counter()
        self._count(model, calls, runs, now)
        for run in runs:
            if run.later is not None:
                self._waiting.append((model, run.later))
                self._rows += run.rows
        if not self._waiting:
            return
        if self._timer is None:
            self._since, self._timer = now, loop.call_later(FLUSH_SECONDS, self.flush)
        if not self._soon and (self._rows >= FLUSH_ROWS or now - self._since >= FLUSH_SECONDS / 2):
            # The best moment is the next tick: the answers have left, and clients work meanwhile.
            self._soon = True
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Log what waits. Called in the loop."""
        if self._timer is not None:
            self._timer.cancel()
        waiting: dict[int, tuple[Model, list[Entry]]] = {}
        for model, entry in self._waiting:
            waiting.setdefault(id(model), (model, []))[1].append(entry)
        self._waiting, self._rows, self._timer, self._soon = [], 0, None, False
        for model, entries in waiting.values():
            self._name(model, [entry for entry in entries if not entry.first])
            self.log.predictions(model, entries)

    def _count(self, model: Model, calls: Sequence[Call], runs: Sequence[Run], now: float) -> None:
        """Count a batch whose answers left at `now`."""
        for call in calls:
            if call.answer is not None and call.answer.status != OK:
                status, seconds = call.answer.status, now - call.began
                if status == 504:
                    self.metrics.refused(model.workload, "deadline")
                self.metrics.answered(call.route, model.workload, model.version, status, seconds)
        for run in runs:
            good = [call for call in run.calls if call.answer is not None and call.answer.status == OK]
            self.metrics.batch(
                model.workload, model.version, [call.route for call in good], [now - call.began for call in good],
                [run.began - call.began for call in good],
                rows=run.rows, run=run.ended - run.began,
            )  # fmt: skip
        if self.tracer is not None:
            self._trace(self.tracer, model, calls, runs, now)

    def _name(self, model: Model, entries: Sequence[Entry]) -> None:
        """Give the rows of these runs the ids of one batch, or of as few as can hold them."""
        left, base, row, size = sum([entry.rows for entry in entries]), 0, 0, 0
        for entry in entries:
            if row + entry.rows > size:
                size = max(entry.rows, min(left, MOST_ROWS))
                base, row = self.ids.base(model.workload, size), 0
            entry.first = at_row(base, row)
            row += entry.rows
            left -= entry.rows

    def labelled(self, workload: str, answer: Answer, began: float, traceparent: bytes) -> None:
        """Count a request that brought labels, and tell the tracer."""
        now, path = time.perf_counter(), ROUTES["feedback"]
        self.metrics.answered("feedback", workload, 0, answer.status, now - began, answer.rows)
        if self.tracer is not None:
            named = path.format(workload=workload)
            self.tracer.answered(
                Traced("POST", path, named, began, now, answer.status, traceparent, workload, answer.rows)
            )

    def refused(self, workload: str, route: str, status: int, reason: str = "") -> None:
        """Count a request that never came to a batch."""
        self.metrics.turned_away(route, workload, status, reason)

    def _trace(self, tracer: Tracer, model: Model, calls: Sequence[Call], runs: Sequence[Run], now: float) -> None:
        """Tell the tracer of a batch: each request once, with the last run that it was in."""
        last = {id(call): run for run in runs for call in run.calls}
        by_run: dict[int, list[Traced]] = {}
        for call in calls:
            if call.answer is None:
                continue
            path = ROUTES.get(call.route, call.route)
            traced = Traced(
                "POST", path, path.format(workload=model.workload), call.began, now, call.answer.status,
                call.traceparent, model.workload, call.answer.rows,
            )  # fmt: skip
            run = last.get(id(call))
            if run is None:
                tracer.answered(traced)
            else:
                by_run.setdefault(id(run), []).append(traced)
        for run in runs:
            if id(run) in by_run:
                ran = TracedRun(
                    model.workload, model.version, run.rows, run.taken, (run.began, run.ended), run.logged, now
                )
                tracer.batch(ran, by_run[id(run)])


def _tells_ids(call: Call) -> bool:
    return call.asked is not None and call.asked.tells_ids


def _times(run: Run) -> int | np.ndarray:
    """When each row of a run happened, microseconds [rows]; one number where all did now."""
    now = time.time_ns() // 1000
    parts = [call.asked.rows for call in run.calls if call.asked]
    if not [part for part in parts if part.times is not None]:
        return now
    return np.concatenate([np.full(part.count, now) if part.times is None else part.times for part in parts])
