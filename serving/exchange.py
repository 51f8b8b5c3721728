"""One hot request on its connection, and the head of its answer. Not here: the connection (`serving.http`)."""

from __future__ import annotations

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


class Exchange:
    """One hot request and its answer. uvicorn's protocol takes it for one of its own request cycles."""

    __slots__ = (
        "began", "call", "disconnected", "headers", "keep_alive", "key", "message_event", "pieces",
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
        self.size = 0
        self.response_complete = False
        self.disconnected = False
        self.message_event = Nobody()


class Heads:
    """Heads of answers; the usual one is kept as bytes until the date in it changes."""

    def __init__(self) -> None:
        self._defaults: Any = None
        self._usual = b""

    def of(self, answer: Answer, keep: bool, defaults: list[tuple[bytes, bytes]]) -> bytes:
        """Status line and headers. `defaults` are uvicorn's, which replaces the list each second."""
        size = str(len(answer.body)).encode()
        if answer.status == 200 and keep and not answer.headers and answer.content_type == JSON:
            if defaults is not self._defaults:
                self._usual = b"%b%bcontent-type: %b\r\ncontent-length: " % (STATUS[200], _lines(defaults), JSON)
                self._defaults = defaults
            return b"%b%b\r\n\r\n" % (self._usual, size)
        more = _lines(defaults) + _lines(answer.headers) + (b"" if keep else b"connection: close\r\n")
        return b"%bcontent-type: %b\r\n%bcontent-length: %b\r\n\r\n" % (
            STATUS[answer.status], answer.content_type, more, size,
        )  # fmt: skip


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
