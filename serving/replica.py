"""One replica of the server on a cluster: the same ASGI app, serving what the rollout says, logging on its own node.

    <home>/nodes/<node>/log        the prediction log, as one machine's server writes it
    <home>/nodes/<node>/bundles    bundles that came over the wire, by version and digest

A replica loads a version beside the one that answers and then replaces it, so an alias change ends no process and drops
no connection. It imports neither Ray nor MLflow. Not here: what should serve (`serving.rollout`), how many replicas
there are and how requests reach them (`serving.cluster`).
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

from noria.providers import Providers
from serving.app import App, Receive, Scope, Send
from serving.attendance import attend
from serving.config import Config
from serving.copies import copy_of, drop_damaged, found, holds, put, sweep
from serving.engine import Engine
from serving.node_drain import NodeDrain
from serving.service import Service
from serving.state import Desired, State, now
from serving.worker import METRICS_SECONDS, ROTATE_SECONDS, build

LOOK_SECONDS = 0.5
"""How often the rollout is asked what should serve."""
DRAIN_SECONDS = 1.0
TIDY_SECONDS = 60.0
START_SECONDS = 120
"""How long a starting replica waits to serve all that the others serve."""
LEAVE_SECONDS = 2
LAST_DRAIN_SECONDS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What the rollout wants of a replica for one workload."""

    desired: Desired
    digest: str = ""
    """SHA-256 of the bundle's manifest: names the files wherever they lie."""
    proven: bool = False
    """Another replica serves it already."""


@dataclass(frozen=True)
class Orders:
    """What the rollout wants of a replica."""

    orders: tuple[Order, ...] = ()
    wait: bool = False
    """More will come soon: another replica is trying a first version, or the aliases were not read yet."""


class Rollout(Protocol):
    """What a replica asks, over a handle of Ray Serve: each name has a `remote` that can be awaited."""

    join: Any
    """`join.remote() -> (key, number)`"""
    look: Any
    """`look.remote(replica, states) -> Orders`"""
    leave: Any
    """`leave.remote(replica)`"""
    files: Any
    """`files.remote(folder) -> dict[str, bytes]`"""


def assemble(engine: Engine, config: str, node: Path, name: str, number: int) -> Service:
    """What answers, over an engine: made as a worker of `noria serve` makes it, in the node's folder."""
    return build(engine, Config.from_json(config), node, name, number)


class Replica:
    """Serves until the cluster ends it. All methods but `check_health` run from the ASGI lifespan."""

    def __init__(
        self, rollout: Rollout, home: str, lake: str, config: str, providers: Providers, *, load_seconds: float
    ) -> None:
        self.rollout, self.name, self.config = rollout, uuid.uuid4().hex[:12], config
        self.node = Path(home) / "nodes" / platform.node()
        self.engine = Engine(providers)
        self.drain = NodeDrain(self.node, lake)
        self.service: Service
        self.answers: App
        self._living: IO[bytes]
        self.stuck = ""
        """Why this process cannot go on: what it began to load computes for ever."""
        self.unusable: dict[str, str] = {}
        """By workload, why a version that other replicas serve cannot be served here."""
        self._load_seconds = load_seconds
        self._states: dict[str, State] = {}
        self._wanted: set[Path] = set()
        """Copies of what the rollout names."""
        self._tasks: list[asyncio.Task[None]] = []
        self._rollout_silent = ""

    def __serve_build_asgi_app__(self) -> Living:
        """What Ray Serve asks for once this object is made."""
        return Living(self)

    async def check_health(self) -> None:
        """Raises RuntimeError when this replica should be replaced. No champion at all is nobody's fault."""
        if fault := self._fault():
            raise RuntimeError(fault)
        if self.engine.models and not self.engine.ready:
            raise RuntimeError("A workload that should serve does not.")
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"{task.get_name()} has ended.")

    def _fault(self) -> str:
        return " ".join(filter(None, [self.stuck, *self.unusable.values()]))

    async def live(self, receive: Receive, send: Send) -> None:
        """The ASGI lifespan: ready when it serves what the others serve, ended when its log is handed over."""
        await receive()
        await self._join()
        began = time.monotonic()
        while await self._look() and not self._fault() and time.monotonic() - began < START_SECONDS:
            await asyncio.sleep(0.1)
        if fault := self._fault():
            await asyncio.to_thread(self._end)
            await send({"type": "lifespan.startup.failed", "message": fault})
            return
        repeated: dict[str, tuple[Callable[[], Any], float]] = {
            "following": (self._look, LOOK_SECONDS),
            "rotating": (lambda: asyncio.to_thread(self.service.log.rotate), ROTATE_SECONDS),
            "counting": (lambda: asyncio.to_thread(self.service.metrics.dump), METRICS_SECONDS),
            "tidying": (lambda: asyncio.to_thread(sweep, self.node / "bundles", self._wanted), TIDY_SECONDS),
            "draining": (lambda: asyncio.to_thread(self.drain.step), DRAIN_SECONDS),
        }
        access_log = self.service.guard.access_log if self.service.guard else None
        if access_log is not None:
            repeated["noting"] = (lambda: asyncio.to_thread(access_log.flush), ROTATE_SECONDS)
        self._tasks = [asyncio.create_task(_repeat(*what), name=name) for name, what in repeated.items()]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in self._tasks:
            task.cancel()
        await self._leave()
        await asyncio.to_thread(self._end)
        await send({"type": "lifespan.shutdown.complete"})

    async def _join(self) -> None:
        """Get what all replicas must agree on, and make the app; waits for the rollout to be there."""
        while True:
            try:
                key, number = await self.rollout.join.remote()
                break
            except Exception as error:  # whatever Ray raises while the rollout starts, or the lake does not answer
                logger.warning("The rollout does not answer yet: %s", " ".join(str(error).split())[-300:])
                await asyncio.sleep(1)
        _keep(self.node / "id.key", key)
        self._living = attend(self.node / "metrics", self.name)
        self.service = assemble(self.engine, self.config, self.node, self.name, number)
        self.answers = App(self.service)

    async def _leave(self) -> None:
        with suppress(Exception):  # whatever Ray raises where the rollout was ended first
            await asyncio.wait_for(self.rollout.leave.remote(self.name), LEAVE_SECONDS)

    def _end(self) -> None:
        """Every logged row is handed over; what does not reach the lake now is the next replica's on this node."""
        self.service.records.flush()
        self.service.log.rotate()
        self.service.metrics.dump(ended=True)
        self.service.close()
        self._living.close()
        self.drain.finish(LAST_DRAIN_SECONDS)

    async def _look(self) -> bool:
        """Ask once and carry out; whether there is more to come before this replica should answer requests."""
        orders = await self._ask(tuple(self._states.values()), "serving")
        if orders is None:
            return True
        more = orders.wait
        self._wanted = {self._copy(order) for order in orders.orders}
        for order in orders.orders:
            known = self._states.get(order.desired.workload)
            if order.desired.version is None:
                self.engine.known.setdefault(order.desired.workload, order.desired)
            elif known is None or known.asked != order.desired.asked:
                await self._carry_out(order)
                more = True  # what came of it is not said yet
        return more

    async def _carry_out(self, order: Order) -> None:
        """Load beside what serves; the rollout hears that this replica lives meanwhile."""
        taking = asyncio.ensure_future(self._take(order))
        while not (await asyncio.wait({taking}, timeout=1.0))[0]:
            await self._ask((), "loading")
        state = taking.result()
        workload, metrics = order.desired.workload, self.service.metrics
        if state.status == "serving":
            self.engine.known[workload] = order.desired
            model = self.engine.models[workload]
            if state.replaced is not None and state.replaced != model.version:
                metrics.unloaded(workload, state.replaced)
            metrics.loaded(workload, model.version, model.provider)
            self.unusable.pop(workload, None)
        elif order.proven:
            self.unusable[workload] = f"Other replicas serve it, this one cannot: {state.reason}"
        self._states[workload] = state

    async def _ask(self, states: tuple[State, ...], meanwhile: str) -> Orders | None:
        """What the rollout wants; None where it does not answer, which is said once while it lasts."""
        try:
            orders: Orders = await self.rollout.look.remote(self.name, states)
        except Exception as error:  # whatever Ray raises while the rollout is restarted: what serves goes on serving
            if str(error) != self._rollout_silent:
                logger.warning("The rollout does not answer (%s); %s goes on.", type(error).__name__, meanwhile)
            self._rollout_silent = str(error)
            return None
        self._rollout_silent = ""
        return orders

    async def _take(self, order: Order) -> State:
        desired = order.desired
        folder = Path(desired.folder)
        if not holds(folder, order.digest):  # another node's path
            folder = self._copy(order)
            if not found(folder, order.digest):
                files = await self.rollout.files.remote(desired.folder)
                await asyncio.to_thread(put, folder, files)
        state = await self._load(replace(desired, folder=str(folder)))
        if state.status == "failed" and folder.is_relative_to(self.node):
            await asyncio.to_thread(drop_damaged, folder)
        return state

    def _copy(self, order: Order) -> Path:
        return copy_of(self.node / "bundles", order.desired.workload, order.desired.version, order.digest)

    async def _load(self, desired: Desired) -> State:
        """Into an engine of its own first: what is ready after this replica stopped waiting meets no request."""
        aside = replace(self.engine, models=dict(self.engine.models), states=dict(self.engine.states), failures={})
        try:
            state = await asyncio.wait_for(asyncio.to_thread(aside.take, desired), self._load_seconds)
        except TimeoutError:
            version = f"Version {desired.version} of {desired.workload}"
            self.stuck = f"{version} was not loaded after {self._load_seconds:g} s (NORIA_LOAD_SECONDS)."
            logger.error("%s Nothing ends its thread, so this replica asks to be replaced.", self.stuck)
            return State(desired.workload, desired.version or 0, "failed", self.stuck, now(), desired.asked)
        if state.status == "serving":
            self.engine.models[desired.workload] = aside.models[desired.workload]
            self.engine.states[desired.workload] = state
            self.engine.failures.pop(desired.workload, None)
        else:
            self.engine.failures[desired.workload] = state
        return state


class Living:
    """The ASGI app of a replica: the lifespan is the replica's, everything else the app's."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "lifespan":
            await self.replica.live(receive, send)
        else:
            await self.replica.answers(scope, receive, send)


async def _repeat(step: Callable[[], Any], seconds: float) -> None:
    """Await `step` again and again; a failure is logged once while it lasts, and the next call tries again."""
    last = ""
    while True:
        await asyncio.sleep(seconds)
        try:
            await step()
            last = ""
        except Exception as error:
            if str(error) != last:
                logger.exception("A step of this replica failed; it is tried again.")
            last = str(error)


def _keep(path: Path, key: bytes) -> None:
    """The cluster's key as this node's, aside and renamed; only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{uuid.uuid4().hex}.aside")
    aside.touch(0o600)
    aside.write_bytes(key)
    aside.replace(path)
