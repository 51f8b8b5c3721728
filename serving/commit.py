"""Group commit: answers that must outlive a power cut wait for one sync together, and those that arrive meanwhile for
the next. Belongs to one event loop. Not here: what is written (`serving.capture`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serving.capture import Log


class GroupCommit:
    """Syncs the log while somebody waits for it."""

    def __init__(self, log: Log, synced: Callable[[float], None]) -> None:
        """`synced` is told how many seconds each sync took."""
        self.log, self.synced = log, synced
        self._waiting: list[Callable[[], None]] = []
        self._busy = False
        self._thread = ThreadPoolExecutor(1, "sync")

    def after(self, release: Callable[[], None]) -> None:
        """Call `release` in the event loop once everything that was written until now is on the disk."""
        self._waiting.append(release)
        if not self._busy:
            self._start()

    def _start(self) -> None:
        self._busy = True
        released, self._waiting = self._waiting, []
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._sync)
        done.add_done_callback(lambda _: self._finish(released))

    def _sync(self) -> None:
        began = time.perf_counter()
        self.log.sync()
        self.synced(time.perf_counter() - began)

    def _finish(self, released: list[Callable[[], None]]) -> None:
        self._busy = False
        if self._waiting:
            self._start()
        for release in released:
            release()
