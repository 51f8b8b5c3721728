"""One hot request on its connection, and the head of its answer. Not here: the connection (`serving.http`)."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from serving.routes import Hot
from serving.wire import Answer

JSON = b"application/json"
STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Nobody:
    """Stands where uvicorn keeps the event that wakes an ASGI application: nobody waits for a hot request's body."""

    def set(self) -> None:
        """Wake nobody."""


class Held:
    """The bodies that a worker holds: begun and not answered."""

    size = 0
    """Bytes."""


class Exchange:
    """One hot request and its answer. uvicorn's protocol takes it for one of its own request cycles."""

    __slots__ = (
        "began", "call", "disconnected", "headers", "held", "keep_alive", "key", "message_event", "pieces",
        "response_complete", "route", "size",
    )  # fmt: skip

    def __init__(self, route: Hot, keep_alive: bool) -> None:
        self.route, self.keep_alive = route, keep_alive
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        """Of the body."""
        self.call: Any = None
        self.key = ""
        self.began = 0.0
        self.size = self.held = 0
        """Bytes of the body, and how many of them count as held."""
        self.response_complete = False
        self.disconnected = False
        self.message_event = Nobody()


class Heads:
    """Heads of answers; the usual one and that of the last refusal are kept as bytes until the date in it changes."""

    def __init__(self) -> None:
        self._defaults: Any = None
        self._usual = b""
        self._last: tuple[Any, Answer, bool] | None = None
        self._last_head = b""

    def of(self, answer: Answer, keep: bool, defaults: list[tuple[bytes, bytes]]) -> bytes:
        """Status line and headers. `defaults` are uvicorn's, which replaces the list each second."""
        size = str(len(answer.body)).encode()
        if answer.status == 200 and keep and not answer.headers and answer.content_type == JSON:
            if defaults is not self._defaults:
                self._usual = b"%b%bcontent-type: %b\r\ncontent-length: " % (STATUS[200], _lines(defaults), JSON)
                self._defaults = defaults
            return b"%b%b\r\n\r\n" % (self._usual, size)
        made = (defaults, answer, keep)
        if self._last is not None and all(map(operator.is_, self._last, made)):
            return self._last_head  # a server with too much to do refuses with the same answer again and again
        more = _lines(defaults) + _lines(answer.headers) + (b"" if keep else b"connection: close\r\n")
        head = b"%bcontent-type: %b\r\n%bcontent-length: %b\r\n\r\n" % (
            STATUS[answer.status], answer.content_type, more, size,
        )  # fmt: skip
        if answer.error:
            self._last, self._last_head = made, head
        return head


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
