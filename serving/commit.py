"""Group commit: answers that must outlive a power cut wait for one sync together, and those that arrive meanwhile for
the next. Belongs to one event loop. Not here: what is written (`serving.capture`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serving.capture import Log

Release = Callable[[bool], None]
"""Called once, in the event loop: whether what it waited for is on the disk."""

logger = logging.getLogger(__name__)


class GroupCommit:
    """Syncs the log while somebody waits for it."""

    def __init__(self, log: Log, synced: Callable[[float], None]) -> None:
        """`synced` is told how many seconds each sync took."""
        self.log, self.synced = log, synced
        self._waiting: list[tuple[Release, int]] = []
        self._busy = False
        self._thread = ThreadPoolExecutor(1, "sync")

    def after(self, release: Release, since: int) -> None:
        """Call `release` once everything that was written until now was synced. `since`: what the log's `failures` were
        before that was written, for its sync may have failed already."""
        self._waiting.append((release, since))
        if not self._busy:
            self._start()

    def _start(self) -> None:
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._sync)
        self._busy = True
        released, self._waiting = self._waiting, []
        done.add_done_callback(lambda done: self._finish(released, done.exception()))

    def _sync(self) -> None:
        began = time.perf_counter()
        self.log.sync()
        self.synced(time.perf_counter() - began)

    def _finish(self, released: list[tuple[Release, int]], fault: BaseException | None) -> None:
        self._busy, failures = False, self.log.failures
        if self._waiting:
            self._start()
        if fault is not None:
            logger.error("The prediction log cannot be synced", exc_info=fault)
        for release, since in released:
            try:
                release(fault is None and failures == since)
            except Exception:  # the others have done nothing wrong
                logger.exception("An answer that waited for the disk cannot be sent")
