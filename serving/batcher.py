"""The event loop's tick is the batch: every request that became whole in one tick joins one run of its model.

An idle server answers at once, because there is no timer to wait for. A batch that would hold up the loop goes to one
thread, and what arrives meanwhile is the next batch; which of the two is decided by what earlier batches took, not
configured. Not here: what happens to a batch (`serving.batch`), HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from serving.batch import Call, Recorder, Run, execute
from serving.engine import Engine
from serving.model import Model
from serving.wire import RETRY, Answer, Refusal, refused

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
WAIT_SECONDS = 0.25
WAIT_BATCHES = 16
"""A request that would wait longer than this, and than so many batches, is refused at once."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Lane:
    """The requests of one model, in order."""

    workload: str
    queue: deque[Call] = field(default_factory=deque)
    scheduled: bool = False
    seconds: dict[int, float] = field(default_factory=dict)
    """What batches took from bytes to bytes, by the number of bits of their size in bytes."""

    each: float = 0.0
    """Seconds that a request took lately, in batches."""
    longest: float = 0.0
    """Seconds that a batch took lately."""
    busy: Answer = field(init=False)
    """What a request hears that would wait too long; made once, for it is needed most when there is least time."""

    def __post_init__(self) -> None:
        sentence = f"{self.workload} has too many requests waiting; try again in a second."
        self.busy = refused(Refusal(503, sentence, RETRY))

    def late(self) -> bool:
        """Whether a request that came now would wait too long: it is better told at once."""
        wait = len(self.queue) * self.each
        return wait > WAIT_SECONDS and wait > WAIT_BATCHES * self.longest

    def expected(self, size: int, model: Model, calls: int) -> float:
        """Seconds that a batch of so many bytes and calls will take."""
        known = self.seconds.get(size.bit_length())
        return model.expected(calls) + FIRST_RATE * size if known is None else known

    def learn(self, size: int, elapsed: float, calls: int) -> None:
        """A batch of so many bytes and calls took so long."""
        bits, each = size.bit_length(), elapsed / calls
        self.seconds[bits] = min(elapsed, PATIENCE * self.seconds.get(bits, elapsed))
        self.each = min(each, PATIENCE * (self.each or each))
        self.longest = min(elapsed, PATIENCE * (self.longest or elapsed))


class Batcher:
    """Queues and runs. Everything but `Batcher._process` happens in the event loop."""

    def __init__(
        self, engine: Engine, recorder: Recorder, most_waiting: int = MOST_WAITING, *, batching: bool = True
    ) -> None:
        """`batching` false: every request runs alone, to measure what batching brings."""
        self.engine, self.recorder, self.most_waiting, self.batching = engine, recorder, most_waiting, batching
        self.lanes: dict[str, Lane] = {}
        self._thread = ThreadPoolExecutor(1, "batch")
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, call: Call) -> None:
        """Queue a request; its `reply` is called exactly once, unless the client leaves first."""
        call.began = time.perf_counter()
        lane = self.lanes.get(call.workload)
        if lane is None:
            if call.workload not in self.engine.models:
                refusal = self.engine.refusal(call.workload)
                self.recorder.refused(call.workload, call.route, refusal.status)
                call.reply(refused(refusal))
                return
            lane = self.lanes[call.workload] = Lane(call.workload)
        busy = self.busy(call.workload, call.route)
        if busy is not None:
            call.reply(busy)
            return
        lane.queue.append(call)
        if not lane.scheduled:
            lane.scheduled = True
            self._here().call_soon(self._flush, lane)

    def busy(self, workload: str, route: str) -> Answer | None:
        """What a request hears at once where too many wait; None: it may be queued. Counts it."""
        lane = self.lanes.get(workload)
        if lane is None or (len(lane.queue) < self.most_waiting and not (lane.queue and lane.late())):
            return None
        self.recorder.refused(workload, route, 503, "queue_full")
        return lane.busy

    async def ask(self, call: Call) -> Answer:
        """Queue a request that was made with `reply` unset, and wait for its answer; cancelling drops it."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call.reply = lambda answer: None if future.done() else future.set_result(answer)
        self.submit(call)
        try:
            return await future
        finally:
            call.gone = True

    def _here(self) -> asyncio.AbstractEventLoop:
        """The running loop, found once: asyncio asks the system for the number of the process each time."""
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.get_running_loop()
        return self._loop

    def _flush(self, lane: Lane) -> None:
        """Run what waits: one batch in the loop, or in the thread when it is expected to take long."""
        model = self.engine.models[lane.workload]
        calls, size = self._take(lane, model)
        if lane.expected(size, model, len(calls)) <= INLINE_SECONDS:
            self._finish(lane, model, calls, self._process(lane, model, calls, size, late=True))
        else:
            work = self._here().run_in_executor(self._thread, self._process, lane, model, calls, size)
            work.add_done_callback(lambda future: self._finish(lane, model, calls, future.result()))

    def _take(self, lane: Lane, model: Model) -> tuple[list[Call], int]:
        """The next calls: no more than the model takes rows, for each has one at least."""
        calls: list[Call] = []
        size, most = 0, model.shared_rows if model.batched and self.batching else 1
        while lane.queue and len(calls) < most:
            call = lane.queue.popleft()
            if call.gone:
                continue
            calls.append(call)
            size += call.size
        return calls, size

    def _finish(self, lane: Lane, model: Model, calls: list[Call], runs: list[Run]) -> None:
        """Send the answers, when the log allows; then see to what has arrived meanwhile."""

        def send() -> None:
            _send(calls)
            self.recorder.answered(model, calls, runs, self._here())

        try:
            if calls:
                self.recorder.release(model, runs, send)
        except Exception:  # those that wait have done nothing wrong
            logger.exception("What %s answered is not counted, or not logged", lane.workload)
        if lane.queue:
            self._here().call_soon(self._flush, lane)
        else:
            lane.scheduled = False

    def _process(self, lane: Lane, model: Model, calls: list[Call], size: int, late: bool = False) -> list[Run]:
        """Run a batch of so many bytes and remember what it took."""
        began = time.perf_counter()
        runs = execute(model, calls, self.recorder, together=self.batching, late=late)
        if calls:  # a batch whose clients have all left tells nothing of what one takes
            lane.learn(size, time.perf_counter() - began, len(calls))
        return runs


def _send(calls: Sequence[Call]) -> None:
    for call in calls:
        if not call.gone and call.answer is not None:
            try:
                call.reply(call.answer)
            except Exception:  # the others have done nothing wrong
                logger.exception("An answer of %s cannot be sent", call.workload)
