"""The worker process and the socket that it answers on: start it, start it again when it dies, end it.

The parent holds the listening socket, so connections that arrive while a worker is replaced wait instead of failing.
Not here: what the worker should serve.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from noria.errors import ServiceError
from noria.runtime import Providers
from noria.settings import child_environment

BACKLOG = 2048
STEADY_SECONDS = 5
"""A worker that lived this long is started again at once; one that did not waits, longer each time."""
LONGEST_WAIT = 5.0
END_SECONDS = 15

logger = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServiceError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ServiceError(
            f"Cannot listen on {host}:{port} ({error.strerror}). Does another server run there? Choose another --port."
        ) from None
    return listener


class Worker:
    """One worker process, kept alive."""

    def __init__(self, listener: socket.socket, folder: Path, providers: Providers) -> None:
        self.listener, self.folder, self.providers = listener, folder, providers
        self.starts = 0
        """How often a worker was started; grows when one died."""
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._wait = 0.0

    def start(self) -> None:
        """Start a worker; its standard input is the pipe that ends with this process."""
        command = [
            sys.executable, "-m", "serving.worker", "--socket", str(self.listener.fileno()),
            "--folder", str(self.folder), "--source", uuid.uuid4().hex[:12], "--providers", self.providers,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[self.listener.fileno()],
            start_new_session=True,
            env=child_environment(PYTHONPATH=_search_path()),
        )
        self._started = time.monotonic()
        self.starts += 1

    def check(self) -> bool:
        """Start it again when it has died; returns whether it had."""
        if self._process is None or self._process.poll() is None:
            return False
        lived = time.monotonic() - self._started
        self._wait = 0.0 if lived > STEADY_SECONDS else min(LONGEST_WAIT, self._wait * 2 + 0.2)
        logger.error("The worker ended with code %s after %.0f s; starting another.", self._process.returncode, lived)
        self._close_pipe()
        time.sleep(self._wait)
        self.start()
        return True

    def stop(self) -> None:
        """Let it finish the requests in flight, then end; killed when it does not."""
        self.listener.close()
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("The worker does not end; killing it.")
            self._process.kill()
            self._process.wait()
        self._close_pipe()
        self._process = None

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def _search_path() -> str:
    """Where this process finds its modules: the worker must find the same ones, whatever folder it is started in."""
    return ":".join(path for path in sys.path if path)
