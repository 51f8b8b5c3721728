"""`noria serve`: one parent that keeps workers serving what the registry's aliases say.

The parent holds the socket and keeps the workers alive; files say what they should serve. Who writes them is a process
of its own (`serving.background`): it polls the alias `champion` of every registered model, fetches and checks the
bundle, tells the version's tags what came of it, and moves the prediction log into the lake. MLflow may be away: what
was fetched goes on serving, also through a restart. With a model repository the plain models of that folder are served
too, and MLflow is not needed.
"""

from __future__ import annotations

import fcntl
import logging
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from noria.errors import ServiceError
from noria.providers import Providers, require
from noria.settings import Settings
from serving import state, tally
from serving.background_process import Background
from serving.config import Config
from serving.configure import configure
from serving.fleet import Fleet
from serving.lag import handed_over, look_at_log
from serving.machine import memory
from serving.metrics import Metrics
from serving.repeat import repeat
from serving.repository import Repository
from serving.shadow_counts import ShadowCounts
from serving.state import Desired, State
from serving.supervise import MB, Plan, listen, reserve

COUNT_SECONDS = 1.0

Step = tuple[Callable[[], float | None], float | None]
"""What is repeated, and every how many seconds; None: it says."""
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
    chain = require(settings.providers, settings.gpu_device)
    config = configure(settings, host, is_open=is_open, workers=settings.workers)
    with _alone(settings.serving), ExitStack() as held:
        state.set_aside(settings.serving / "desired", Desired)
        for name in ("state", "failed"):
            state.set_aside(settings.serving / name, State)
        if not settings.repository:
            (settings.serving / "repository.json").unlink(missing_ok=True)  # of an earlier start, which had one
        listener = listen(host, port)
        if grpc_port is not None:
            held.enter_context(reserve(host, grpc_port))
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        metrics = Metrics(settings.serving / "metrics", f"parent-{uuid.uuid4().hex[:12]}")
        repository = Repository(Path(settings.repository) if settings.repository else None, settings.serving)
        repository.start(stop)  # what lies there at the start is loaded by the first workers
        providers = settings.providers if len(chain) > 1 else "cpu"  # what is not here, no worker looks for again
        fleet = Fleet(_plan(settings, listener, grpc_port, config, providers), settings.workers, metrics)
        count = partial(_count, metrics, fleet, settings.serving, ShadowCounts(settings.serving))
        steps: list[Step] = [(repository.step, None), (count, COUNT_SECONDS)]
        logger.info("Serving on http://%s:%s", host, listener.getsockname()[1])
        _work(fleet, steps, Background(settings, mlflow_url, stop), stop)
        metrics.dump(ended=True)


def _work(fleet: Fleet, steps: Sequence[Step], background: Background, stop: threading.Event) -> None:
    """Keep the workers answering until `stop` is set, and repeat each of `steps` in a thread of its own."""
    threads = [threading.Thread(target=repeat, args=(step, seconds, stop)) for step, seconds in steps]
    background.start()
    for thread in threads:
        thread.start()
    try:
        repeat(partial(_step, fleet, background), None, stop)
    finally:
        stop.set()
        fleet.stop()
        for thread in threads:
            thread.join()
        background.finish()


def _step(fleet: Fleet, background: Background) -> float:
    pause = fleet.step()
    if not fleet.current.entries or any(worker.phase == "accepting" for worker in fleet.members):
        background.may_start.set()
    return pause


def _count(metrics: Metrics, fleet: Fleet, folder: Path, shadow: ShadowCounts) -> None:
    """Write the parent's own numbers down, and add up those of the processes that have ended."""
    look_at_log(metrics, handed_over(folder / "log"), fleet.current.entries)
    shadow.look(metrics)
    metrics.dump()
    if fleet.sources:
        tally.retire(folder / "metrics", {*fleet.sources, metrics.source})


def _plan(
    settings: Settings, listener: socket.socket, grpc_port: int | None, config: Config, providers: Providers
) -> Plan:
    limit = settings.load_memory_mb * MB or memory() // 2 // settings.workers
    return Plan(listener, settings.serving, providers, grpc_port, config, settings.load_seconds, limit)


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
