"""Cases about tensors: every datatype in every form, and values that are not of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

from benchmarks.conformance.suite import Case, expect, fine, refused, same
from benchmarks.conformance.wire import LENGTH, NUMPY, Server, binary, pack, samples, tensor

ALL_BINARY = {"parameters": {"binary_data_output": True}}
WRONG: dict[str, list[Any]] = {
    "BOOL": ["yes", None, {}],
    "UINT8": [256, 0, 0],
    "INT8": [-129, 0, 0],
    "INT64": [2**63, 0, 0],
    "UINT64": [-1, 0, 0],
    "INT32": ["one", "2", "3"],
    "FP32": ["a", "b", "c"],
    "BYTES": [1, 2, 3],
}
"""Values that are not of the datatype; whether the server coerces or refuses is left to it, but it must not break."""


def cases() -> list[Case]:
    """All of them."""
    found: list[Case] = []
    for datatype in NUMPY:
        half = datatype == "FP16"  # "there is not a standard representation"
        found += [
            Case("json", f"{datatype}, flat", _case(_json, datatype), half),
            Case("json", f"{datatype}, nested", _case(_nested, datatype), half),
            Case("binary", f"{datatype} in", _case(_bytes_in, datatype), half),
            Case("binary", f"{datatype} in and out", _case(_bytes_both, datatype)),
            Case("binary", f"{datatype} with a byte too few", _case(_cut, datatype)),
        ]
        if not half:
            found.append(Case("binary", f"{datatype} out", _case(_bytes_out, datatype)))
    for datatype in WRONG:
        found.append(Case("json", f"{datatype} of other values is no fault", _case(_no_fault, datatype)))
    found += [
        Case("json", "one row", lambda server: _rows(server, 1)),
        Case("json", "a thousand rows", lambda server: _rows(server, 1000)),
        Case("json", "a model of one fixed shape", _fixed),
        Case("json", "two inputs in any order", _order),
        Case("json", "outputs of several datatypes", _several),
        Case("json", "a tensor without elements", _empty, is_open=True),
        Case("json", "null in FP32", _null, is_open=True),
        Case("mixed", "one input in bytes, one in JSON", _mixed),
        Case("mixed", "one output in bytes, one in JSON", _mixed_out),
        Case("mixed", "outputs in bytes keep their order", _several_bytes),
        Case("mixed", "an output's choice overrides the request's", _override),
        Case("binary", "65,536 values", _large),
        Case("binary", "the length of the response's JSON is exact", _exact),
        Case("binary", "FP32 keeps NaN and infinities", _not_finite),
    ]
    return found


def _case(check: Callable[[Server, str], None], datatype: str) -> Callable[[Server], None]:
    return lambda server: check(server, datatype)


def _model(datatype: str) -> str:
    return f"same_{datatype.lower()}"


def _json(server: Server, datatype: str, nested: bool = False) -> None:
    array = samples(datatype)
    reply = fine(server.infer(_model(datatype), {"inputs": [tensor("x", datatype, array, nested=nested)]}))
    expect(reply.forms.get("y") == "json", "the output is not in JSON")
    same(reply.outputs.get("y"), array)


def _nested(server: Server, datatype: str) -> None:
    _json(server, datatype, nested=True)


def _bytes_in(server: Server, datatype: str) -> None:
    array = samples(datatype)
    reply = fine(server.infer(_model(datatype), *binary([("x", datatype, array)])))
    expect(reply.forms.get("y") == "json", "the output is not in JSON")
    same(reply.outputs.get("y"), array)


def _bytes_both(server: Server, datatype: str) -> None:
    array = samples(datatype)
    reply = fine(server.infer(_model(datatype), *binary([("x", datatype, array)], **ALL_BINARY)))
    expect(reply.forms.get("y") == "binary", "the output is not in bytes")
    same(reply.outputs.get("y"), array)


def _bytes_out(server: Server, datatype: str) -> None:
    array = samples(datatype)
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    reply = fine(server.infer(_model(datatype), {"inputs": [tensor("x", datatype, array)], "outputs": outputs}))
    expect(reply.forms.get("y") == "binary", "the output is not in bytes")
    same(reply.outputs.get("y"), array)


def _cut(server: Server, datatype: str) -> None:
    array = samples(datatype)
    chunk = pack(datatype, array)[:-1]
    entry = {"name": "x", "datatype": datatype, "shape": [2, 3], "parameters": {"binary_data_size": len(chunk)}}
    head = orjson.dumps({"inputs": [entry]})
    refused(server.infer(_model(datatype), head + chunk, {LENGTH: str(len(head))}))


def _no_fault(server: Server, datatype: str) -> None:
    entry = {"name": "x", "datatype": datatype, "shape": [1, 3], "data": WRONG[datatype]}
    status = server.infer(_model(datatype), {"inputs": [entry]}).status
    expect(status < 500, f"status {status}")


def _rows(server: Server, rows: int) -> None:
    array = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    same(fine(server.infer("same_fp32", {"inputs": [tensor("x", "FP32", array)]})).outputs.get("y"), array)


def _fixed(server: Server) -> None:
    array = samples("FP32")
    same(fine(server.infer("fixed", {"inputs": [tensor("x", "FP32", array)]})).outputs.get("y"), array)


A = np.array([[1, 2, 3, 4]], np.float32)
B = np.array([[10, 20, 30, 40]], np.float32)


def _order(server: Server) -> None:
    reply = fine(server.infer("add_sub", {"inputs": [tensor("b", "FP32", B), tensor("a", "FP32", A)]}))
    same(reply.outputs.get("sum"), A + B, "sum")
    same(reply.outputs.get("difference"), A - B, "difference")


X = np.array([[1, -2], [0, 4]], np.float32)


def _several(server: Server) -> None:
    reply = fine(server.infer("several", {"inputs": [tensor("x", "FP32", X)]}))
    same(reply.outputs.get("twice"), X * 2, "twice")
    same(reply.outputs.get("whole"), X.astype(np.int32), "whole")
    same(reply.outputs.get("positive"), X > 0, "positive")


def _empty(server: Server) -> None:
    array = np.zeros((1, 0), np.float32)
    same(fine(server.infer("free", {"inputs": [tensor("x", "FP32", array)]})).outputs.get("y"), array)


def _null(server: Server) -> None:
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, None, 3]}
    fine(server.infer("same_fp32", {"inputs": [entry]}))


def _mixed(server: Server) -> None:
    chunk = pack("FP32", B)
    size = {"binary_data_size": len(chunk)}
    entry = {"name": "b", "datatype": "FP32", "shape": [1, 4], "parameters": size}
    head = orjson.dumps({"inputs": [tensor("a", "FP32", A), entry]})
    reply = fine(server.infer("add_sub", head + chunk, {LENGTH: str(len(head))}))
    same(reply.outputs.get("sum"), A + B, "sum")


def _mixed_out(server: Server) -> None:
    outputs = [{"name": "sum", "parameters": {"binary_data": True}}, {"name": "difference"}]
    inputs = [tensor("a", "FP32", A), tensor("b", "FP32", B)]
    reply = fine(server.infer("add_sub", {"inputs": inputs, "outputs": outputs}))
    expect(reply.forms == {"sum": "binary", "difference": "json"}, str(reply.forms))
    same(reply.outputs.get("sum"), A + B, "sum")
    same(reply.outputs.get("difference"), A - B, "difference")


def _several_bytes(server: Server) -> None:
    reply = fine(server.infer("several", *binary([("x", "FP32", X)], **ALL_BINARY)))
    expect(set(reply.forms.values()) == {"binary"}, str(reply.forms))
    same(reply.outputs.get("twice"), X * 2, "twice")
    same(reply.outputs.get("whole"), X.astype(np.int32), "whole")
    same(reply.outputs.get("positive"), X > 0, "positive")


def _override(server: Server) -> None:
    outputs = [{"name": "twice", "parameters": {"binary_data": False}}, {"name": "whole"}]
    reply = fine(server.infer("several", *binary([("x", "FP32", X)], outputs=outputs, **ALL_BINARY)))
    expect(reply.forms == {"twice": "json", "whole": "binary"}, str(reply.forms))


def _large(server: Server) -> None:
    array = np.arange(65_536, dtype=np.float32).reshape(64, 1024)
    same(fine(server.infer("free", *binary([("x", "FP32", array)], **ALL_BINARY))).outputs.get("y"), array)


def _exact(server: Server) -> None:
    reply = fine(server.infer("same_fp32", *binary([("x", "FP32", samples("FP32"))], **ALL_BINARY)))
    expect(reply.headers.get(LENGTH, "").isdigit(), "no header")
    expect(reply.outputs["y"].size == 6, "other bytes")


def _not_finite(server: Server) -> None:
    array = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    reply = fine(server.infer("same_fp32", *binary([("x", "FP32", array)], **ALL_BINARY)))
    expect(np.array_equal(reply.outputs["y"], array, equal_nan=True), str(reply.outputs["y"]))
