"""The Open Inference Protocol over gRPC: the same models, batches, limits, roles and refusals as over HTTP.

A client's deadline is honoured before the run. Imported only where a port for gRPC is configured: grpc takes 25 MB. Not
here: tensors (`serving.rpc_infer`), the messages (`serving.messages`), what operators do (`serving.operate`).
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from importlib.metadata import version as installed
from typing import Any

import grpc
import grpc.aio

from serving.batch import Call
from serving.holding import Held
from serving.messages import METHODS
from serving.model import Model
from serving.operate import Operation, Operator, operate
from serving.routes import is_version
from serving.rpc_calls import Calls
from serving.rpc_drain import leave
from serving.rpc_handler import SERVICE, Caller, Handler
from serving.rpc_infer import decode_infer
from serving.service import Service
from serving.tensors import EXTENSIONS
from serving.wire import Refusal

ONE_REPOSITORY = "There is one repository here; leave 'repository_name' empty."
STREAMS = 256
"""Calls of one connection at a time; a client lets more wait."""


class Methods:
    """The methods of the service: serialised messages in and out."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def ServerLive(self, request: Any, caller: Caller) -> Any:
        """Whether the process answers."""
        return {"live": True}

    async def ServerReady(self, request: Any, caller: Caller) -> Any:
        """Whether every workload that should serve does."""
        return {"ready": self.service.look().ready}

    async def ModelReady(self, request: Any, caller: Caller) -> Any:
        """Whether a model answers. An unknown one is NOT_FOUND, one that is not loaded yet is not ready."""
        try:
            self.service.check_ready(request.name, _version(request.version, request.name))
        except Refusal as refusal:
            if refusal.status != 503:
                raise
            return {"ready": False}
        return {"ready": True}

    async def ServerMetadata(self, request: Any, caller: Caller) -> Any:
        """The server's name, version and extensions."""
        return {"name": "noria", "version": installed("noria"), "extensions": EXTENSIONS}

    async def ModelMetadata(self, request: Any, caller: Caller) -> Any:
        """The inputs and outputs of a model."""
        model = self._model(request)
        tensors = {
            side: [{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in found]
            for side, found in (("inputs", model.inputs), ("outputs", model.outputs))
        }
        return {
            "name": model.workload,
            "versions": [str(model.version)],
            "platform": "onnxruntime_onnx",
            **tensors,
        }

    async def ModelInfer(self, request: Any, caller: Caller) -> Any:
        """One inference, in a batch with whatever else is there."""
        call = Call(
            "grpc_infer", request.model_name, partial(decode_infer, request), lambda _: None, request.ByteSize(),
            _version(request.model_version, request.model_name), caller.deadline(),
            traceparent=caller.header("traceparent") or b"",
        )  # fmt: skip
        caller.call = call
        answer = await self.service.batcher.ask(call)
        model = self.service.engine.models.get(request.model_name)
        caller.version = model.version if model else None
        if answer.status != 200:
            raise Refusal(answer.status, answer.error)
        return answer

    async def RepositoryIndex(self, request: Any, caller: Caller) -> Any:
        """Every model that is known, for operators."""
        if request.repository_name:
            raise Refusal(400, ONE_REPOSITORY)
        return {"models": await self._operate(Operation("index", is_ready=request.ready), caller)}

    async def RepositoryModelLoad(self, request: Any, caller: Caller) -> Any:
        """Load a model of the repository, for operators; answers when every worker serves it."""
        name = _named(request)
        await self._operate(Operation("load", name, parameters=request.parameters), caller)
        return {"model_name": name, "isLoaded": True}

    async def RepositoryModelUnload(self, request: Any, caller: Caller) -> Any:
        """Serve a model no more, for operators."""
        name = _named(request)
        await self._operate(Operation("unload", name, parameters=request.parameters), caller)
        return {"model_name": name, "isUnloaded": True}

    async def _operate(self, operation: Operation, caller: Caller) -> Any:
        return await operate(self.service, operation, Operator(caller.path, caller.key, caller.address()))

    def _model(self, request: Any) -> Model:
        return self.service.model(request.name, _version(request.version, request.name))


def _version(text: str, workload: str) -> int | None:
    if not text:
        return None
    if not is_version(text):
        raise Refusal(404, f"There is no version '{text[:40]}' of {workload[:60]}; versions are numbers.")
    return int(text)


def _named(request: Any) -> str:
    """The model of an order: as Triton's clients name it, or as KServe's do, in the only field that they send."""
    if request.repository_name and request.model_name:
        raise Refusal(400, ONE_REPOSITORY)
    return str(request.model_name or request.repository_name)


class Listening:
    """A server that listens."""

    def __init__(self, server: grpc.aio.Server, port: int, gate: asyncio.Event, watch: asyncio.Future[Any]) -> None:
        self.server, self.port, self._gate, self._watch = server, port, gate, watch

    async def stop(self, grace: float) -> None:
        """Let the clients go and end, within so many seconds; what they ask is answered."""
        await leave(self.port, self._gate, grace / 2)
        await self.server.stop(grace / 2)
        self._watch.cancel()


async def start(service: Service, host: str, port: int, held: Held) -> Listening:
    """Listen for gRPC in the running loop. End it with `await listening.stop(grace)`.

    Several workers may listen on the same port: the system spreads connections over them. `held` is what they hold, and
    HTTP's.

    Raises:
        OSError: the port is taken.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_noteworthy)
    limits = service.limits
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", STREAMS),
            ("grpc.max_allowed_incoming_connections", limits.connections),
            ("grpc.max_connection_idle_ms", _ms(limits.idle_seconds)),
            ("grpc.server_handshake_timeout_ms", _ms(limits.header_seconds)),
        ],
    )
    methods, gate, calls = Methods(service), asyncio.Event(), Calls(limits, held)
    gate.set()
    handlers = {
        name: grpc.stream_unary_rpc_method_handler(Handler(service, name, getattr(methods, name), calls, gate).handle)
        for name in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {host}:{port}: {error}") from None
    await server.start()
    return Listening(server, bound, gate, asyncio.gather(calls.watch(), calls.let_go(bound)))


def _noteworthy(record: logging.LogRecord) -> bool:
    """Not that a client left before it had its answer: grpc writes a traceback for each, and anybody may leave."""
    return not record.getMessage().startswith("ExecuteBatchError")


def _ms(seconds: float) -> int:
    """For grpc, whose numbers have 32 bits."""
    return min(int(seconds * 1000), 2**31 - 1)
