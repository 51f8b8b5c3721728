"""The Open Inference Protocol over gRPC: the same models, batches, limits, roles and refusals as over HTTP.

A client's deadline is honoured before the run. Imported only where a port for gRPC is configured: grpc takes 25 MB. Not
here: tensors (`serving.rpc_infer`), the messages (`serving.messages`), what operators do (`serving.operate`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version as installed
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from serving.audit import Access
from serving.batch import Call
from serving.messages import MESSAGES, METHODS, bounded
from serving.model import Model
from serving.operate import Operation, Operator, operate
from serving.routes import is_version
from serving.rpc_drain import leave
from serving.rpc_infer import decode_infer
from serving.service import Service, deadline
from serving.tensors import EXTENSIONS
from serving.wire import Answer, Refusal

SERVICE = "inference.GRPCInferenceService"
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""What a refusal's HTTP status is called here; any other is INTERNAL."""
FAULT = "The server has a fault; its log tells more."
ONE_REPOSITORY = "There is one repository here; leave 'repository_name' empty."
TIMEOUT = "x-request-timeout-ms"
BESIDE = 64
"""Calls that may be under way beside those that wait for a model."""

logger = logging.getLogger(__name__)


class Caller:
    """Who makes a call, and how."""

    __slots__ = ("context", "headers", "key", "path", "version")

    def __init__(self, path: str, context: Any) -> None:
        """`path` is `/service/Method`."""
        self.path, self.context, self.key = path, context, ""
        self.version: int | None = None  # of the model that was asked
        self.headers: dict[str, str] = dict(context.invocation_metadata() or ())

    def header(self, name: str) -> bytes | None:
        """A field of the metadata."""
        value = self.headers.get(name)
        return None if value is None else value.encode()

    def address(self) -> str:
        """The IP address of `ipv4:127.0.0.1:5000` or `ipv6:[::1]:5000`, percent-encoded as gRPC does."""
        peer: str = self.context.peer()
        return peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")

    def deadline(self) -> float | None:
        """`time.perf_counter()` after which nobody wants the answer: gRPC's deadline or the header's, the earlier."""
        remaining, timeout = self.context.time_remaining(), self.header(TIMEOUT)
        ends = [] if remaining is None else [time.perf_counter() + remaining]
        if timeout is not None:
            ends.append(deadline(timeout))
        return min(ends, default=None)


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


def _handler(service: Service, name: str, method: Callable[[Any, Caller], Awaitable[Any]], gate: asyncio.Event) -> Any:
    """A method from bytes to bytes: admission, parsing, and refusals as the protocol's codes."""
    path = f"/{SERVICE}/{name}"
    request_type, response_type = (MESSAGES[one] for one in METHODS[name])

    async def handle(body: bytes, context: Any) -> bytes:
        began, caller = time.perf_counter(), Caller(path, context)
        status, code, sentence, answer = 500, grpc.StatusCode.INTERNAL, FAULT, Answer(500, b"")
        try:
            if service.guard is not None:
                caller.key = service.admit_call(path, caller.header("authorization"), caller.address())
            found = await method(request_type.FromString(bounded(body)), caller)
            answer = found if isinstance(found, Answer) else Answer(200, response_type(**found).SerializeToString())
            status = 200
        except Refusal as refusal:
            status, sentence = refusal.status, refusal.message
            code = CODES.get(status, grpc.StatusCode.INTERNAL)
        except DecodeError:
            status, code, sentence = 400, grpc.StatusCode.INVALID_ARGUMENT, f"The body is not a {METHODS[name][0]}."
        except Exception:
            logger.exception("%s failed", path)
        if name != "ModelInfer":  # the batcher counts these
            service.metrics.answered("page", "", 0, status, time.perf_counter() - began)
        if service.guard is not None and service.guard.access_log is not None:
            received, sent, ms = len(body), len(answer.body), (time.perf_counter() - began) * 1000
            service.guard.access_log.add(Access(
                time.time(), caller.headers.get("x-request-id", ""), caller.address(), caller.key, "POST", path, status,
                received, sent, ms, answer.rows, caller.version,
            ))  # fmt: skip
        if not gate.is_set():
            await gate.wait()
        if status == 200:
            return answer.body
        # Not `abort`: the call would keep what that raises, which keeps this frame and its message, and so the call.
        context.set_code(code)
        context.set_details(sentence[:600].encode("utf-8", "replace").decode())
        return b""

    return grpc.unary_unary_rpc_method_handler(handle)


class Listening:
    """A server that listens."""

    def __init__(self, server: grpc.aio.Server, port: int, gate: asyncio.Event) -> None:
        self.server, self.port, self._gate = server, port, gate

    async def stop(self, grace: float) -> None:
        """Let the clients go and end, within so many seconds; what they ask is answered."""
        await leave(self.port, self._gate, grace / 2)
        await self.server.stop(grace / 2)


async def start(service: Service, host: str, port: int) -> Listening:
    """Listen for gRPC in the running loop. End it with `await listening.stop(grace)`.

    Several workers may listen on the same port: the system spreads connections over them.

    Raises:
        OSError: the port is taken.
    """
    limits = service.limits
    server = grpc.aio.server(
        maximum_concurrent_rpcs=limits.queue + BESIDE,
        options=[
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.max_send_message_length", -1),
        ],
    )
    methods, gate = Methods(service), asyncio.Event()
    gate.set()
    handlers = {name: _handler(service, name, getattr(methods, name), gate) for name in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {host}:{port}: {error}") from None
    await server.start()
    return Listening(server, bound, gate)
