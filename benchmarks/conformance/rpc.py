"""Cases over gRPC: the six methods, typed and raw contents, codes of errors; the model repository, which is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from benchmarks.conformance.suite import Case, Failed, expect, same
from benchmarks.conformance.wire import NUMPY, Server, pack, samples, unpack
from serving.messages import MESSAGES, METHODS

FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
Code = grpc.StatusCode


def cases() -> list[Case]:
    """All of them."""
    found = [
        Case("grpc", "ServerLive", lambda server: expect(_call(server, "ServerLive").live, "not live")),
        Case("grpc", "ServerReady", lambda server: expect(_call(server, "ServerReady").ready, "not ready")),
        Case("grpc", "ServerMetadata", lambda server: expect(_call(server, "ServerMetadata").name, "no name")),
        Case("grpc", "ModelReady", _ready),
        Case("grpc", "ModelMetadata", _metadata),
        Case("grpc", "the id is echoed", _id),
        Case("grpc", "a selection of outputs", _selected),
        Case("grpc", "an unknown model", _code(_request("nobody"), Code.NOT_FOUND, Code.INVALID_ARGUMENT)),
        Case(
            "grpc", "an unknown version", _code(_request(model_version="999999"), Code.NOT_FOUND, Code.INVALID_ARGUMENT)
        ),
        Case("grpc", "another datatype", _code(_request(datatype="INT32"), Code.INVALID_ARGUMENT)),
        Case("grpc", "another shape", _code(_request(shape=[3, 2]), Code.INVALID_ARGUMENT)),
        Case("grpc", "raw contents too short", _code(_request(raw=b"\0" * 11), Code.INVALID_ARGUMENT)),
        Case("grpc", "an unknown input", _code(_request(name="z"), Code.INVALID_ARGUMENT)),
        Case("grpc", "an unknown output", _code(_request(output="z"), Code.INVALID_ARGUMENT, Code.NOT_FOUND)),
    ]
    found += [
        Case("repository", "gRPC lists the models", _listed, is_open=True),
        Case("repository", "gRPC lists the same as REST", _listed_alike, is_open=True),
        Case("repository", "gRPC refuses to load what is not there", _no_load, is_open=True),
    ]
    for datatype in NUMPY:
        found.append(Case("grpc", f"{datatype}, raw", lambda server, one=datatype: _infer(server, one, raw=True)))
        if datatype in FIELDS:
            found.append(
                Case("grpc", f"{datatype}, typed", lambda server, one=datatype: _infer(server, one, raw=False))
            )
    return found


def _call(server: Server, method: str, request: Any = None) -> Any:
    request_type, response_type = (MESSAGES[name] for name in METHODS[method])
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_type.FromString,
        )
        try:
            return call(request or request_type(), timeout=30)
        except grpc.RpcError as error:
            raise Failed(f"{error.code().name}: {error.details()}") from None


def _ready(server: Server) -> None:
    expect(_call(server, "ModelReady", MESSAGES["ModelReadyRequest"](name="same_fp32")).ready, "not ready")


def _metadata(server: Server) -> None:
    found = _call(server, "ModelMetadata", MESSAGES["ModelMetadataRequest"](name="add_sub"))
    expect({one.name for one in found.inputs} == {"a", "b"}, "inputs")
    expect(all(one.datatype == "FP32" and list(one.shape) == [-1, 4] for one in found.inputs), "datatype or shape")


def _listed(server: Server) -> None:
    found = _call(server, "RepositoryIndex").models
    expect(("same_fp32", "READY") in {(one.name, one.state) for one in found}, f"{len(found)} models")


def _listed_alike(server: Server) -> None:
    fields = ("name", "version", "state", "reason")
    grpc_index = {tuple(getattr(one, field) for field in fields) for one in _call(server, "RepositoryIndex").models}
    rest = server.http.post("/v2/repository/index").json()
    expect(
        grpc_index == {tuple(one.get(field, "") for field in fields) for one in rest}, f"REST lists {str(rest)[:80]}"
    )


def _no_load(server: Server) -> None:
    request = MESSAGES["RepositoryModelLoadRequest"](model_name="nobody")
    try:
        _call(server, "RepositoryModelLoad", request)
    except Failed as failed:
        blames = str(failed).split(":")[0] in (Code.INVALID_ARGUMENT.name, Code.NOT_FOUND.name)
        expect(blames, str(failed))
    else:
        raise Failed("it was loaded")


def _request(model: str = "same_fp32", **changes: Any) -> Any:
    request = MESSAGES["ModelInferRequest"](model_name=model, model_version=changes.get("model_version", ""), id="42")
    request.inputs.add(
        name=changes.get("name", "x"), datatype=changes.get("datatype", "FP32"), shape=changes.get("shape", [1, 3])
    )
    request.raw_input_contents.append(changes.get("raw", np.array([1, 2, 3], np.float32).tobytes()))
    if "output" in changes:
        request.outputs.add(name=changes["output"])
    return request


def _code(request: Any, *codes: Any) -> Callable[[Server], None]:
    def check(server: Server) -> None:
        try:
            _call(server, "ModelInfer", request)
        except Failed as failed:
            expect(str(failed).split(":")[0] in {code.name for code in codes}, str(failed))
        else:
            raise Failed("it was answered")

    return check


def _id(server: Server) -> None:
    found = _call(server, "ModelInfer", _request())
    expect(found.id == "42" and found.model_name == "same_fp32", f"id {found.id!r}")


def _selected(server: Server) -> None:
    request = _request("several", shape=[1, 2], raw=b"\0" * 8, output="whole")
    found = [one.name for one in _call(server, "ModelInfer", request).outputs]
    expect(found == ["whole"], str(found))


def _infer(server: Server, datatype: str, *, raw: bool) -> None:
    array = samples(datatype)
    request = MESSAGES["ModelInferRequest"](model_name=f"same_{datatype.lower()}")
    sent = request.inputs.add(name="x", datatype=datatype, shape=array.shape)
    if raw:
        request.raw_input_contents.append(pack(datatype, array))
    else:
        values = [one.encode() if datatype == "BYTES" else one for one in array.ravel().tolist()]
        getattr(sent.contents, FIELDS[datatype]).extend(values)
    response = _call(server, "ModelInfer", request)
    (output,) = response.outputs
    expect(output.datatype == datatype, output.datatype)
    if response.raw_output_contents:
        found = unpack(datatype, output.shape, response.raw_output_contents[0])
    else:
        values = [one.decode() if datatype == "BYTES" else one for one in getattr(output.contents, FIELDS[datatype])]
        found = np.array(values, NUMPY[datatype]).reshape(output.shape)
    same(found, array)
