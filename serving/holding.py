"""What a worker's connections hold: bodies that are not answered, and answers that are not read.

Not here: gRPC's calls (`serving.rpc_calls`), what happens where it is too much (`serving.http`).
"""

from __future__ import annotations


class Held:
    """All of it, HTTP's and gRPC's."""

    size = 0
    """Bytes."""


class Holds:
    """One connection's share, but for the bodies of hot requests (`serving.exchange`)."""

    __slots__ = ("aside", "held", "unread_since", "unsent")

    def __init__(self, held: Held) -> None:
        self.held = held
        self.aside = 0
        """Bytes of bodies that are on their way to the ASGI application."""
        self.unsent = 0
        """Bytes of answers that the client had not taken at the last look."""
        self.unread_since = 0.0

    def take(self, size: int) -> int:
        """Count a piece of a body for the ASGI application; returns what all connections hold."""
        self.aside += size
        self.held.size += size
        return self.held.size

    def release(self) -> None:
        """The ASGI application has answered."""
        self.held.size -= self.aside
        self.aside = 0

    def unread(self, unsent: int, now: float) -> float:
        """Take in how many bytes the client has still to take; returns for how many seconds it took none."""
        if not unsent or unsent < self.unsent or not self.unsent:
            self.unread_since = now
        self.held.size += unsent - self.unsent
        self.unsent = unsent
        return now - self.unread_since

    def end(self) -> None:
        """The connection is gone."""
        self.release()
        self.unread(0, 0.0)
