"""One drain a node: of the replicas that log into a folder, one moves everybody's segments into the lake, and adds up
the numbers of those that ended.

It holds the folder's lock, which ends with its process; then another one takes over, and adopts what the dead one left
open. Not here: how a segment goes into the lake exactly once (`serving.drain`).
"""

from __future__ import annotations

import fcntl
import threading
import time
from contextlib import suppress
from pathlib import Path

from serving.attendance import retire_ended
from serving.drain import Drain


class NodeDrain:
    """Moves a node's log into the lake. Each replica has one; whoever holds the folder's lock works, for all."""

    def __init__(self, node: Path, lake: str) -> None:
        self.folder, self.lake = node / "log", lake
        self._numbers = node / "metrics"
        self._drain: Drain | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "drain.lock").open("w")
        self._stepping = threading.Lock()
        """A task that is cancelled leaves its step running in a thread, and `finish` comes beside it."""

    def step(self) -> bool:
        """Drain once, unless another replica of this node does; returns whether it was this one's to do."""
        with self._stepping:
            if self._lock.closed or (self._drain is None and not self._take_over()):
                return False
            assert self._drain is not None
            self._drain.step()
            with suppress(OSError):  # a full disk: they stay the files that they are
                retire_ended(self._numbers)
            return True

    def finish(self, seconds: float) -> None:
        """The last time: also what this replica handed over just now, when nobody else lives to drain it."""
        deadline = time.monotonic() + seconds
        while not self.step():
            if time.monotonic() > deadline or not any((self.folder / "ready").iterdir()):
                break  # empty, or another replica is at it
            time.sleep(0.1)
        with self._stepping:
            self._lock.close()

    def _take_over(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._drain = Drain(self.folder, self.lake)
        return True
