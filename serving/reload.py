"""`noria serve`: one parent that keeps workers serving what the registry's aliases say.

The parent polls the alias `champion` of every registered model, fetches and checks the bundle, asks the worker for it,
and tells the version's tags what came of it. It also keeps the worker alive and moves the prediction log into the lake.
MLflow may be away: what was fetched goes on serving, also through a restart.
"""

from __future__ import annotations

import fcntl
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from noria.errors import ServiceError
from noria.settings import Settings
from registry.store import Store
from serving.drain import Drain
from serving.reconcile import Reconciler
from serving.shadowing import LOOK_SECONDS, Shadowing
from serving.supervise import Worker, listen

DRAIN_SECONDS = 0.3
LAST_DRAIN_SECONDS = 60

logger = logging.getLogger(__name__)


def serve(settings: Settings, host: str, port: int, mlflow_url: str) -> None:
    """Serve until SIGTERM or SIGINT; blocks. Requests in flight are finished and the log is drained before it returns.

    Raises:
        ServiceError: the port is taken, or another server uses the same home.
    """
    with _alone(settings.serving):
        listener = listen(host, port)
        worker = Worker(listener, settings.serving, settings.providers)
        shadowing = Shadowing(Store(mlflow_url), settings.bundles, settings.serving)
        drain = Drain(settings.serving / "log", str(settings.lake), shadowing.feed.offer)
        reconciler = Reconciler(Store(mlflow_url), settings.bundles, settings.serving, lambda: worker.starts)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        worker.start()
        logger.info("Serving on http://%s:%s", host, listener.getsockname()[1])
        threads = [
            threading.Thread(target=_repeat, args=(reconciler.step, settings.poll_seconds, stop), name="reconcile"),
            threading.Thread(target=_repeat, args=(drain.step, DRAIN_SECONDS, stop), name="drain"),
            threading.Thread(target=_repeat, args=(shadowing.step, LOOK_SECONDS, stop), name="shadow"),
        ]
        for thread in threads:
            thread.start()
        try:
            while not stop.wait(0.1):
                worker.check()
        finally:
            stop.set()
            worker.stop()
            for thread in threads:
                thread.join()
            shadowing.stop()
            _drain_rest(drain)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the home's lock. Raises ServiceError when another server does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"Another server already uses {folder}; stop it, or set another NORIA_HOME.") from None
        yield


def _repeat(step: Callable[[], object], seconds: float, stop: threading.Event) -> None:
    """Call `step` again and again; a failure is logged once while it lasts, and the next call tries again."""
    last = ""
    while True:
        try:
            step()
            last = ""
        except Exception as error:
            if str(error) != last:
                logger.exception("A step of the server failed; it is tried again.")
            last = str(error)
        if stop.wait(seconds):
            return


def _drain_rest(drain: Drain) -> None:
    """What the worker handed over when it ended. What does not reach the lake now does at the next start."""
    deadline = time.monotonic() + LAST_DRAIN_SECONDS
    while time.monotonic() < deadline:
        try:
            drain.step()
            return
        except Exception:
            logger.exception("The last log rows do not reach the lake; trying again.")
            time.sleep(1)
