"""The embedded stack under one home folder: start every service, watch it, restart what dies, stop in order.

`noria up` starts this module as a process of its own, which holds a lock for as long as it lives: a second one finds
the first. What runs where is in `stack.json`, written aside and renamed. Which services there are is in
`flows.services`; this module knows only how to keep commands running.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx
import psutil

from flows.site import Site, read_state, write_state
from noria.errors import ServiceError
from noria.variables import child_environment

log = logging.getLogger("noria.stack")
PATIENCE = 120.0
"""Seconds that a service may take to become ready."""
BACKOFF = (0.0, 1.0, 5.0, 15.0, 30.0)
"""Seconds to wait before restarting a service that died, by how often it died in the last ten minutes."""


@dataclass(frozen=True)
class Service:
    """A command that must keep running."""

    name: str
    command: tuple[str, ...]
    url: str
    """Where people or programs find it."""
    ready: Callable[[], bool]
    """Whether it answers now; must return quickly and not raise."""
    environment: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    """Services that must be ready before it is started."""


def answers(url: str) -> Callable[[], bool]:
    """A readiness probe: whether `url` answers with success."""

    def probe() -> bool:
        try:
            return httpx.get(url, timeout=2.0, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    return probe


class Running:
    """One started service and its history."""

    def __init__(self, service: Service, logs: Path) -> None:
        self.service = service
        self.logs = logs
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.deaths: list[float] = []
        self.next_start = 0.0

    def start(self) -> None:
        """Start the command in a session of its own, its output appended to its log file."""
        with (self.logs / f"{self.service.name}.log").open("ab") as output:
            self.process = subprocess.Popen(
                self.service.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(**self.service.environment),
                start_new_session=True,
            )
        self.ready = False

    def stop(self, patience: float = 15.0) -> None:
        """End the service and everything it started: ask, wait, then force."""
        if self.process is not None:
            end_tree(self.process.pid, patience)
            self.process.wait()


def end_tree(pid: int, patience: float = 15.0) -> None:
    """End a process and its descendants: SIGTERM to the process, then SIGKILL to whatever is left."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
        parent.terminate()
    except psutil.NoSuchProcess:
        return
    psutil.wait_procs([parent], timeout=patience)
    _, listed = psutil.wait_procs(family, timeout=1.0)
    alive = [process for process in listed if _lives(process)]
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5.0)


class Supervisor:
    """Keeps services running until told to stop."""

    def __init__(self, site: Site, services: Sequence[Service]) -> None:
        self.site = site
        self.logs = site.settings.root / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.running = {service.name: Running(service, self.logs) for service in services}
        self.stopping = threading.Event()
        self.events: list[str] = []

    def run(self) -> None:
        """Start, watch and restart until `stopping` is set; then stop everything, last started first."""
        try:
            while not self.stopping.is_set():
                for running in self.running.values():
                    self._tend(running)
                self._publish()
                self.stopping.wait(0.2)
        finally:
            self._publish("stopping")
            for running in reversed(self.running.values()):
                running.stop()
            self._publish("stopped")

    def _tend(self, running: Running) -> None:
        process, service = running.process, running.service
        if process is not None and process.poll() is None:
            if not running.ready and service.ready():
                running.ready = True
                log.info("%s is ready at %s", service.name, service.url)
            return
        now = time.monotonic()
        if process is not None:
            running.deaths = [moment for moment in running.deaths if now - moment < 600] + [now]
            wait = BACKOFF[min(len(running.deaths), len(BACKOFF)) - 1]
            self._say(f"{service.name} ended with code {process.returncode}; restarting it"
                      f"{f' in {wait:g} s' if wait else ''} (see logs/{service.name}.log)")  # fmt: skip
            # Its children would hold its port.
            running.stop()
            running.process, running.ready, running.next_start = None, False, now + wait
        if now >= running.next_start and all(self.running[name].ready for name in service.after):
            running.start()

    def _say(self, sentence: str) -> None:
        log.warning(sentence)
        self.events = [*self.events, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}"][-20:]

    def _publish(self, phase: str = "") -> None:
        ready = all(running.ready for running in self.running.values())
        state = {
            "pid": os.getpid(),
            "phase": phase or ("ready" if ready else "starting"),
            "events": self.events,
            "services": {
                name: {
                    "url": running.service.url,
                    "ready": running.ready,
                    "restarts": len(running.deaths),
                    **_identity(running.process),
                }
                for name, running in self.running.items()
            },
        }
        write_state(self.site.settings.root, state)


def _identity(process: subprocess.Popen[bytes] | None) -> dict[str, float]:
    """What tells this process from a later one with the same id."""
    if process is None:
        return {}
    try:
        return {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
    except psutil.NoSuchProcess:
        return {}


def lock(home: Path) -> IO[str] | None:
    """The home's lock, held until the file is closed or the process ends; None when another process holds it."""
    home.mkdir(parents=True, exist_ok=True)
    file = (home / "stack.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def end_orphans(home: Path) -> None:
    """End services that a killed supervisor left running. Call with the lock held."""
    for entry in read_state(home).get("services", {}).values():
        try:
            if psutil.Process(entry.get("pid", 0) or 2**30).create_time() == entry.get("created"):
                end_tree(entry["pid"])
        except psutil.NoSuchProcess:
            continue


def up(site: Site, *, tell: Callable[[dict[str, bool]], None] = lambda _: None, patience: float = PATIENCE) -> Site:
    """Start the stack of this home, or find the one that runs; returns when every service is ready.

    Raises:
        ServiceError: a service does not become ready; the sentence names its log.
    """
    home = site.settings.root
    held = lock(home)
    started: subprocess.Popen[bytes] | None = None
    if held is not None:
        held.close()
        (home / "logs").mkdir(parents=True, exist_ok=True)
        with (home / "logs" / "stack.log").open("ab") as output:
            started = subprocess.Popen(
                [sys.executable, "-m", "flows.services"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=child_environment(**site.forwarded()),
                start_new_session=True,
            )  # fmt: skip
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        state = read_state(home)
        fresh = started is None or state.get("pid") == started.pid
        if started is None and state.get("phase") == "stopped":
            # The one that was found is on its way down, or one that somebody else starts has said nothing yet.
            time.sleep(0.5)
            return up(site, tell=tell, patience=max(1.0, deadline - time.monotonic()))
        if fresh and state.get("phase") == "ready":
            return site.found()
        if fresh:
            tell({name: entry["ready"] for name, entry in state.get("services", {}).items()})
        if started is not None and started.poll() is not None:
            raise ServiceError(f"The stack did not start; see {home / 'logs' / 'stack.log'}.")
        time.sleep(0.2)
    late = [name for name, entry in read_state(home).get("services", {}).items() if not entry["ready"]]
    if started is not None:
        down(site)
    raise ServiceError(f"Not ready after {patience:.0f} s: {', '.join(late) or 'the stack'}; see {home / 'logs'}.")


def down(site: Site, patience: float = 60.0) -> bool:
    """Stop the stack of this home; returns whether one was running."""
    home = site.settings.root
    held = lock(home)
    if held is not None:
        end_orphans(home)
        write_state(home, {**read_state(home), "phase": "stopped", "services": {}})
        held.close()
        return False
    pid = int(read_state(home).get("pid", 0))
    try:
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        return False
    deadline = time.monotonic() + patience
    while _lives(process):
        if time.monotonic() > deadline:
            raise ServiceError(f"The stack (process {pid}) did not stop within {patience:.0f} s; see {home / 'logs'}.")
        time.sleep(0.1)
    return True


def _lives(process: psutil.Process) -> bool:
    """Whether it still runs. In a container whose first process collects nothing, an ended one stays as a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
