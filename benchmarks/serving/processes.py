"""A server as a tree of processes on one core: started, waited for, its memory read, ended with all it started.

`taskset` pins the first process, and the kernel everything that it starts. Not here: what is asked of it.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.serving.bodies import Answered, Body
from benchmarks.serving.environments import Unavailable
from noria.variables import child_environment

PATIENCE = 120.0
"""Seconds until a server must give its first right answer."""
ENDING = 20.0


SETTLE_SECONDS = 20
QUIET = 0.1
"""Processor seconds in a second of the clock below which a server is at rest."""


@dataclass(frozen=True)
class Served:
    """A running server."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    ready_seconds: float
    """From the start of its process to its first right answer."""

    def tree(self) -> list[psutil.Process]:
        """The process that was started, and everything below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def memory(self, module: str = "") -> list[int]:
        """Resident bytes of each process of the tree, or of those that run a module, the one that was started first."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                if not module or module in process.cmdline():
                    found.append(int(process.memory_info().rss))
        return found

    def ask(self, path: str, body: Body) -> Answered:
        """One request on a connection of its own."""
        return ask(self.port, path, body)


def free_port() -> int:
    """A port with two free neighbours: some servers want one for gRPC and one for metrics."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                for neighbour in (port + 1, port + 2):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", neighbour))
                return port


def ask(port: int, path: str, body: Body | None = None, timeout: float = 30.0) -> Answered:
    """One request; a GET without a body. Raises OSError or HTTPException when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            headers = {"content-type": body.content_type, **body.headers}
            connection.request("POST", path, body.content, headers)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answered(answer.status, headers, answer.read())
    finally:
        connection.close()


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    *,
    right: Callable[[int], str],
    log: Path,
    core: int | None = 0,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """A server on a core, ready: `right(port)` says what is wrong with its answer, and nothing once it is right.

    Raises:
        Unavailable: it ended, or gave no right answer in time; the sentence has the reason and its last words.
    """  # fmt: skip
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*pinned, *command], stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
            env=child_environment(**(variables or {})),
        )  # fmt: skip
    served = Served(name, port, process, 0.0)
    try:
        _wait(process, lambda: right(port), log)
        ready = Served(name, port, process, time.perf_counter() - began)
        _settle(ready)
        yield ready
    finally:
        end(served)


def _settle(served: Served) -> None:
    """Wait until the whole tree is quiet: what a server still does after its first answer (imports beside, further
    processes) is its start, not its speed. The same for every server."""
    deadline, before = time.monotonic() + SETTLE_SECONDS, -1.0
    while time.monotonic() < deadline:
        spent = 0.0
        for process in served.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent += times.user + times.system
        if 0 <= spent - before < QUIET:
            return
        before = spent
        time.sleep(1)


def _wait(process: subprocess.Popen[bytes], complaint: Callable[[], str], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            said = complaint()
        except (OSError, http.client.HTTPException) as error:
            said = f"no answer ({type(error).__name__})"
        if not said:
            return
        if process.poll() is not None or time.monotonic() > deadline:
            ended = f"ended with {process.returncode}" if process.returncode is not None else f"{PATIENCE:g} s passed"
            raise Unavailable(f"{ended}; {said}; its last words: {log.read_text(errors='replace')[-600:]!r}")
        time.sleep(0.02)


def end(served: Served) -> None:
    """Ask the first process to end, then kill what is left of its tree."""
    tree = served.tree()
    served.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        served.process.wait(ENDING)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    served.process.wait()
    psutil.wait_procs(tree, timeout=ENDING)
