"""One hot request on its connection, and the head of its answer. Not here: the connection (`serving.http`)."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from serving.forms import Kept
from serving.routes import Hot
from serving.wire import Answer

STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


SMALL_PIECE = 4096


class Nobody:
    """Stands where uvicorn keeps the event that wakes an ASGI application: nobody waits for a hot request's body."""

    def set(self) -> None:
        """Wake nobody."""


class Exchange:
    """One hot request and its answer. uvicorn's protocol takes it for one of its own request cycles."""

    __slots__ = (
        "began", "call", "disconnected", "headers", "held", "keep_alive", "key", "message_event", "pieces",
        "response_complete", "route", "size",
    )  # fmt: skip

    def __init__(self, route: Hot, keep_alive: bool) -> None:
        self.route, self.keep_alive = route, keep_alive
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes | bytearray] = []
        """Of the body."""
        self.call: Any = None
        self.key = ""
        self.began = 0.0
        self.size = self.held = 0
        """Bytes of the body, and how many of them count as held."""
        self.response_complete = False
        self.disconnected = False
        self.message_event = Nobody()

    def add(self, piece: bytes) -> None:
        """Take a piece of the body. Small ones are put together: by itself a piece of two bytes would take forty."""
        self.size += len(piece)
        self.held += len(piece)
        if not self.pieces or len(piece) >= SMALL_PIECE:
            self.pieces.append(piece)
        elif isinstance(last := self.pieces[-1], bytearray):
            last += piece
        else:
            self.pieces.append(bytearray(piece))

    def body(self) -> bytes:
        """The whole body; its pieces are let go, for one copy of a large body is enough."""
        pieces, self.pieces = self.pieces, []
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)


class Heads:
    """Heads of answers, but for their length; kept until the date in them changes."""

    def __init__(self) -> None:
        self._defaults: Any = None
        self._kept: Kept[tuple[object, ...], bytes] = Kept()

    def of(self, answer: Answer, keep: bool, defaults: list[tuple[bytes, bytes]]) -> bytes:
        """Status line and headers. `defaults` are uvicorn's, which replaces the list each second."""
        if defaults is not self._defaults:
            self._kept.clear()
            self._defaults = defaults
        key = (answer.status, keep, answer.content_type, answer.headers)
        head = self._kept.get(key) or self._kept.keep(key, _head(answer, keep, defaults))
        return b"%b%d\r\n\r\n" % (head, len(answer.body))


def _head(answer: Answer, keep: bool, defaults: list[tuple[bytes, bytes]]) -> bytes:
    more = _lines(defaults) + _lines(answer.headers) + (b"" if keep else b"connection: close\r\n")
    return b"%b%bcontent-type: %b\r\ncontent-length: " % (STATUS[answer.status], more, answer.content_type)


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
