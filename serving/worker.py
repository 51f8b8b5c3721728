"""One worker process: answers requests on a socket that it is given, and serves what the desired files say.

    python -m serving.worker --socket 3 --folder .noria/serving --source 1f0c...

Started by `serving.reload`, which owns the socket and holds the other end of this process's standard input: when that
end closes the parent is gone, and the worker finishes what it is answering and ends. Never imports mlflow or deltalake.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
import uvloop

from noria.runtime import Providers
from serving import state, tracing
from serving.app import App
from serving.capture import Log
from serving.engine import Engine
from serving.metrics import Metrics
from serving.service import Service
from serving.state import Desired, State

LOOK_SECONDS = 0.2
"""How often the desired files are looked at."""
ROTATE_SECONDS = 0.5
"""How long a logged row waits at most until its segment is handed over."""
METRICS_SECONDS = 1.0
"""How often this worker's numbers are written for the other workers to add up."""
GRACE_SECONDS = 10
"""How long requests in flight may take once the worker is told to end."""

logger = logging.getLogger(__name__)


@dataclass
class Follower:
    """Makes the engine serve what the desired files say, and writes down what came of it."""

    engine: Engine
    metrics: Metrics
    folder: Path
    _seen: object = None
    _answered: dict[str, str] = field(default_factory=dict)

    def step(self) -> None:
        """Look once; take every request that is new. Takes as long as loading takes."""
        mark = state.signature(self.folder / "desired")
        if mark == self._seen:
            return
        desired = state.read(self.folder / "desired", Desired)
        earlier = state.read(self.folder / "state", State)
        self.engine.known = desired
        for workload, request in desired.items():
            if request.version is not None and self._answered.get(workload) != request.asked:
                self._take(request, earlier.get(workload))
        self._seen = mark

    def _take(self, request: Desired, earlier: State | None) -> None:
        serving, began = self.engine.models.get(request.workload), time.perf_counter()
        reached = self.engine.take(request, earlier)
        if reached.status == "failed":
            logger.error("%s", reached.reason)
            if serving is None and request.fallback_version is not None:
                self.engine.take(Desired(request.workload, request.fallback_version, request.fallback_folder))
        model = self.engine.models.get(request.workload)
        if reached.status == "failed" or model is not serving:
            taken = time.perf_counter() - began if reached.status == "serving" else None
            self.metrics.swapped(request.workload, reached.status, taken)
        if model is not None and model is not serving:
            if serving is not None:
                self.metrics.unloaded(request.workload, serving.version)
            self.metrics.loaded(request.workload, model.version, model.session.get_providers()[0])
        state.write(self.folder / "state", reached)
        self._answered[request.workload] = request.asked


async def serve(listener: socket.socket, folder: Path, source: str, providers: Providers) -> None:
    """Serve until SIGTERM, SIGINT, or until the parent is gone; every logged row is handed over at the end."""
    engine, metrics, log = Engine(providers), Metrics(folder / "metrics", source), Log(folder / "log", source)
    follower = Follower(engine, metrics, folder)
    follower.step()
    gc.collect()
    gc.freeze()
    tracer = tracing.start(source)
    config = uvicorn.Config(
        App(Service(engine, log, metrics), tracer),
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(config)
    metrics.before += [
        lambda: _look_at_log(metrics, engine, log),
        lambda: metrics.connected(len(server.server_state.connections)),
    ]
    threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    repeated = [
        asyncio.create_task(_repeat(follower.step, LOOK_SECONDS)),
        asyncio.create_task(_repeat(log.rotate, ROTATE_SECONDS)),
        asyncio.create_task(_repeat(metrics.dump, METRICS_SECONDS)),
    ]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in repeated:
            task.cancel()
        log.rotate()
        metrics.dump(ended=True)
        if tracer is not None:
            tracer.close()


def _look_at_log(metrics: Metrics, engine: Engine, log: Log) -> None:
    """Tell the metrics what of the log is not in the lake yet."""
    oldest: dict[str, float] = {}
    for path in log.ready_folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it went into the lake meanwhile
            name, written = path.name.split(".")[0], path.stat().st_mtime
            oldest[name] = min(written, oldest.get(name, written))
    pending = log.pending()
    for workload in {*engine.models, *pending}:
        metrics.log_lag(workload, *pending.get(workload, (0, 0)), oldest.get(workload))
    metrics.log_lost(log.lost)


async def _repeat(step: Callable[[], object], seconds: float) -> None:
    """Call `step` in a thread again and again; a failure is logged, and the next call tries again."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(step)
        except Exception:
            logger.exception("%s failed", step.__qualname__)


def _end_with_parent(server: uvicorn.Server) -> None:
    """Standard input ends when the parent does, however it ended: let go of the port soon."""
    while os.read(0, 1024):  # not sys.stdin: its lock would be held at exit
        pass
    server.should_exit = True
    time.sleep(GRACE_SECONDS + 1)
    os._exit(1)


def main() -> None:
    """The process's entry point."""
    parser = argparse.ArgumentParser(description="One worker of noria's server; started by `noria serve`.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the listening socket")
    parser.add_argument("--folder", type=Path, required=True, help="the server's state")
    parser.add_argument("--source", required=True, help="this worker's name in the prediction log")
    parser.add_argument("--providers", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # uvicorn raises the signal that ended it once more when it is done; here the log must still be handed over.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    listener = socket.socket(fileno=given.socket)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(listener, given.folder, given.source, given.providers))


if __name__ == "__main__":
    main()
