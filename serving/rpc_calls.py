"""What the gRPC calls of a worker may hold, and for how long: the limits that HTTP's connections have, for its calls.

grpc shows a message only when it is whole, and not how much of one is there; so a message that takes its time counts as
the largest that there may be, and only so many of those may be on their way. A call that came too late is answered; one
whose answer is not taken ends with its connection, as grpc cannot end it by itself. Not here: what a call means
(`serving.rpc_handler`), how grpc's connections are closed (`serving.rpc_drain`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc.aio

from serving.holding import Held
from serving.limits import Limits
from serving.rpc_drain import hang_up
from serving.wire import Refusal

SWEEP_SECONDS = 0.1
PROMPT_SWEEPS = 2
"""A message that is not whole after so many is a slow one. Two, so that what waits for a busy loop is not taken for
what has not come."""
LET_GO_SECONDS = 1.0
"""Between two looks at answers that are not taken."""
ENDED_SECONDS = 1.0
"""How soon grpc says that a call without a message is none any more, where its client left or sent too much."""
BESIDE = 64
"""Calls that may be on their way beside those that wait for a model."""
COPIES = 2
"""Of an answer, until it is taken: grpc makes one, and keeps what it was made of."""
FULL = "The server holds too much already; try again in a second."

logger = logging.getLogger(__name__)


class Underway:
    """One call."""

    __slots__ = ("context", "held", "late", "placed", "since", "task")

    def __init__(self, context: Any) -> None:
        self.context = context
        self.task: Any = asyncio.current_task()
        """grpc's own, which lasts until the answer is taken."""
        self.held = 0
        """Bytes of its message, then of its answer's copies."""
        self.placed = False
        self.since = 0
        """The sweep before which it began to wait for its message, or for its answer to be taken."""
        self.late: tuple[int, str] | None = None
        """Why it is not waited for any more. No exception: that would keep the frame which keeps this."""


class Calls:
    """All of them. In the event loop only."""

    def __init__(self, limits: Limits, held: Held) -> None:
        """`held` is what HTTP's connections count in, too."""
        self.limits, self.held = limits, held
        self.places = limits.queue + BESIDE
        """Of calls that are not answered."""
        self.slow = max(1, limits.held_bytes // limits.body_bytes)
        """Slow messages that may be on their way at a time."""
        self.unsent = 0
        """Bytes of answers that are not taken."""
        self._placed = self._sweeps = 0
        self._reading: dict[Underway, None] = {}
        self._unread: dict[Underway, None] = {}

    def begin(self, call: Underway) -> None:
        """A call is here."""
        call.task.add_done_callback(lambda _: self._end(call))

    def place(self, call: Underway) -> None:
        """Give it one of the places, until it is answered. Raises Refusal 503 where there is none."""
        if self._placed >= self.places:
            raise Refusal(503, "The server has too many calls under way; try again in a second.")
        self._placed += 1
        call.placed = True

    async def read(self, call: Underway) -> bytes:
        """The message. Raises Refusal: 408 it takes too long, 503 there is too much, 400 there is none."""
        call.since = self._sweeps
        self._reading[call] = None
        try:
            message = await call.context.read()
        except asyncio.CancelledError:
            if call.late is None:
                raise
            raise Refusal(*call.late) from None
        finally:
            del self._reading[call]
        if message is grpc.aio.EOF:
            await asyncio.sleep(ENDED_SECONDS)  # cancelled meanwhile, unless the client said that nothing comes
            raise Refusal(400, "The call has no message.")
        call.held = len(message)
        self.held.size += call.held
        if self.held.size > self.limits.held_bytes:
            raise Refusal(503, FULL)
        found: bytes = message
        return found

    def check(self, size: int) -> None:
        """Whether an answer of so many bytes may go out. Raises Refusal 503 where too much is not taken yet."""
        if self.unsent and self.unsent + size * COPIES > self.limits.held_bytes:
            raise Refusal(503, FULL)

    def answered(self, call: Underway, size: int) -> None:
        """Its answer goes out; its message is let go."""
        copies = size * COPIES
        self.held.size += copies - call.held
        self.unsent += copies
        call.held, call.since = copies, self._sweeps
        self._unread[call] = None
        self._leave(call)

    def _end(self, call: Underway) -> None:
        self.held.size -= call.held
        if call in self._unread:
            self.unsent -= call.held
            del self._unread[call]
        self._leave(call)

    def _leave(self, call: Underway) -> None:
        self._placed -= call.placed
        call.placed = False

    async def watch(self) -> None:
        """Look at every message that is on its way, again and again; runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._sweep()

    async def let_go(self, port: int) -> None:
        """End connections whose client does not take an answer; runs until it is cancelled."""
        most = self.limits.idle_seconds / SWEEP_SECONDS
        while True:
            await asyncio.sleep(LET_GO_SECONDS)
            peers = {call.context.peer() for call in self._unread if self._sweeps - call.since > most}
            if peers:
                try:
                    await asyncio.to_thread(hang_up, port, peers)
                except OSError:
                    logger.exception("Clients of gRPC that take no answer cannot be let go")

    def _sweep(self) -> None:
        self._sweeps += 1
        limits, slow = self.limits, 0
        for call in self._reading:  # in the order in which they came
            waited = self._sweeps - call.since
            if waited <= PROMPT_SWEEPS or call.late is not None:
                continue
            slow += 1
            if waited * SWEEP_SECONDS > limits.body_seconds:
                call.late = 408, f"The message did not arrive within {limits.body_seconds:g} s."
            elif slow > self.slow:
                call.late = 503, "Too many messages are slow in arriving; try again in a second."
            else:
                continue
            call.task.cancel()
