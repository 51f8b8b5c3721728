"""`noria serve`: one parent that keeps workers serving what the registry's aliases say.

The parent polls the alias `champion` of every registered model, fetches and checks the bundle, starts workers that
serve it, and tells the version's tags what came of it. It keeps the workers alive and moves the prediction log into the
lake. MLflow may be away: what was fetched goes on serving, also through a restart. With a model repository the plain
models of that folder are served too, and MLflow is not needed.
"""

from __future__ import annotations

import fcntl
import logging
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil

from noria.errors import ServiceError
from noria.runtime import require
from noria.settings import Settings, variables
from registry.store import Store
from serving import tally
from serving.config import Config
from serving.drain import Drain
from serving.fleet import Fleet
from serving.guard import protection
from serving.lag import handed_over, look_at_log
from serving.limits import PREFIX
from serving.metrics import Metrics
from serving.reconcile import Reconciler
from serving.repository import LOOK_SECONDS, Repository
from serving.shadowing import LOOK_SECONDS as SHADOW_SECONDS
from serving.shadowing import Shadowing
from serving.supervise import MB, Plan, listen, reserve

COUNT_SECONDS = 1.0
DRAIN_SECONDS = 0.3
LAST_DRAIN_SECONDS = 60
RETRY_SECONDS = 0.5

Step = tuple[Callable[[], object], float]
"""What is repeated, and every how many seconds."""
logger = logging.getLogger(__name__)


def serve(
    settings: Settings, host: str, port: int, mlflow_url: str, *, grpc_port: int | None = None, is_open: bool = False
) -> None:
    """Serve until SIGTERM or SIGINT; blocks. Requests in flight are finished and the log is drained before it returns.

    `is_open` lets others than this machine in without a key.

    Raises:
        SettingsError: a setting is malformed, or others could reach a server that asks for no key.
        ServiceError: the port is taken, or another server uses the same home.
    """
    require(settings.providers, settings.gpu_device)
    config = _config(settings, host, is_open)
    with _alone(settings.serving), ExitStack() as held:
        listener = listen(host, port)
        if grpc_port is not None:
            held.enter_context(reserve(host, grpc_port))
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        metrics = Metrics(settings.serving / "metrics", f"parent-{uuid.uuid4().hex[:12]}")
        repository = Repository(Path(settings.repository) if settings.repository else None, settings.serving)
        repository.step()  # what lies there at the start is loaded by the first workers
        fleet = Fleet(_plan(settings, listener, grpc_port, config), settings.workers, metrics)
        shadowing = Shadowing(Store(mlflow_url), settings.bundles, settings.serving) if mlflow_url else None
        drain = Drain(settings.serving / "log", str(settings.lake), *([shadowing.feed.offer] if shadowing else []))
        count = partial(_count, metrics, fleet, settings.serving)
        steps: list[Step] = [(drain.step, DRAIN_SECONDS), (repository.step, LOOK_SECONDS), (count, COUNT_SECONDS)]
        if shadowing:
            reconciler = Reconciler(Store(mlflow_url), settings.bundles, settings.serving)
            steps += [(reconciler.step, settings.poll_seconds), (shadowing.step, SHADOW_SECONDS)]
        logger.info("Serving on http://%s:%s", host, listener.getsockname()[1])
        try:
            _work(fleet, steps, stop)
        finally:
            if shadowing:
                shadowing.stop()
            _drain_rest(drain)
            metrics.dump(ended=True)


def _work(fleet: Fleet, steps: Sequence[Step], stop: threading.Event) -> None:
    """Keep the workers answering until `stop` is set, and repeat each of `steps` in a thread of its own."""
    threads = [threading.Thread(target=_repeat, args=(step, seconds, stop)) for step, seconds in steps]
    for thread in threads:
        thread.start()
    try:
        _repeat(fleet.step, None, stop)
    finally:
        stop.set()
        fleet.stop()
        for thread in threads:
            thread.join()


def _count(metrics: Metrics, fleet: Fleet, folder: Path) -> None:
    """Write the parent's own numbers down, and add up those of the processes that have ended."""
    look_at_log(metrics, handed_over(folder / "log"), fleet.current.entries)
    metrics.dump()
    if fleet.sources:
        tally.retire(folder / "metrics", {*fleet.sources, metrics.source})


def _plan(settings: Settings, listener: socket.socket, grpc_port: int | None, config: Config) -> Plan:
    memory = settings.load_memory_mb * MB or psutil.virtual_memory().total // 2 // settings.workers
    return Plan(listener, settings.serving, settings.providers, grpc_port, config, settings.load_seconds, memory)


def _config(settings: Settings, host: str, is_open: bool) -> Config:
    """How the workers answer. Raises SettingsError."""
    limits = variables(PREFIX)
    guarded = protection(settings, limits, host, is_open=is_open, workers=settings.workers)
    acks = dict(part.split("=") for part in settings.acks.split(",") if part)
    return Config(guarded, settings.ack, {name.strip(): ack.strip() for name, ack in acks.items()})


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


def _repeat(step: Callable[[], float | None], seconds: float | None, stop: threading.Event) -> None:
    """Call `step` again and again, every so many seconds or (None) when it says; a failure is logged once while it
    lasts, and the next call tries again."""
    last, pause = "", seconds or RETRY_SECONDS
    while True:
        try:
            said = step()
            last, pause = "", seconds if seconds is not None else said or RETRY_SECONDS
        except Exception as error:
            pause = seconds or RETRY_SECONDS
            if str(error) != last:
                logger.exception("A step of the server failed; it is tried again.")
            last = str(error)
        if stop.wait(pause):
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
