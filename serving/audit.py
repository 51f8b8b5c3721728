"""Two logs as JSON lines: what was answered (off by default), and who changed or was refused what (always on).

The *access log* takes one line a request: the request only puts a tuple on a queue, `flush` writes from beside the
event loop, and what does not fit the queue is counted. The *audit log* is written at once, because it is rare:
operators' actions always, refusals of access as long as they do not flood it. Neither has a body, a query or a key in
it. Not here: the prediction log (`serving.capture`), and the files (`serving.jsonlines`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from serving.buckets import Buckets, source_of
from serving.jsonlines import JsonLines

MOST_BYTES = 64 * 2**20
KEPT = 5
MOST_WAITING = 50_000
"""Access lines that wait for the next flush; about 20 MB."""
LINES_A_WRITE = 1_000
AUDIT_BYTES = 16 * 2**20
AUDIT_KEPT = 16
REFUSALS_A_SECOND = 5.0
"""Of refused access that are written, all clients together; the rest is counted."""
REFUSALS_OF_ONE = 0.2
"""And of one client."""
REFUSALS_BURST = 60.0
"""So many seconds' worth may be written at once: 300 in all, 12 of one client."""
LONGEST = 200
"""Characters of what a client chose that a line holds."""

logger = logging.getLogger(__name__)


class Access(NamedTuple):
    """One answered request."""

    at: float
    """When the answer was made, seconds since 1970."""
    request: str
    """The request's id."""
    client: str
    """Its address."""
    key: str
    """The key's name; empty where keys are off."""
    method: str
    path: str
    """Without the query."""
    status: int
    received: int
    """Bytes of the body as it arrived."""
    sent: int
    """Bytes of the answer's body."""
    ms: float
    """From the whole request to the answer."""
    rows: int
    version: int | None
    """Which version answered; None where no model was asked."""


class AccessLog:
    """The access log of one worker."""

    def __init__(self, path: str | Path, *, most_bytes: int = MOST_BYTES, most_waiting: int = MOST_WAITING) -> None:
        """`path`: `-` is standard output."""
        self.dropped = 0
        """Lines that found the queue full, or could not be written."""
        self._file = JsonLines(path, most_bytes, KEPT)
        self._waiting: deque[Access] = deque()
        self._most = most_waiting

    def add(self, line: Access) -> None:
        """Put a line on the queue; costs less than half a microsecond."""
        if len(self._waiting) < self._most:
            self._waiting.append(line)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Write what waits; call it from a thread, every half second and at the end. A full disk drops lines only."""
        left = len(self._waiting)
        while left > 0:
            lines = [self._waiting.popleft() for _ in range(min(left, LINES_A_WRITE))]
            left -= len(lines)
            try:
                self._file.write(b"".join(_line(_access(line)) for line in lines))
            except OSError as error:
                if not self.dropped:
                    logger.error("The access log cannot be written (%s); its lines are dropped.", error.strerror)
                self.dropped += len(lines)

    def close(self) -> None:
        """Write what waits and let go of the file."""
        self.flush()
        self._file.close()


class Audit:
    """The audit log of one process; `audit.jsonl` in the home, shared by all of them."""

    def __init__(self, path: Path, *, most_bytes: int = AUDIT_BYTES) -> None:
        self.suppressed = 0
        """Refusals that were not written since the last one that was."""
        self._file = JsonLines(path, most_bytes, AUDIT_KEPT)
        self._clients = Buckets(burst=REFUSALS_BURST)
        self._all = Buckets(burst=REFUSALS_BURST)

    def acted(self, action: str, key: str, client: str, **facts: Any) -> None:
        """An operator did something, such as loading a model or adding a key."""
        self._write({"event": "action", "action": action, "key": key, "client": client, **facts})

    def refused(self, status: int, client: str, method: str, path: str, key: str = "") -> None:
        """Somebody was refused access (401, 403, 421, 429). Floods are counted, not written."""
        now = time.monotonic()
        if self._clients.take(source_of(client), REFUSALS_OF_ONE, now) or self._all.take("", REFUSALS_A_SECOND, now):
            self.suppressed += 1
            return
        line = {"event": "refused", "status": status, "key": key, "client": client, "method": method, "path": path}
        if self.suppressed:
            line["suppressed"], self.suppressed = self.suppressed, 0
        self._write(line)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(_line({"time": _stamp(time.time()), **line}))
        except OSError as error:
            # Going on unseen is the lesser harm: the server would stop answering because a disk is full.
            logger.error("The audit log cannot be written (%s): %s", error.strerror, line.get("action", "refused"))


def _access(line: Access) -> dict[str, Any]:
    return {"time": _stamp(line.at), **line._asdict()}


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _line(content: dict[str, Any]) -> bytes:
    content.pop("at", None)
    # A lone surrogate cannot be written as UTF-8, and a path is what a client chose.
    whole = {
        name: value[:LONGEST].encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in content.items()
    }
    return orjson.dumps(whole, default=str, option=orjson.OPT_APPEND_NEWLINE)
