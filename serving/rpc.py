"""The Open Inference Protocol over gRPC: the same models, batches, limits and refusals as over HTTP.

Tensors come as typed contents or as raw bytes (`serving.binary`), and the answer has the form of the request; FP16 has
no typed form and is always raw. A client's deadline is honoured before the run. Imported only where a port for gRPC is
configured: grpc takes 25 MB. Not here: the messages (`serving.messages`), the model repository.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version as installed
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError

from serving import binary
from serving.audit import Access
from serving.batch import Call
from serving.columns import Given
from serving.datatypes import NUMPY
from serving.messages import MESSAGES, METHODS
from serving.model import Model
from serving.routes import is_version
from serving.service import Service
from serving.tensors import EXTENSIONS, check_output, elements, read_rows, results
from serving.wire import Answer, Refusal, Rows, Scored

SERVICE = "inference.GRPCInferenceService"
CONTENTS = {
    "BOOL": "bool_contents",
    **{f"INT{bits}": "int_contents" for bits in (8, 16, 32)},
    **{f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)},
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of typed contents that a datatype's values are in."""
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
BESIDE = 64
"""Calls that may be under way beside those that wait for a model."""

logger = logging.getLogger(__name__)


class Infer:
    """A decoded request."""

    __slots__ = ("id", "raw", "rows", "wanted")

    def __init__(self, rows: Rows, name: str, wanted: dict[str, bool] | None, raw: bool) -> None:
        self.rows, self.id, self.wanted, self.raw = rows, name, wanted, raw

    def answer(self, scored: Scored) -> Answer:
        """A serialised ModelInferResponse."""
        model = scored.model
        response = MESSAGES["ModelInferResponse"](
            model_name=model.workload, model_version=str(model.version), id=self.id
        )
        found = results(scored, self.wanted)
        raw = self.raw or any(datatype not in CONTENTS for _, datatype, _, _ in found)
        for name, datatype, shape, values in found:
            output = response.outputs.add(name=name, datatype=datatype, shape=shape)
            if raw:
                response.raw_output_contents.append(binary.write(datatype, values))
                continue
            values = values.tolist() if isinstance(values, np.ndarray) else values
            if datatype == "BYTES":
                values = [value.encode("utf-8", "surrogatepass") for value in values]
            getattr(output.contents, CONTENTS[datatype]).extend(values)
        return Answer(200, response.SerializeToString(), self.rows.count)


def decode_infer(request: Any, model: Model) -> Infer:
    """The rows of a ModelInferRequest. Raises Refusal 400 or 413."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise Refusal(400, f"There are {len(request.inputs)} inputs and {len(raw)} raw contents; send one an input.")
    given: dict[str, Given] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in given:
            raise Refusal(400, f"The input '{tensor.name}' is there twice.")
        shape = list(tensor.shape)
        count = elements(tensor.name, shape)
        if raw:
            if tensor.HasField("contents"):
                raise Refusal(400, f"The input '{tensor.name}' has both contents and raw contents; send one of them.")
            values: Any = binary.read(tensor.name, tensor.datatype, shape, raw[index])
        else:
            values = _typed(tensor, shape, count)
        given[tensor.name] = (tensor.datatype, shape, values)
    rows = read_rows(model, given)
    wanted: dict[str, bool] = {}
    for output in request.outputs:
        check_output(output.name, wanted, model)
        for unserved in ("classification", "shared_memory_region"):
            if unserved in output.parameters:
                raise Refusal(400, f"The output '{output.name}' is asked for with {unserved}, which is not served.")
        wanted[output.name] = True
    return Infer(rows, request.id, wanted or None, bool(raw))


def _typed(tensor: Any, shape: list[int], count: int) -> Any:
    """Typed contents: floating ones as an array, the others as a list, whose values are looked at as JSON's are."""
    name, datatype = tensor.name, tensor.datatype
    if datatype not in CONTENTS:
        raise Refusal(400, f"The input '{name}' has the datatype {datatype[:20]}, which has no typed contents.")
    values = getattr(tensor.contents, CONTENTS[datatype])
    if len(values) != count:
        raise Refusal(400, f"The input '{name}' has {len(values)} {CONTENTS[datatype]} and the shape says {count}.")
    if datatype in ("FP32", "FP64"):
        return np.array(values, NUMPY[datatype]).reshape(shape)
    if datatype != "BYTES":
        return list(values)
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise Refusal(400, f"The input '{name}' has a string that is not UTF-8.") from None


class Methods:
    """The methods of the service: serialised messages in and out."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Whether the process answers."""
        return {"live": True}

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Whether every workload that should serve does."""
        return {"ready": self.service.look().ready}

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether a model answers. An unknown one is NOT_FOUND, one that is not loaded yet is not ready."""
        try:
            self.service.check_ready(request.name, _version(request.version, request.name))
        except Refusal as refusal:
            if refusal.status != 503:
                raise
            return {"ready": False}
        return {"ready": True}

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """The server's name, version and extensions."""
        return {"name": "noria", "version": installed("noria"), "extensions": EXTENSIONS}

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
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

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """One inference, in a batch with whatever else is there."""
        remaining = context.time_remaining()
        call = Call(
            "grpc_infer", request.model_name, partial(decode_infer, request), lambda _: None, request.ByteSize(),
            _version(request.model_version, request.model_name),
            None if remaining is None else time.perf_counter() + remaining,
        )  # fmt: skip
        answer = await self.service.batcher.ask(call)
        if answer.status != 200:
            raise Refusal(answer.status, answer.error)
        return answer

    def _model(self, request: Any) -> Model:
        return self.service.model(request.name, _version(request.version, request.name))


def _version(text: str, workload: str) -> int | None:
    if not text:
        return None
    if not is_version(text):
        raise Refusal(404, f"There is no version '{text[:40]}' of {workload[:60]}; versions are numbers.")
    return int(text)


class Line:
    """What is known of one call for its line in the access log."""

    __slots__ = ("began", "client", "key", "model", "path", "received")

    def __init__(self, path: str, client: str, received: int) -> None:
        self.path, self.client, self.received = path, client, received
        self.began, self.key, self.model = time.perf_counter(), "", ""

    def add(self, service: Service, answer: Answer) -> None:
        """Write it, where there is such a log; `answer` has HTTP's status."""
        if service.guard is not None and service.guard.access_log is not None:
            model = service.engine.models.get(self.model)
            service.guard.access_log.add(Access(
                time.time(), "", self.client, self.key, "POST", self.path, answer.status, self.received,
                len(answer.body), (time.perf_counter() - self.began) * 1000, answer.rows,
                model.version if model else None,
            ))  # fmt: skip


def _handler(service: Service, name: str, method: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """A method from bytes to bytes: admission, parsing, and refusals as the protocol's codes."""
    path = f"/{SERVICE}/{name}"
    request_type, response_type = (MESSAGES[one] for one in METHODS[name])

    async def handle(body: bytes, context: Any) -> bytes:
        line = Line(path, _address(context.peer()), len(body))
        try:
            if service.guard is not None:
                keys = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
                line.key = service.guard.call(path, keys[0].encode() if keys else None, line.client).name
            request = request_type.FromString(body)
            line.model = getattr(request, "model_name", "")
            found = await method(request, context)
            whole = isinstance(found, Answer)
            answer = found if whole else Answer(200, bytes(response_type(**found).SerializeToString()))
            line.add(service, answer)
            return answer.body
        except Refusal as refusal:
            status, sentence = refusal.status, refusal.message
        except DecodeError:
            status, sentence = 400, f"The body is not a {METHODS[name][0]}."
        except Exception:
            logger.exception("%s failed", path)
            status, sentence = 500, FAULT
        line.add(service, Answer(status, b""))
        code = CODES.get(status, grpc.StatusCode.INTERNAL)
        return bytes(await context.abort(code, sentence[:600].encode("utf-8", "replace").decode()))

    return grpc.unary_unary_rpc_method_handler(handle)


def _address(peer: str) -> str:
    """The IP address of `ipv4:127.0.0.1:5000` or `ipv6:[::1]:5000`, percent-encoded as gRPC does."""
    return peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")


async def start(service: Service, host: str, port: int) -> tuple[grpc.aio.Server, int]:
    """Listen for gRPC in the running loop; returns the server and its port. End it with `await server.stop(grace)`.

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
    methods = Methods(service)
    handlers = {name: _handler(service, name, getattr(methods, name)) for name in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {host}:{port}: {error}") from None
    await server.start()
    return server, bound
