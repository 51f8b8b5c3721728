"""Peak memory of a whole family of processes, sampled in a thread. Linux counts shared pages once (PSS)."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil


class PeakMemory(threading.Thread):
    """Samples every `interval` seconds from `start()` to `stop()`; `peak` is in bytes."""

    def __init__(self, roots: list[int], interval: float = 2.0) -> None:
        super().__init__(name="peak-memory", daemon=True)
        self.roots, self.interval, self.peak = roots, interval, 0
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._done.is_set():
            self.peak = max(self.peak, family_bytes(self.roots))
            self._done.wait(self.interval)

    def stop(self) -> int:
        """End the sampling; returns the peak."""
        self._done.set()
        self.join()
        return self.peak


def family_bytes(roots: list[int]) -> int:
    """Memory of these processes and all their descendants, in bytes; those that end meanwhile are left out."""
    pids = set(roots)
    for root in roots:
        try:
            pids |= {child.pid for child in psutil.Process(root).children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return sum(_bytes(pid) for pid in pids)


def _bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    try:
        for line in rollup.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
