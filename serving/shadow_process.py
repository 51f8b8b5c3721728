"""Keeps the shadow's process alive while there is something to shadow, and ends it when it is stuck.

Not here: what it does (`serving.shadow`), which challengers it is asked for (`serving.shadowing`).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import psutil

from noria.variables import child_environment
from serving.ending import Wait, how

STUCK_CPU_SECONDS, STUCK_SECONDS = 120.0, 900.0
"""Without a sign of life for so long it is ended. Counted in processor time first: it runs only when others do not."""
END_SECONDS = 5

logger = logging.getLogger(__name__)


class Process:
    """The one shadow process of a home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._retry_at = 0.0
        self._wait = Wait()
        self._sign: tuple[int, float, float] = (0, 0.0, 0.0)
        """Last sign of life; processor time and clock when it was first seen."""

    def keep(self) -> str:
        """Start it if it does not run, end it if it is stuck; returns how it ended by itself, or ""."""
        if self._process is None:
            if time.monotonic() >= self._retry_at:
                self._start()
            return ""
        if self._process.poll() is None:
            self._check_life(self._process)
            return ""
        return self._ended(self._process.returncode)

    def stop(self) -> None:
        """End it: what it is scoring stays for the next one."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.shadow", "--folder", str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=child_environment(PYTHONPATH=":".join(path for path in sys.path if path)),
        )
        self._started = time.monotonic()
        self._sign = (-1, 0.0, self._started)

    def _ended(self, code: int) -> str:
        wait = self._wait.after(time.monotonic() - self._started)
        self._retry_at = time.monotonic() + wait
        self._close()
        logger.error("The shadow's process %s; it is started again in %.1f s.", how(code), wait)
        return how(code)

    def _check_life(self, process: subprocess.Popen[bytes]) -> None:
        try:
            times = psutil.Process(process.pid).cpu_times()
            mark = (self.folder / "shadow" / "alive").stat().st_mtime_ns
        except (psutil.NoSuchProcess, FileNotFoundError):
            return
        spent, clock = times.user + times.system, time.monotonic()
        if mark != self._sign[0]:
            self._sign = (mark, spent, clock)
        elif spent - self._sign[1] > STUCK_CPU_SECONDS or clock - self._sign[2] > STUCK_SECONDS:
            logger.error("The shadow's process is stuck; killing it.")
            process.kill()

    def _close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None
