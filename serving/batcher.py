"""The event loop's tick is the batch: every request that became whole in one tick joins one run of its model.

An idle server answers at once, because there is no timer to wait for. A batch that would hold up the loop goes to one
thread, and what arrives meanwhile is the next batch; which of the two is decided by what earlier batches took, not
configured. What one request does wrong never reaches the others of its batch. Not here: bytes (the encodings), HTTP,
the log's files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from noria.errors import SchemaError
from noria.runtime import SCORE
from serving.engine import Engine
from serving.model import Model
from serving.wire import Answer, Asked, Refusal, Rows, Scored, refused

INLINE_SECONDS = 0.002
"""A batch that is expected to take longer runs beside the loop. A hop to the thread and back costs about a twentieth of
it, and nobody else waits longer than this for a batch inside the loop."""
FIRST_RATE = 3e-8
"""Seconds per byte of body that are expected of a batch unlike any before: about what JSON costs."""
PATIENCE = 1.1
"""How much more a batch is expected to take when the last one of its size took longer. It is little, because most of
what takes long once is somebody else's use of the machine."""
MOST_WAITING = 1024
"""Requests of one model that may wait; one more is refused at once."""
FAULT = "The server has a fault; its log tells more."
RETRY = ((b"retry-after", b"1"),)

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Call:
    """One request that waits for its model."""

    route: str
    workload: str
    decode: Callable[[Model], Asked]
    reply: Callable[[Answer], None]
    """Called once, in the event loop."""
    size: int
    """Bytes of its body."""
    version: int | None = None
    """The only version that may answer; None: any."""
    deadline: float | None = None
    """`time.perf_counter()` after which nobody wants the answer."""
    began: float = 0.0
    gone: bool = False
    """The client has left."""
    asked: Asked | None = None
    answer: Answer | None = None


@dataclass(slots=True)
class Recorded:
    """What a batch's rows were given, [rows] each."""

    ids: Sequence[str]
    actions: Sequence[str | None]
    """Empty for a plain model."""


class Recorder(Protocol):
    """What becomes of answered rows."""

    def record(
        self,
        model: Model,
        calls: Sequence[Call],
        tensors: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        began: float,
    ) -> Recorded:
        """Log a batch before it is answered. Called where it ran: in the loop or in the thread."""

    def release(self, model: Model, send: Callable[[], None]) -> None:
        """Call `send` when the log of the batch is as safe as the workload asks; at once where it is already."""

    def answered(self, model: Model, calls: Sequence[Call], runs: Sequence[tuple[int, float]]) -> None:
        """Count what was answered: `runs` are the rows and seconds of each run. Called in the loop."""


@dataclass(slots=True, eq=False)
class Lane:
    """The requests of one model, in order."""

    workload: str
    queue: deque[Call] = field(default_factory=deque)
    scheduled: bool = False
    seconds: dict[int, float] = field(default_factory=dict)
    """What batches took from bytes to bytes, by the number of bits of their size in bytes."""

    def expected(self, size: int, run: float) -> float:
        """Seconds that a batch of so many bytes will take, whose run alone takes `run`."""
        known = self.seconds.get(size.bit_length())
        return run + FIRST_RATE * size if known is None else known

    def learn(self, size: int, elapsed: float) -> None:
        """A batch of so many bytes took so long."""
        bits = size.bit_length()
        self.seconds[bits] = min(elapsed, PATIENCE * self.seconds.get(bits, elapsed))


class Batcher:
    """Queues and runs. Everything but `Batcher._process` happens in the event loop."""

    def __init__(self, engine: Engine, recorder: Recorder, most_waiting: int = MOST_WAITING) -> None:
        self.engine, self.recorder, self.most_waiting = engine, recorder, most_waiting
        self.lanes: dict[str, Lane] = {}
        self.batching = True
        """False: every request runs alone (to measure what batching brings)."""
        self._thread = ThreadPoolExecutor(1, "batch")

    def submit(self, call: Call) -> None:
        """Queue a request; its `reply` is called exactly once, unless the client leaves first."""
        call.began = time.perf_counter()
        lane = self.lanes.get(call.workload)
        if lane is None:
            if call.workload not in self.engine.models:
                call.reply(refused(self.engine.refusal(call.workload)))
                return
            lane = self.lanes[call.workload] = Lane(call.workload)
        if len(lane.queue) >= self.most_waiting:
            sentence = f"{call.workload} has {self.most_waiting} requests waiting; try again in a second."
            call.reply(refused(Refusal(503, sentence, RETRY)))
            return
        lane.queue.append(call)
        if not lane.scheduled:
            lane.scheduled = True
            asyncio.get_running_loop().call_soon(self._flush, lane)

    async def ask(self, call: Call) -> Answer:
        """Queue a request that was made with `reply` unset, and wait for its answer; cancelling drops it."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call.reply = lambda answer: None if future.done() else future.set_result(answer)
        self.submit(call)
        try:
            return await future
        finally:
            call.gone = True

    def _flush(self, lane: Lane) -> None:
        """Run what waits: one batch in the loop, or in the thread when it is expected to take long."""
        model = self.engine.models[lane.workload]
        calls, size = self._take(lane, model)
        if lane.expected(size, model.expected(len(calls))) <= INLINE_SECONDS:
            self._finish(lane, model, calls, self._process(lane, model, calls))
        else:
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._process, lane, model, calls)
            work.add_done_callback(lambda future: self._finish(lane, model, calls, future.result()))

    def _take(self, lane: Lane, model: Model) -> tuple[list[Call], int]:
        """The next calls: no more than the model takes rows, for each has one at least."""
        calls: list[Call] = []
        size, most = 0, model.most_rows if model.batched and self.batching else 1
        while lane.queue and len(calls) < most:
            call = lane.queue.popleft()
            if call.gone:
                continue
            calls.append(call)
            size += call.size
        return calls, size

    def _finish(self, lane: Lane, model: Model, calls: list[Call], runs: list[tuple[int, float]]) -> None:
        """Send the answers, when the log allows; then see to what has arrived meanwhile."""
        if calls:
            self.recorder.answered(model, calls, runs)
            self.recorder.release(model, lambda: _send(calls))
        if lane.queue:
            asyncio.get_running_loop().call_soon(self._flush, lane)
        else:
            lane.scheduled = False

    def _process(self, lane: Lane, model: Model, calls: list[Call]) -> list[tuple[int, float]]:
        """Give every call its answer; returns rows and seconds of each run. Never raises."""
        began = time.perf_counter()
        ready = [call for call in calls if _decoded(model, call)]
        runs: list[tuple[int, float]] = []
        for batch in _batches(model, ready) if self.batching else [[call] for call in ready]:
            self._run(model, batch, began, runs)
        lane.learn(sum(call.size for call in calls), time.perf_counter() - began)
        return runs

    def _run(self, model: Model, calls: list[Call], began: float, runs: list[tuple[int, float]]) -> None:
        """One run for all of them; where it fails, one run for each, so that only the culprit fails."""
        try:
            started = time.perf_counter()
            tensors = _together([call.asked.rows for call in calls if call.asked])
            rows = sum(call.asked.rows.count for call in calls if call.asked)
            outputs = _outputs(model, tensors, rows)
            runs.append((rows, time.perf_counter() - started))
        except Exception as error:
            if len(calls) > 1:
                for call in calls:
                    self._run(model, [call], began, runs)
            else:
                logger.warning("%s version %s does not run: %s", model.workload, model.version, error)
                reason = " ".join(str(error).split())[:300]
                calls[0].answer = refused(Refusal(400, f"The model does not run on these values: {reason}"))
            return
        if model.bundle is not None and not np.isfinite(outputs[SCORE]).all():
            _refuse_broken(calls, outputs[SCORE])
            fine = [call for call in calls if call.answer is None]
            if fine:
                self._run(model, fine, began, runs)
            return
        try:
            _encode(model, calls, outputs, self.recorder.record(model, calls, tensors, outputs, began))
        except Exception:
            logger.exception("A batch of %s failed", model.workload)
        for call in calls:
            call.answer = call.answer or refused(Refusal(500, FAULT))


def _send(calls: Sequence[Call]) -> None:
    for call in calls:
        if not call.gone and call.answer is not None:
            call.reply(call.answer)


def _decoded(model: Model, call: Call) -> bool:
    """Decode one request; where it is wrong or late, its answer says so."""
    try:
        if call.version is not None and call.version != model.version:
            raise Refusal(404, f"Version {call.version} of {model.workload} does not serve; {model.version} does.")
        call.asked = call.decode(model)
        if call.deadline is not None and time.perf_counter() > call.deadline:
            raise Refusal(504, "The deadline of the request passed before the model ran.")
        return True
    except Refusal as refusal:
        call.answer = refused(refusal)
    except SchemaError as error:
        call.answer = refused(Refusal(422, str(error)))
    except RecursionError:
        call.answer = refused(Refusal(400, "The JSON is nested too deeply."))
    except Exception:
        logger.exception("A request to %s cannot be decoded", model.workload)
        call.answer = refused(Refusal(500, FAULT))
    return False


def _batches(model: Model, calls: list[Call]) -> list[list[Call]]:
    """Calls that can share a run: together within the proven rows, and alike in every dimension but the first."""
    if not model.batched:
        return [[call] for call in calls]
    groups: dict[object, list[list[Call]]] = {}
    rows: dict[object, int] = {}
    for call in calls:
        assert call.asked is not None
        count = call.asked.rows.count
        key = tuple(values.shape[1:] for values in call.asked.rows.tensors.values()) if model.ragged else None
        if key not in groups or rows[key] + count > model.most_rows:
            groups.setdefault(key, []).append([])
            rows[key] = 0
        groups[key][-1].append(call)
        rows[key] += count
    return [batch for group in groups.values() for batch in group]


def _together(parts: Sequence[Rows]) -> dict[str, np.ndarray]:
    """The inputs of all requests as those of one."""
    if len(parts) == 1:
        return parts[0].tensors
    return {name: np.concatenate([part.tensors[name] for part in parts]) for name in parts[0].tensors}


def _outputs(model: Model, tensors: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Run the rows, in pieces where one request alone has more than the proven rows."""
    step = model.most_rows
    if rows <= step or not model.batched:
        return model.run(tensors)
    parts = [
        model.run({name: values[start : start + step] for name, values in tensors.items()})
        for start in range(0, rows, step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _refuse_broken(calls: Sequence[Call], scores: np.ndarray) -> None:
    """Answer the calls that have a score which is no number."""
    start = 0
    for call in calls:
        assert call.asked is not None
        end = start + call.asked.rows.count
        broken = ~np.isfinite(scores[start:end])
        if broken.any():
            row = int(np.argmax(broken))
            sentence = f"Row {row}: the model has no finite score for these values; check them for extremes."
            call.answer = refused(Refusal(422, sentence))
        start = end


def _encode(model: Model, calls: Sequence[Call], outputs: dict[str, np.ndarray], recorded: Recorded) -> None:
    """Give each call its share as an answer."""
    start = 0
    alone = len(calls) == 1
    for call in calls:
        assert call.asked is not None
        end = start + call.asked.rows.count
        part = outputs if alone else {name: values[start:end] for name, values in outputs.items()}
        scored = Scored(model, part, recorded.ids[start:end], recorded.actions[start:end])
        call.answer = call.asked.answer(scored)
        start = end
