"""Lines of the server's log that anybody can cause: once in a while, with a count, or they would fill the disk.

Not here: the access log and the audit log, which have bounds of their own (`serving.audit`).
"""

from __future__ import annotations

import time

SECONDS = 10.0


class Seldom:
    """When a line about something may be written again. Topics are few: the caller sees to that."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._kept: dict[str, int] = {}

    def due(self, topic: str = "") -> int | None:
        """How many lines were kept back since the last one, where it is time for another; None: keep this one back."""
        now = time.monotonic()
        if now < self._next.get(topic, 0.0):
            self._kept[topic] = self._kept.get(topic, 0) + 1
            return None
        self._next[topic] = now + SECONDS
        return self._kept.pop(topic, 0)
