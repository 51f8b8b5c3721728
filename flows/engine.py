"""The warm engine: one process that has imported the heavy libraries and forks a child for every flow run.

A flow run then costs about as much as the work it does, not the ~12 s that torch, evidently, mlflow and prefect take to
import. The Prefect worker is Prefect's own process worker; the command that it starts is `flows/run_warm.py`, which
hands its environment, folder and terminal to this process over a Unix socket and lives exactly as long as the run:
signals are passed on, the exit code comes back, and when either side dies the run dies too.

The engine must stay single-threaded, or forking would copy locks that nobody will ever release.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

from noria.variables import replace_environment

log = logging.getLogger("noria.engine")
WARM = ("flows.retrain", "flows.watch", "flows.batch", "flows.worker", "prefect.engine")
KILL_WITH_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""


class Engine:
    """Accepts orders on a socket, forks, reports exits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        path.chmod(0o600)
        self.server.listen(16)
        self.woken, self.wake = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(self.wake, False)
        self.runs: dict[socket.socket, int] = {}
        self.stopping = False

    def serve(self) -> None:
        """Until SIGTERM; runs in progress end with the engine."""
        signal.set_wakeup_fd(self.wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self.stopping:
            watched: list[Any] = [self.server, self.woken, *self.runs]
            ready, _, _ = select.select(watched, [], [])
            for source in ready:
                if source is self.server:
                    self._accept()
                elif source in self.runs:
                    self._relay(source)
            self._drain()
            self._reap()
        for pid in self.runs.values():
            _kill_group(pid)
        self.path.unlink(missing_ok=True)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _drain(self) -> None:
        try:
            os.read(self.woken, 4096)
        except BlockingIOError:
            return

    def _accept(self) -> None:
        client, _ = self.server.accept()
        data, terminals, _, _ = socket.recv_fds(client, 1 << 20, 3)
        while data and not data.endswith(b"\n"):
            more = client.recv(1 << 20)
            if not more:
                break
            data += more
        if not data.endswith(b"\n"):
            # Somebody only asked whether the engine listens.
            client.close()
            return
        pid = os.fork()
        if pid == 0:
            self._become_run(client, json.loads(data), terminals)
        for terminal in terminals:
            os.close(terminal)
        self.runs[client] = pid
        client.sendall(json.dumps({"pid": pid}).encode() + b"\n")

    def _become_run(self, client: socket.socket, order: dict[str, Any], terminals: list[int]) -> None:
        """In the child: drop what belongs to the engine, then be the process that the worker wanted to start."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for held in (self.server, client, *self.runs):
                held.close()
            os.close(self.woken)
            os.close(self.wake)
            run(order, terminals)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            # As Python would have: this process never returns to where it is printed.
            traceback.print_exc()
        finally:
            # What Python does first when it ends: Prefect sends its last log lines in a hook of this. Nothing else of
            # an ordinary end happens: the hooks that the engine's own imports left are not this process's to run.
            threading._shutdown()  # type: ignore[attr-defined]
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _relay(self, client: socket.socket) -> None:
        try:
            data = client.recv(4096)
        except OSError:
            data = b""
        if not data:
            # The worker's process was killed: so is the run, with everything that it started.
            _kill_group(self.runs.pop(client))
            client.close()
            return
        for line in data.splitlines():
            os.kill(self.runs[client], json.loads(line)["signal"])

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for client in [client for client, running in self.runs.items() if running == pid]:
                try:
                    client.sendall(json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                except OSError:
                    log.warning("run %d ended and nobody listened", pid)
                client.close()
                del self.runs[client]


def run(order: dict[str, Any], terminals: list[int]) -> None:
    """Become the ordered module (Prefect's engine for a flow run), with the caller's environment and terminal."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    for target, terminal in enumerate(terminals):
        os.dup2(terminal, target)
        os.close(terminal)
    replace_environment(order["environment"])
    os.chdir(order["folder"])
    random.seed()
    importlib.import_module("prefect.context").refresh_global_settings_context()
    sys.argv = [order["module"]]
    warnings.filterwarnings("ignore", message=".*found in sys.modules.*", category=RuntimeWarning)
    runpy.run_module(order["module"], run_name="__main__")


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    """Import, then serve on the socket given as the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for module in WARM:
        importlib.import_module(module)
    # Allocators have threads of their own that survive a fork well; a Python thread could hold a lock for ever.
    if threading.active_count() > 1:
        log.warning("threads after imports: %s; forking is safe only from one", threading.enumerate())
    # What is alive now lives for ever: the collector need not copy these pages in every child.
    gc.collect()
    gc.freeze()
    engine = Engine(Path(sys.argv[1]))
    log.info("warm: %s", ", ".join(WARM))
    engine.serve()


if __name__ == "__main__":
    main()
