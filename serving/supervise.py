"""One worker process, seen from its parent: start it, hear what it reports, watch it while it loads, end it.

A worker is told which generation to load (`load`), proves it, says so, and waits; only when it is told to (`go`) does
it accept connections. So whatever a version does while it loads, no request meets it. The parent holds the listening
socket: connections that arrive while no worker accepts wait instead of failing.
Not here: what should serve, and how many workers there are (`serving.fleet`).
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from noria.errors import ServiceError
from noria.providers import Providers
from noria.variables import child_environment
from serving.config import Config
from serving.ending import how

BACKLOG = 2048
MB = 2**20
MEMORY = {"MALLOC_ARENA_MAX": "1"}
"""glibc would give each thread memory of its own, which large bodies fill again and again: 131 MiB for a compressed
bomb instead of 105."""
NUMBERS = itertools.count(int.from_bytes(os.urandom(2), "big"))
"""Of the workers that this process starts, in a row."""


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


def reserve(host: str, port: int) -> socket.socket:
    """Keep a port for the workers, who share it with this socket, which never listens. Raises ServiceError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kept = socket.socket(family, socket.SOCK_STREAM)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        kept.bind((host, port))
    except OSError as error:
        kept.close()
        raise ServiceError(f"gRPC cannot have {host}:{port} ({error.strerror}). Choose another --grpc-port.") from None
    return kept


@dataclass(frozen=True)
class Plan:
    """What every worker of a server has in common."""

    listener: socket.socket
    folder: Path
    """The server's state."""
    providers: Providers = "auto"
    grpc_port: int | None = None
    config: Config = field(default_factory=Config)
    """How they answer."""
    load_seconds: float = 60
    """How long loading and proving one version may take."""
    load_memory: int = 0
    """Bytes that a worker may hold while it loads; 0: no limit."""


@dataclass(frozen=True)
class Failure:
    """Why a worker ended, or had to be ended."""

    reason: str
    """A sentence."""
    workload: str = ""
    """Whose version it was loading; empty: none, so no version is to blame."""
    said: bool = False
    """The worker itself found the version not to load. Without it something else may have ended it, or held it up."""


class Worker:
    """A started worker process. Used by one thread, the one that started it."""

    def __init__(self, plan: Plan, *, ahead: bool = False) -> None:
        """Start it; `ahead` of its time, so that it imports at a low priority. Its standard input is the pipe that ends
        with this process. Raises OSError."""
        self.plan, self.generation = plan, 0
        self.phase: Literal["spare", "loading", "loaded", "opening", "accepting"] = "spare"
        self.failure: Failure | None = None
        self.imported = False
        """It could load at once."""
        self.source = uuid.uuid4().hex[:12]
        """Names this process's life, in the prediction log and in the metrics."""
        self.seconds = 0.0
        """From being told to load until it had; the start of the process included where that came first."""
        self.memory_mb = 0
        """Resident memory when it had loaded."""
        self.started = self._asked = self._since = time.monotonic()
        self.drained = False
        """Told to end, it accepts no more, and each connection that is left brings no further request."""
        self._retired: float | None = None
        self._loading: tuple[str, int] | None = None
        self._heard = b""
        self._reports, theirs = os.pipe()
        os.set_blocking(self._reports, False)
        try:
            self._process = subprocess.Popen(
                self._command(theirs, ahead),
                stdin=subprocess.PIPE,
                pass_fds=[plan.listener.fileno(), theirs],
                process_group=0,  # not a session of its own: niceness would not count between it and the drain
                env=child_environment(PYTHONPATH=search_path(), **MEMORY),
            )
        except BaseException:
            os.close(self._reports)
            raise
        finally:
            os.close(theirs)

    def _command(self, reports: int, ahead: bool) -> list[str]:
        command = [
            sys.executable, "-m", *(["serving.spare"] if ahead else []), "serving.worker",
            "--socket", str(self.plan.listener.fileno()), "--report", str(reports), "--folder", str(self.plan.folder),
            "--source", self.source, "--number", str(next(NUMBERS)), "--config", self.plan.config.to_json(),
            "--providers", self.plan.providers,
        ]  # fmt: skip
        return command if self.plan.grpc_port is None else [*command, "--grpc", str(self.plan.grpc_port)]

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def lived(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.started

    @property
    def leaving(self) -> float:
        """Seconds since it was told to end."""
        return 0.0 if self._retired is None else time.monotonic() - self._retired

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    @property
    def answers(self) -> bool:
        """Whether a request may still come to it."""
        return self.phase in ("opening", "accepting") and not self.drained and self.failure is None

    @property
    def loading(self) -> tuple[str, float]:
        """The workload whose version it loads, empty where it loads none, and for how many seconds by now."""
        workload, _ = self._loading or ("", 0)
        return workload, time.monotonic() - self._since

    def describe(self) -> dict[str, object]:
        """What a person wants to know of it."""
        phase = self.phase if self._retired is None else "leaving"
        loading = "{} version {}".format(*self._loading) if self._loading else ""
        loaded = {"loading": loading, "seconds": round(self.seconds, 3), "memory_mb": self.memory_mb}
        return {"pid": self.pid, "generation": self.generation, "phase": phase, "drained": self.drained, **loaded}

    def look(self) -> None:
        """Take in what it reported and whether it lives; one that breaks a limit while loading is killed."""
        if self.failure is not None:
            return
        code = self._process.poll()
        self._hear()
        self._judge(code)

    def _judge(self, code: int | None) -> None:
        if self.failure is None and code is not None:
            self._ended(code)
        elif self.failure is None and self.phase == "loading":
            self._check_limits()
        if self.failure is not None and self.phase == "loading":
            self.kill()

    def load(self, generation: int, path: Path) -> None:
        """Let it load the generation in a file."""
        self.generation, self.phase = generation, "loading"
        self._asked = self._since = time.monotonic()
        self._tell(f"{path}\n".encode())

    def go(self) -> None:
        """Let it accept connections."""
        self.phase = "opening"
        self._tell(b"go\n")

    def retire(self) -> None:
        """Let it finish the requests in flight, then end."""
        self._retired = time.monotonic()
        self._process.terminate()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Let go of the pipes, once it has ended."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._reports >= 0:
            os.close(self._reports)
            self._reports = -1

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the next look finds
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _hear(self) -> None:
        while self._reports >= 0:
            try:
                part = os.read(self._reports, 65536)
            except BlockingIOError:
                break
            if not part:
                break
            self._heard += part
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, said: dict[str, Any]) -> None:
        if "loading" in said:
            self._loading, self._since = (said["loading"], said["version"]), time.monotonic()
        elif "failed" in said:
            self.failure = Failure(said["reason"], said["failed"], said=True)
        elif "loaded" in said:
            self.phase, self._loading = "loaded", None
            self.seconds, self.memory_mb = time.monotonic() - self._asked, said["memory_mb"]
        elif "imported" in said:
            self.imported = True
        elif "accepting" in said:
            self.phase = "accepting"
        elif "drained" in said:
            self.drained = True

    def _ended(self, code: int) -> None:
        if self._loading is None:
            self.failure = Failure(f"The worker {how(code)} after {self.lived:.0f} s.")
        else:
            workload, version = self._loading
            self.failure = Failure(f"The worker {how(code)} while it loaded version {version} of {workload}.", workload)

    def _check_limits(self) -> None:
        workload, version = self._loading or ("", 0)
        what = f"Version {version} of {workload}" if workload else "The worker"
        limit = self.plan.load_memory
        if time.monotonic() - self._since > self.plan.load_seconds:
            sentence = f"{what} was not loaded within {self.plan.load_seconds:g} s (NORIA_LOAD_SECONDS)."
            self.failure = Failure(sentence, workload)
        elif limit and (held := self._memory()) > limit:
            sentence = f"{what} took {held // MB} MB while it was loaded; {limit // MB} MB are allowed"
            self.failure = Failure(f"{sentence} (NORIA_LOAD_MEMORY_MB).", workload)

    def _memory(self) -> int:
        """Resident bytes."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0


def search_path() -> str:
    """Where this process finds its modules: the worker must find the same ones, whatever folder it is started in."""
    return ":".join(path for path in sys.path if path)
