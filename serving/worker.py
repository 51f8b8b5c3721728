"""One worker process: loads and proves one generation, then answers requests on a socket that it is given.

    python -m serving.worker --socket 3 --report 5 --folder .noria/serving --source 1f0c...

Started by `serving.supervise`, which owns the socket and holds the other ends of two pipes. Standard input brings two
lines: the generation's file, which may be long after the start (importing takes longer than loading, so the parent
keeps a spare, `serving.spare`), and `go`, after which the worker accepts connections. When it ends, so has the parent,
and the worker finishes what it is answering. On `--report` it says that it has imported everything, what it loads and
when it is done. Never imports mlflow or deltalake.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import importlib
import json
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import uvloop

from noria.errors import ServiceError
from serving import generation, state, tracing
from serving.app import App
from serving.batcher import Batcher
from serving.capture import Log
from serving.config import Config
from serving.connections import LAST_WORDS_SECONDS, drain, sweep
from serving.engine import Engine, Unloadable
from serving.http import protocol
from serving.ids import Ids, read_key
from serving.lag import look_at_log
from serving.limits import Limits
from serving.metrics import Metrics
from serving.service import Service

LOOK_SECONDS = 0.2
"""How often the files that say what is known are looked at."""
METRICS_SECONDS = 1.0
"""How often this worker's numbers are written for the other workers to add up."""
ROTATE_SECONDS = 0.5
"""How long a logged row waits at most until its segment is handed over."""
GRACE_SECONDS = 10
"""How long requests in flight may take once the worker is told to end."""
GARBAGE = 5_000
"""Objects that are made before the garbage collector looks at them. With more, what ASGI leaves behind grows too
large: 56 MB of paths in a test."""
OTHER_FILES = 256
"""That a worker may have open besides connections, generously."""
FAILED = 3
"""Exit code of a worker that said why it cannot load its generation."""
PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class Parent:
    """The process that started this one: what it says, and that it lives."""

    def __init__(self, report: int) -> None:
        self._report = report
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._end: Callable[[], None] = lambda: os._exit(1)
        _die_with_parent(signal.SIGKILL)  # loading holds the interpreter, so that a thread may not see the pipe end
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, **said: object) -> None:
        """Report something, as one line of JSON."""
        os.write(self._report, f"{json.dumps(said)}\n".encode())  # not orjson, which refuses a version of 20 digits

    def hear(self) -> str:
        """The next line that it says; waits for it."""
        return self._lines.get()

    def part(self, end: Callable[[], None]) -> None:
        """From now on this process outlives it; `end` is called when it is gone."""
        self._end = end
        _die_with_parent(0)

    def _listen(self) -> None:
        heard = b""
        while part := os.read(0, 65536):  # not sys.stdin: its lock would be held at exit
            *lines, heard = (heard + part).split(b"\n")
            for line in lines:
                self._lines.put(line.decode())
        self._end()
        time.sleep(GRACE_SECONDS + 1)
        os._exit(1)


def _die_with_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class Server(uvicorn.Server):
    """HTTP, and gRPC where it has a port. How HTTP connections end is their own business (`serving.http`)."""

    def __init__(self, config: uvicorn.Config, tell: Callable[..., None], service: Service, grpc: int | None) -> None:
        """`tell` hears `accepting` and, when it ends, `drained`."""
        super().__init__(config)
        self.tell, self.service, self.grpc = tell, service, grpc
        self._rpc: Any = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, and say so."""
        if self.grpc is not None and sockets:
            rpc = importlib.import_module("serving.rpc")  # 25 MB that a server without the port does without
            kind: Any = self.config.http_protocol_class
            self._rpc = await rpc.start(self.service, sockets[0].getsockname()[0], self.grpc, kind.held)
        await super().startup(sockets)
        self.tell(accepting=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is asked, and say when nothing more can be."""
        kind: Any = self.config.http_protocol_class
        kind.draining = True  # also of a connection that was accepted and is not made yet
        endings = [] if self._rpc is None else [asyncio.ensure_future(self._rpc.stop(GRACE_SECONDS))]
        await asyncio.gather(super().shutdown(sockets), self._drain(*endings), *endings)

    async def _drain(self, *endings: asyncio.Future[None]) -> None:
        await drain(self.server_state.connections)
        if endings:  # a call that takes longer is its connection's last
            await asyncio.wait(endings, timeout=LAST_WORDS_SECONDS)
        with suppress(BrokenPipeError):  # the parent is gone
            self.tell(drained=True)


async def run(server: Server, listener: socket.socket, service: Service, folder: Path) -> None:
    """Answer requests until told to end; every logged row is handed over at the end."""
    access_log = service.guard.access_log if service.guard else None
    log, metrics, connections = service.log, service.metrics, server.server_state.connections
    metrics.before += [
        lambda: metrics.log_lost(log.lost),
        lambda: look_at_log(metrics, log.writing(), service.engine.models),
        lambda: metrics.connected(len(connections)),
        lambda: _look_at_queues(metrics, service.batcher),
    ]
    repeated = [
        asyncio.create_task(_repeat(Follower(service.engine, folder).step, LOOK_SECONDS)),
        asyncio.create_task(_repeat(log.rotate, ROTATE_SECONDS)),
        asyncio.create_task(_repeat(metrics.dump, METRICS_SECONDS)),
        asyncio.create_task(sweep(connections)),
        *([asyncio.create_task(_repeat(access_log.flush, ROTATE_SECONDS))] if access_log else []),
    ]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in repeated:
            task.cancel()
        service.records.flush()
        log.rotate()
        metrics.dump(ended=True)
        service.close()


def _look_at_queues(metrics: Metrics, batcher: Batcher) -> None:
    for lane in list(batcher.lanes.values()):
        metrics.queued(lane.workload, len(lane.queue))


class Follower:
    """Keeps what the engine knows about its workloads as the server's files say it."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._watched = state.Watched(*(folder / name for name in ("desired", "state", "failed")))
        self._seen: object = None

    def step(self) -> None:
        """Look once. Raises OSError or ServiceError when a file cannot be read; the next look tries again."""
        mark = self._watched.mark()
        if mark != self._seen:
            self.engine.follow(self.folder)
            self._seen = mark


async def _repeat(step: Callable[[], object], seconds: float) -> None:
    """Call `step` in a thread again and again; a failure is logged once while it lasts, and tried again."""
    last = ""
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(step)
            last = ""
        except Exception as error:
            if str(error) != last:
                logger.exception("%s failed", step.__qualname__)
            last = str(error)


def load(parent: Parent, engine: Engine, path: Path) -> None:
    """Fill the engine with everything that a generation names, and say so; or say why not, and end."""
    try:
        engine.load(generation.read(path), lambda workload, version: parent.tell(loading=workload, version=version))
    except Unloadable as error:
        parent.tell(failed=error.workload, version=error.version, reason=error.reason)
        sys.exit(FAILED)
    gc.collect()
    gc.freeze()
    # Requests leave no circles behind; with the usual 700 a batch of 64 would be searched for them each time.
    gc.set_threshold(GARBAGE)
    parent.tell(loaded=True, memory_mb=psutil.Process().memory_info().rss // 2**20)


def build(engine: Engine, config: Config, folder: Path, source: str, number: int) -> Service:
    """What answers, over an engine. `source` names this process's life, `number` its ids."""
    log, ids = Log(folder / "log", source), Ids(read_key(folder), number)
    return Service(
        engine,
        log,
        Metrics(folder / "metrics", source),
        ids,
        config=config,
        tracer=tracing.start(source),
        folder=folder,
    )


def main() -> None:
    """The process's entry point."""
    given = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    parent = Parent(given.report)
    engine = Engine(given.providers)
    service = build(engine, Config.from_json(given.config), given.folder, given.source, given.number)
    service.limits = _affordable(service.limits, 1 if given.grpc is None else 2)
    config = uvicorn.Config(
        App(service), http=protocol(service), ws="none", lifespan="off", access_log=False,
        log_config=None, server_header=False, timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    config.load()
    server = Server(config, parent.tell, service, given.grpc)
    parent.tell(imported=True)
    load(parent, engine, Path(parent.hear()))
    for model in engine.models.values():
        service.metrics.loaded(model.workload, model.version, model.provider)
    # Also for uvicorn, which raises the signal that ended it once more: the log must still be handed over then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    parent.hear()
    parent.part(lambda: setattr(server, "should_exit", True))
    with suppress(OSError, ServiceError):  # the follower says so, and tries again
        engine.follow(given.folder)
    listener = socket.socket(fileno=given.socket)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(server, listener, service, given.folder))


def _affordable(limits: Limits, ports: int) -> Limits:
    """As many connections to each port as the system gives this process files, when it asks for all that it may
    have."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections * ports + OTHER_FILES
    if most != resource.RLIM_INFINITY and wanted > most:
        afforded = max(1, (most - OTHER_FILES) // ports)
        logger.warning("The system allows %d open files, so there can be %d connections to a port.", most, afforded)
        limits, wanted = replace(limits, connections=afforded), most
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))
    return limits


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One worker of noria's server; started by `noria serve`.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the listening socket")
    parser.add_argument("--report", type=int, required=True, help="descriptor of the pipe to the parent")
    parser.add_argument("--folder", type=Path, required=True, help="the server's state")
    parser.add_argument("--source", required=True, help="this worker's name in the prediction log")
    parser.add_argument("--number", type=int, required=True, help="makes its prediction ids unlike those of others")
    parser.add_argument("--config", required=True, help="how it answers, as JSON (`serving.config`)")
    parser.add_argument("--providers", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto")
    parser.add_argument("--grpc", type=int, default=None, help="port of the gRPC server; none without it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
