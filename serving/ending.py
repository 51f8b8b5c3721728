"""A process that ended by itself: how, in words, and how long until it is started again."""

from __future__ import annotations

import signal

SHORTEST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds; the wait doubles while ends come soon after one another."""
STEADY_SECONDS = 60
"""Having lived so long it ended for another reason than last time."""


def how(code: int) -> str:
    """What comes after "the process", of its exit code as `subprocess` gives it."""
    return f"was ended by {_signal(-code)}" if code < 0 else f"ended with code {code}"


class Wait:
    """Until the next start."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def after(self, lived: float) -> float:
        """Seconds to wait, of a process that lived so many."""
        steady = lived > STEADY_SECONDS
        self._seconds = SHORTEST_WAIT if steady else min(LONGEST_WAIT, max(SHORTEST_WAIT, self._seconds * 2))
        return self._seconds


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of those for real time only the first and the last have names
        return f"signal {number}"
