"""The server's slow half: the log into the lake, the aliases, the shadow. Imports Delta Lake and MLflow.

    python -m serving.background

Started by `serving.background_process`. Standard input brings its settings and where MLflow is, as one line of JSON;
then `stop` (follow no more) and `ended` (no worker writes any more). Where it ends before that, the parent was killed,
and so this process ends like it, at once: what it was at is begun anew by the next one. Not here: the workers
(`serving.fleet`), which answer before this process is started.
"""

from __future__ import annotations

import fcntl
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from noria.settings import Settings, load_settings
from registry.store import Store
from serving.drain import Drain
from serving.reconcile import Reconciler
from serving.repeat import repeat
from serving.shadowing import LOOK_SECONDS as SHADOW_SECONDS
from serving.shadowing import Shadowing

DRAIN_SECONDS = 0.3
GATHER_SECONDS, MANY_ROWS = 2.0, 500
"""Between two steps of the drain, where the last one moved so many rows: a commit costs the same for few and many."""
LAST_DRAIN_SECONDS = 60
FOLLOWERS_SECONDS = 5
"""How long the end waits for what speaks with MLflow, while the workers finish what they have."""
NICE = 19
"""The drain gives way to the workers: a segment may wait, a request may not."""

logger = logging.getLogger(__name__)


class Work:
    """All of it, made before any of it runs: so what fails meanwhile can be made again."""

    def __init__(self, settings: Settings, mlflow_url: str, stop: threading.Event) -> None:
        """Everything is repeated until `stop` is set."""
        offers: list[Callable[[Path], None]] = []
        self.stop = stop
        self.shadowing: Shadowing | None = None
        self._followed: list[tuple[Callable[[], None], float]] = []
        if mlflow_url:
            self.shadowing = Shadowing(Store(mlflow_url), settings.bundles, settings.serving, stop)
            reconciler = Reconciler(Store(mlflow_url), settings.bundles, settings.serving, stop)
            self._followed = [(reconciler.step, settings.poll_seconds), (self.shadowing.step, SHADOW_SECONDS)]
            offers = [self.shadowing.feed.offer]
        self.drain = Drain(settings.serving / "log", str(settings.lake), *offers)

    def run(self, ended: threading.Event) -> None:
        """Do it; after `ended`, bring the rest of the log into the lake."""
        drains = threading.Thread(target=_drain, args=(self.drain, self.stop), name="drain")
        # A call of an MLflow that hangs lasts minutes, and the end of this process does not wait for it.
        followers = [
            threading.Thread(target=repeat, args=(step, every, self.stop), daemon=True)
            for step, every in self._followed
        ]
        for thread in (drains, *followers):
            thread.start()
        self.stop.wait()
        deadline = time.monotonic() + FOLLOWERS_SECONDS
        for thread in followers:
            thread.join(max(0.0, deadline - time.monotonic()))
        drains.join()
        ended.wait()
        _drain_rest(self.drain)
        if self.shadowing:
            self.shadowing.stop()


def _drain(drain: Drain, stop: threading.Event) -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # of this thread alone
    repeat(lambda: paced(drain), None, stop)


def paced(drain: Drain) -> float:
    """Step once; returns the seconds until the next step."""
    return DRAIN_SECONDS if drain.step() < MANY_ROWS else GATHER_SECONDS


def _drain_rest(drain: Drain) -> None:
    """What the worker handed over when it ended. What does not reach the lake now does at the next start."""
    deadline = time.monotonic() + LAST_DRAIN_SECONDS
    while time.monotonic() < deadline:
        try:
            drain.step()
            if not drain.failing:
                return
        except Exception:
            logger.exception("The last log rows do not reach the lake; trying again.")
        time.sleep(1)


def run(settings: Settings, mlflow_url: str, stop: threading.Event, ended: threading.Event) -> None:
    """Set it up, which is tried again until `ended` where the disk is full, for example; then do it."""
    prepared, made = threading.Event(), []

    def prepare() -> None:
        last = ended.is_set()
        try:
            made.append(Work(settings, mlflow_url, stop))
        finally:
            if made or last:
                prepared.set()

    repeat(prepare, None, prepared)
    gc.freeze()  # what was imported stays: looking through it again holds everything up for 30 ms
    for work in made:
        work.run(ended)


def _listen(lines: Iterator[bytes], stop: threading.Event, ended: threading.Event) -> None:
    for line in lines:
        (stop if line == b"stop" else ended).set()
    os._exit(1)


def _lines() -> Iterator[bytes]:
    """Of standard input; not by sys.stdin, whose lock would be held at exit."""
    heard = b""
    while part := os.read(0, 65536):
        *lines, heard = (heard + part).split(b"\n")
        yield from lines


def main() -> None:
    """The process's entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")  # as `noria serve` does
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # whoever ends all processes means the parent, which ends this one last
    lines, stop, ended = _lines(), threading.Event(), threading.Event()
    asked = json.loads(next(lines))
    settings = load_settings(**asked["settings"])
    threading.Thread(target=_listen, args=(lines, stop, ended), daemon=True).start()
    with (settings.serving / "background.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # that of a parent that was killed may not have ended yet
        run(settings, asked["mlflow"], stop, ended)
        logging.shutdown()
        os._exit(0)  # a call of an MLflow that hangs is not waited for, nor what libraries do when they end


if __name__ == "__main__":
    main()
