"""Keeps the server's slow half (`serving.background`) alive in a process of its own, and ends it last.

What it imports (Delta Lake, MLflow) takes longer than all that a first answer needs, and what may end it, a crash in a
library or memory that runs out, must not end the process that holds the socket and watches the workers. Not here: what
it does.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from contextlib import suppress

from noria.settings import Settings
from noria.variables import child_environment, variables
from serving.ending import Wait, how
from serving.repeat import repeat
from serving.supervise import search_path

FIRST_SECONDS = 10.0
"""How long the first workers may have the machine for themselves: one that cannot load must not keep the rest away."""
LOOK_SECONDS = 0.1
ALLOCATOR = {"_RJEM_MALLOC_CONF": "narenas:1,dirty_decay_ms:200,muzzy_decay_ms:0"}
"""Of the jemalloc in deltalake, which would keep what each of its threads once needed: 40 MB after 200 appends. Not
touched where it is set already."""

logger = logging.getLogger(__name__)


class Background:
    """The process, and the thread that starts it again when it ends by itself."""

    def __init__(self, settings: Settings, mlflow_url: str, stop: threading.Event) -> None:
        """It follows the aliases until `stop` is set, and moves the log until `finish`."""
        self.settings, self.mlflow_url, self.stop = settings, mlflow_url, stop
        self.ended = threading.Event()
        """Set when no worker writes any more."""
        self.may_start = threading.Event()
        """Set when the first workers answer, or have nothing to load: they may have one core together with it."""
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._told: list[bytes] = []
        self._started = self._start_at = 0.0
        self._wait = Wait()
        self._thread = threading.Thread(target=self._run, name="background")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> None:
        """The workers have ended: have what they wrote brought into the lake, and return."""
        self.may_start.set()
        self.ended.set()
        self._thread.join()

    def _run(self) -> None:
        self.may_start.wait(FIRST_SECONDS)
        repeat(self._keep, None, self._over)

    def _keep(self) -> float:
        """Look once; returns the seconds until the next look. Raises OSError where it cannot be started."""
        if self._process is None and (time.monotonic() >= self._start_at or self.ended.is_set()):
            try:
                self._process = self._start()
            except OSError:
                if self.ended.is_set():
                    self._over.set()
                raise
        if self._process is not None:
            self._tell(self._process)
            if (code := self._process.poll()) is not None:
                self._ended(self._process, code)
        return LOOK_SECONDS

    def _start(self) -> subprocess.Popen[bytes]:
        allocator = {name: value for name, value in ALLOCATOR.items() if not variables(name)}
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.background"],
            stdin=subprocess.PIPE,
            process_group=0,  # not a session of its own: niceness would not count between it and the workers
            env=child_environment(PYTHONPATH=search_path(), **allocator),
        )
        self._started, self._told = time.monotonic(), []
        asked = {"settings": self.settings.model_dump(mode="json"), "mlflow": self.mlflow_url}
        self._say(process, json.dumps(asked).encode())
        return process

    def _tell(self, process: subprocess.Popen[bytes]) -> None:
        for line, event in ((b"stop", self.stop), (b"ended", self.ended)):
            if event.is_set() and line not in self._told:
                self._told.append(line)
                self._say(process, line)

    def _say(self, process: subprocess.Popen[bytes], line: bytes) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the next look finds
            process.stdin.write(line + b"\n")
            process.stdin.flush()

    def _ended(self, process: subprocess.Popen[bytes], code: int) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        self._process = None
        if b"ended" in self._told:
            self._over.set()
            if code:
                logger.error("The process that moves the log %s; the next start moves what is left.", how(code))
            return
        wait = self._wait.after(time.monotonic() - self._started)
        self._start_at = time.monotonic() + wait
        logger.error("The process that follows the aliases and moves the log %s; it is started again in %.1f s, and "
                     "requests are answered meanwhile.", how(code), wait)  # fmt: skip
