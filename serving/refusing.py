"""What is no request is refused behind the answers that are still to come, and its connection is let go of.

A client that sends several requests at once would take a refusal that overtakes an answer for that answer. Not here:
what is refused, and when (`serving.http`).
"""

from __future__ import annotations

import time

from serving.audit import Access, AccessLog
from serving.exchange import Exchange, Heads
from serving.parsing import Parsing
from serving.routes import NOWHERE
from serving.service import Service
from serving.wire import Answer, Refusal, refused

SPLIT_BYTES = 64 * 1024
"""A larger answer is written after its head instead of being copied behind it."""


class Refusing(Parsing):
    """One connection."""

    service: Service
    """Set on a subclass."""
    heads = Heads()
    address: str
    notes: AccessLog | None
    since: float
    """When `reading` began."""
    exchange: Exchange | None
    refusal: tuple[Refusal, str] | None = None
    """What is still to be said before the connection is let go of, and the reason to count it by."""

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser does not take for HTTP."""
        self.refuse(Refusal(400, msg))

    def refuse(self, refusal: Refusal, reason: str = "") -> None:
        """Read nothing more; answer this once those before it are answered, and let go of the connection."""
        if self.reading == "nothing" or self.transport.is_closing():
            return
        cycle, is_its_own = self.cycle, self.reading == "body"
        waits = cycle is not None and not cycle.response_complete
        self.refusal = None if is_its_own and not waits else (refusal, reason)
        if is_its_own and self.pipeline:
            self.pipeline.popleft()
            self.cycle = None  # type: ignore[assignment]  # they would hold each other, and its body
        elif is_its_own and waits:
            waits = False
            cycle.disconnected = True  # else the application would answer, too
            cycle.message_event.set()
        self.reading = "nothing"
        if not waits:
            self.let_go()

    def let_go(self) -> None:
        """Closing at once would reset a connection on which more is under way, and the client would not read why."""
        if self.refusal is not None:
            refusal, reason = self.refusal
            answer = refused(refusal)
            self.write(answer, keep=False)
            self._note_refused(answer.status, len(answer.body), reason)
        self.refusal = None
        self.since = self.loop.time()
        self.transport.write_eof()

    def write(self, answer: Answer, keep: bool) -> None:
        """Send an answer."""
        head = self.heads.of(answer, keep, self.server_state.default_headers)
        if len(answer.body) <= SPLIT_BYTES:
            self.transport.write(head + answer.body)
        else:
            self.transport.write(head)
            self.transport.write(answer.body)

    def _note_refused(self, status: int, sent: int, reason: str) -> None:
        """A line for what never became a whole request: without a path, as long as that is not known whole."""
        exchange = None if self.exchange is None or self.exchange.response_complete else self.exchange
        key, method, at = (exchange.key, "POST", exchange.route) if exchange else ("", "", NOWHERE)
        self.service.metrics.turned_away(at.name, at.workload, status, reason)
        if self.notes is not None:
            self.notes.add(Access(time.time(), "", self.address, key, method, at.path, status, 0, sent, 0.0, 0, None))
