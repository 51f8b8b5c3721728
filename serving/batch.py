"""One batch: decode its requests, run their rows at once, log them, and give each its answer.

What one request does wrong never reaches the others of its batch. Everything here may run in the event loop or in a
thread. Not here: when a batch runs and who is in it (`serving.batcher`), bytes (the encodings), the log's files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from noria.errors import SchemaError
from noria.runtime import SCORE
from serving.entries import Entry
from serving.model import Model, even
from serving.outcome import Outcome, Scored
from serving.seldom import Seldom
from serving.wire import Answer, Asked, Refusal, Rows, refused

FAULT = "The server has a fault; its log tells more."
NO_ID = ("",)
"""Of a row that the log does not hold for certain, where an id is a promise."""

FAILED_RUNS = Seldom()

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
    traceparent: bytes = b""
    """What the client's own trace says."""
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
    later: Entry | None = None
    """What is left to be logged once the answers are on their way."""


@dataclass(slots=True)
class Run:
    """One run of the model."""

    calls: Sequence[Call]
    rows: int
    taken: float
    """When its calls were taken off the queue; as the other times, of `time.perf_counter`."""
    began: float
    ended: float
    logged: tuple[float, float] | None = None
    """Begin and end of the write to the log; None: it was left for later."""
    later: Entry | None = None
    """What is to be logged, where that was left for after the answers."""
    failures: int = 0
    """Syncs of the log that had failed before it was written."""
    told: tuple[Mapping[str, np.ndarray], Sequence[str | None]] | None = None
    """Outputs and actions, where its answers tell ids and wait for the disk."""


class Recorder(Protocol):
    """What becomes of answered rows."""

    def record(
        self,
        model: Model,
        run: Run,
        tensors: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        *,
        late: bool,
    ) -> Recorded:
        """Give the rows of a run their ids and log them; `late`: the log may follow the answers. Called where it ran:
        in the loop or in the thread."""

    def release(self, model: Model, runs: Sequence[Run], send: Callable[[], None]) -> None:
        """Call `send` when the log of the batch is as safe as the workload asks; at once where it is already."""

    def answered(
        self, model: Model, calls: Sequence[Call], runs: Sequence[Run], loop: asyncio.AbstractEventLoop
    ) -> None:
        """Log what was left for later, and count what was answered, and by which runs. Called in the loop, once it was
        sent."""

    def refused(self, workload: str, route: str, status: int, reason: str = "") -> None:
        """Count a request that never came to a batch."""


def execute(
    model: Model, calls: Sequence[Call], recorder: Recorder, *, together: bool = True, late: bool = False
) -> list[Run]:
    """Give every call its answer; returns the runs that it took. Never raises.

    `together`: requests may share a run, where the model allows. `late`: the log may follow the answers.
    """
    taken = time.perf_counter()
    runs: list[Run] = []
    ready = [call for call in calls if _decoded(model, call)]
    for batch in _batches(model, ready) if together else [[call] for call in ready]:
        _run(model, batch, recorder, runs, taken=taken, late=late)
    return runs


def _run(model: Model, calls: list[Call], recorder: Recorder, runs: list[Run], *, taken: float, late: bool) -> None:
    """One run for all of them; where it fails, or nobody knows which rows came of whose, one run for each."""
    try:
        started = time.perf_counter()
        parts = [call.asked.rows for call in calls if call.asked]
        tensors = _together(parts)
        rows = parts[0].count if len(parts) == 1 else sum([part.count for part in parts])
        outputs = _outputs(model, tensors, rows)
        if _uneven(model, outputs, rows):
            if len(calls) > 1:
                raise ValueError("its outputs are not row by row what went in")
            rows, late = 1, False  # as of a model that is not batched, with a line of the log for itself
        run = Run(calls, rows, taken, started, time.perf_counter())
    except Exception as error:
        if len(calls) > 1:
            for call in calls:
                _run(model, [call], recorder, runs, taken=taken, late=late)
        else:
            if (kept := FAILED_RUNS.due(model.workload)) is not None:
                sentence = "%s version %s does not run: %s (%d more since the last such line)"
                logger.warning(sentence, model.workload, model.version, error, kept)
            reason = " ".join(str(error).split())[:300]
            calls[0].answer = refused(Refusal(400, f"The model does not run on these values: {reason}"))
        return
    if model.bundle is not None and not np.isfinite(outputs[SCORE]).all():
        _refuse_broken(calls, outputs[SCORE])
        fine = [call for call in calls if call.answer is None]
        if fine:
            _run(model, fine, recorder, runs, taken=taken, late=late)
        return
    runs.append(run)
    try:
        recorded = recorder.record(model, run, tensors, outputs, late=late)
        run.later = recorded.later
        if run.later is None:
            run.logged = run.ended, time.perf_counter()
        _encode(model, calls, outputs, recorded)
    except Exception:
        logger.exception("A batch of %s failed", model.workload)
    for call in calls:
        call.answer = call.answer or refused(Refusal(500, FAULT))


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
    """Calls that can share a run: within the rows that may, and alike in every dimension but the first."""
    if not model.batched or len(calls) <= 1:
        return [[call] for call in calls]
    groups: dict[object, list[list[Call]]] = {}
    rows: dict[object, int] = {}
    for call in calls:
        assert call.asked is not None
        count = call.asked.rows.count
        key = tuple(values.shape[1:] for values in call.asked.rows.tensors.values()) if model.ragged else None
        if key not in groups or rows[key] + count > model.shared_rows:
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
    """Run the rows, in pieces where one request alone has more than the proven rows and the model goes row by row."""
    step = model.most_rows
    if rows <= step or not model.batched:
        return model.run(tensors)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, rows, step):
        part = model.run({name: values[start : start + step] for name, values in tensors.items()})
        if _uneven(model, part, min(step, rows - start)):
            return model.run(tensors)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _uneven(model: Model, outputs: dict[str, np.ndarray], rows: int) -> bool:
    """Whether these values, unlike those that the model was warmed with, give other rows than went in."""
    return model.batched and model.bundle is None and not even(outputs, rows)


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


def encode_without_ids(model: Model, run: Run) -> None:
    """Give the calls of a run other answers, because its rows are not known after all."""
    if run.told is None:
        return
    outputs, actions = run.told
    for call in run.calls:
        call.answer = None
    try:
        _encode(model, run.calls, outputs, Recorded(NO_ID * run.rows, actions))
    except Exception:
        logger.exception("The answers of %s cannot be encoded without ids", model.workload)
    for call in run.calls:
        call.answer = call.answer or refused(Refusal(500, FAULT))


def _encode(model: Model, calls: Sequence[Call], outputs: Mapping[str, np.ndarray], recorded: Recorded) -> None:
    """Give each call its share as an answer."""
    outcome = Outcome(model, outputs, recorded.ids, recorded.actions, shared=len(calls) > 1)
    if not outcome.shared:
        assert calls[0].asked is not None
        calls[0].answer = calls[0].asked.answer(outcome.whole())
        return
    start = 0
    for call in calls:
        assert call.asked is not None
        end = start + call.asked.rows.count
        try:
            call.answer = call.asked.answer(Scored(outcome, start, end))
        except Exception:  # the others of the batch have done nothing wrong
            logger.exception("An answer of %s cannot be encoded", model.workload)
        start = end
