"""The hot routes, inside uvicorn's own protocol class: a request that is whole goes to the batcher without ASGI.

uvicorn goes on parsing HTTP, keeping connections, and running everything else through the ASGI application; a request
that arrives while an earlier one of its connection is not answered (pipelining) goes that way, too, so answers keep
their order. Added here is what uvicorn does not limit: the size of headers and bodies, the time that both may take,
idle connections, and their number. Not here: what an answer is (`serving.service`).
"""

from __future__ import annotations

import asyncio
import time

from serving.audit import Access, AccessLog
from serving.connections import LAST_WORDS_SECONDS
from serving.exchange import Exchange
from serving.holding import Held, Holds
from serving.refusing import Refusing
from serving.routes import hot_url
from serving.service import WANTED, Request, Service, too_large
from serving.wire import RETRY, Answer, Refusal, refused

FULL = Refusal(503, "The server holds too much already; try again in a second.", RETRY)


class Protocol(Refusing):
    """One connection."""

    held: Held
    """Set on a subclass that `protocol` makes, as `service` is."""
    patience: float
    """Seconds after which any of the limits on time may be reached. Set there, too."""
    draining = False

    # Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.limits = self.service.limits
        self.notes = self.service.guard.access_log if self.service.guard else None
        self.address = self.client[0] if self.client else ""
        self.since = self.loop.time()
        self.reading = "headers"
        """What is waited for: headers (of a request that has begun, or of the first), body, answer, next (idle), or
        nothing any more."""
        self.header_size = 0
        self.exchange: Exchange | None = None
        self.holds = Holds(self.held)
        if len(self.connections) > self.limits.connections:
            refusal = Refusal(503, f"There are {self.limits.connections} connections; try again in a second.")
            self.refuse(refusal, "connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left: what it asked for is dropped from its batch."""
        exchange = self.exchange
        self.holds.end()
        if exchange is not None:
            self._release(exchange)
            if exchange.call is not None:
                exchange.call.gone = True
                exchange.call = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The worker ends: finish what is asked, let go of the connection with the next answer or when it stays
        idle."""
        self.draining = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def sweep(self, now: float) -> None:
        """Let go of a connection that takes too long."""
        waited, limits = now - self.since, self.limits
        unsent = self.transport.get_write_buffer_size()
        if (unsent or self.holds.unsent) and self.holds.unread(unsent, now) > limits.idle_seconds:
            self.transport.abort()  # closing would wait until everything is read
        if waited <= self.patience or self.transport.is_closing():
            return
        if self.reading == "headers" and waited > limits.header_seconds:
            self.refuse(Refusal(408, f"The headers did not arrive within {limits.header_seconds:g} s."))
        elif self.reading == "body" and not self.pipeline and waited > limits.body_seconds:
            self.refuse(Refusal(408, f"The body did not arrive within {limits.body_seconds:g} s."))
        elif self.reading == "nothing" and self.refusal is None and waited > LAST_WORDS_SECONDS:
            self.transport.abort()
        elif self.reading == "next" and waited > (LAST_WORDS_SECONDS if self.draining else limits.idle_seconds):
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read its answers: its next requests wait, too."""
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self.flow.resume_reading()

    # Parser callbacks

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        if self.reading == "nothing":
            return
        self.header_size += len(data)
        self.large_read = len(data) > self.limits.header_bytes
        super().data_received(data)
        # Counted from the request's start, and from each piece of its body: trailers and chunk extensions are headers.
        if self.header_size > self.limits.header_bytes and self.reading in ("headers", "body"):
            self.refuse(Refusal(431, f"The headers are larger than {self.limits.header_bytes} bytes."))

    def on_message_begin(self) -> None:
        """A request begins. What uvicorn prepares for ASGI is left until it is known to go there."""
        if self.reading == "nothing":
            return
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self.exchange = None
        self.reading = "headers"
        self.header_size = 0
        self.since = self.loop.time()

    def on_headers_complete(self) -> None:
        """The hot routes part from the others."""
        if self.reading == "nothing":
            return
        self.upgrading = self.parser.should_upgrade()
        if self.upgrading:
            return
        if twice := self.twice():
            self.refuse(Refusal(400, f"The header {twice} stands there twice; send it once."))
            return
        if self.large_read and self.header_bytes() > self.limits.header_bytes:
            self.refuse(Refusal(431, f"The headers are larger than {self.limits.header_bytes} bytes."))
            return
        cycle = self.cycle
        free = cycle is None or cycle.response_complete
        route = hot_url(self.url) if free and self.parser.get_method() == b"POST" else None
        if route is None:
            self._to_asgi()
            return
        keep = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive() and not self.draining
        self.cycle = self.exchange = exchange = Exchange(route, keep)  # type: ignore[assignment]
        self.reading = "body"
        for name, value in self.headers:
            if name in WANTED:
                exchange.headers[name] = value
            elif name == b"content-length" and int(value) > self.limits.body_bytes:
                self._turn_away(exchange, too_large(self.limits))
                return
        if self.service.guard is not None:
            try:
                exchange.key = self.service.admit("POST", route.path, exchange.headers, self.address)
            except Refusal as refusal:
                self._turn_away(exchange, refusal)
                return
        busy = self.service.batcher.busy(route.workload, route.name) if route.name != "feedback" else None
        if busy is not None:  # there is no need to wait for the body
            self._answer(exchange, busy)
            return
        if self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self.header_size = 0
        exchange = self.exchange
        if self.reading == "nothing":
            return
        if exchange is None:
            if not self.cycle.response_complete and self.holds.take(len(body)) > self.limits.held_bytes:
                self.refuse(FULL, "shedding")
                return
            super().on_body(body)
        elif not exchange.response_complete:
            exchange.add(body)
            self.held.size += len(body)
            if exchange.size > self.limits.body_bytes:
                self._turn_away(exchange, too_large(self.limits))
            elif self.held.size > self.limits.held_bytes:
                self._turn_away(exchange, FULL, "shedding")

    def on_message_complete(self) -> None:
        """The request is whole."""
        exchange = self.exchange
        if self.reading == "nothing" or self.upgrading:
            return
        self.reading = "answer"
        if self.cycle.response_complete:  # before its body had arrived
            self._rest()
        elif exchange is None:
            super().on_message_complete()
        else:
            exchange.began = time.perf_counter()
            route = exchange.route
            request = Request(route.name, route.workload, exchange.body(), exchange.headers, route.version)
            call = self.service.accept(request, lambda answer: self._answer(exchange, answer))
            if not exchange.response_complete:  # else they would hold each other for ever
                exchange.call = call

    def on_response_complete(self) -> None:
        """An ASGI answer has been sent."""
        self.holds.release()
        self._rest()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `sweep` sees to idle connections

    # Answers

    def _to_asgi(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()
        self.reading = "body"
        if self.draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def _release(self, exchange: Exchange) -> None:
        self.held.size -= exchange.held
        exchange.held, exchange.pieces = 0, []

    def _answer(self, exchange: Exchange, answer: Answer) -> None:
        self._release(exchange)
        exchange.call = None  # it holds what answers this exchange: a circle that only the collector would undo
        if exchange.disconnected or exchange.response_complete or self.transport.is_closing():
            return
        exchange.response_complete = True
        keep = exchange.keep_alive
        self.write(answer, keep)
        if self.notes is not None:
            self._note(self.notes, exchange, answer)
        self.server_state.total_requests += 1
        if not keep:
            self.transport.close()
            return
        self._rest()
        if self.pipeline:
            self.flow.resume_reading()
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def _turn_away(self, exchange: Exchange, refusal: Refusal, reason: str = "") -> None:
        self.service.metrics.turned_away(exchange.route.name, exchange.route.workload, refusal.status, reason)
        self._answer(exchange, refused(refusal))

    def _rest(self) -> None:
        """An answer has left; whatever is waited for now has all its time."""
        self.since = self.loop.time()
        if self.pipeline:
            return
        if self.reading == "answer":
            self.reading = "next"
        elif self.reading == "nothing" and not self.transport.is_closing():
            self.let_go()

    def _note(self, access_log: AccessLog, exchange: Exchange, answer: Answer) -> None:
        model, now = self.service.engine.models.get(exchange.route.workload), time.time()
        began = exchange.began or time.perf_counter()
        access_log.add(Access(
            now, exchange.headers.get(b"x-request-id", b"").decode("latin-1"), self.address, exchange.key, "POST",
            exchange.route.path, answer.status, exchange.size, len(answer.body),
            (time.perf_counter() - began) * 1000, answer.rows, model.version if model else None,
        ))  # fmt: skip


def protocol(service: Service) -> type[Protocol]:
    """The protocol class of a worker's connections."""
    limits = service.limits
    patience = min(limits.header_seconds, limits.body_seconds, limits.idle_seconds, LAST_WORDS_SECONDS)
    return type("Connection", (Protocol,), {"service": service, "held": Held(), "patience": patience})
