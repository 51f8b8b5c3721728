"""Cases about the request around the tensors: outputs, id, errors, compression, limits."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

from benchmarks.conformance.suite import Case, expect, fine, refused, same
from benchmarks.conformance.wire import LENGTH, Reply, Server, binary, samples, tensor

X = np.array([[1, -2], [0, 4]], np.float32)
ONE = np.array([[1, 2, 3]], np.float32)
GOOD = tensor("x", "FP32", ONE)
SEVERAL = tensor("x", "FP32", X)


def _changed(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{name: value for name, value in {**GOOD, **changes}.items() if value is not ...}]}


WRONG: dict[str, Any] = {
    "an empty body": b"",
    "a body that is not JSON": b"{",
    "a list instead of an object": [],
    "no inputs": {},
    "inputs that are no list": {"inputs": {"x": 1}},
    "an empty list of inputs": {"inputs": []},
    "an input without a name": _changed(name=...),
    "an input without a datatype": _changed(datatype=...),
    "an input without a shape": _changed(shape=...),
    "an input without data": _changed(data=...),
    "an unknown input": _changed(name="z"),
    "an input too many": {"inputs": [GOOD, {**GOOD, "name": "z"}]},
    "an unknown datatype": _changed(datatype="FLOAT"),
    "another datatype": _changed(datatype="INT64"),
    "a shape of another rank": _changed(shape=[3]),
    "a shape that the model does not take": _changed(shape=[1, 4], data=[1, 2, 3, 4]),
    "a negative size": _changed(shape=[-1, 3]),
    "a size that is no number": _changed(shape=["1", 3]),
    "fewer values than the shape says": _changed(data=[1, 2]),
    "more values than the shape says": _changed(data=[1, 2, 3, 4]),
    "data that is no list": _changed(data="123"),
    "a giant shape": _changed(shape=[2**40, 3], data=[1]),
    "an unknown output": {"inputs": [GOOD], "outputs": [{"name": "z"}]},
    "an output without a name": {"inputs": [GOOD], "outputs": [{}]},
}
OPEN_WRONG: dict[str, Any] = {
    "a string for a number": _changed(data=["1", "2", "3"]),
    "ragged nested data": _changed(data=[[1, 2], [3]]),
    "an id that is a number": {"id": 7, "inputs": [GOOD]},
    "the same input twice": {"inputs": [GOOD, GOOD]},
    "the same output twice": {"inputs": [GOOD], "outputs": [{"name": "y"}, {"name": "y"}]},
    "a null shape entry": _changed(shape=[None, 3]),
}
"""Refusing these is one possibility."""


def cases() -> list[Case]:
    """All of them."""
    found = [
        Case("outputs", "all without a selection", _all),
        *(Case("outputs", f"only {name}", _only(name)) for name in ("twice", "whole", "positive")),
        Case("outputs", "two of three", _two),
        Case("outputs", "in the order asked for", _order, is_open=True),
        Case("outputs", "an empty selection is all", _none, is_open=True),
        Case("id", "is echoed", lambda server: _id(server, "42")),
        Case("id", "of any text is echoed", lambda server: _id(server, 'naïve ☃ "quoted"\\')),
        Case("id", "of 1,000 characters is echoed", lambda server: _id(server, "a" * 1000)),
        Case("id", "is echoed with a binary response", _id_binary),
        Case("id", "is not there when none was sent", _no_id, is_open=True),
        Case("id", "is echoed when it is empty", lambda server: _id(server, ""), is_open=True),
        Case("parameters", "unknown ones are ignored", _unknown_parameters, is_open=True),
        Case("parameters", "unknown fields are ignored", _unknown_fields, is_open=True),
        Case("compression", "gzip", _compressed("gzip", gzip.compress)),
        Case("compression", "deflate", _compressed("deflate", zlib.compress)),
        Case("compression", "gzip around bytes", _gzip_binary),
        Case("compression", "gzip that is none is an error", _bad_gzip),
        Case("compression", "an unknown encoding is an error", _bad_encoding, is_open=True),
        Case("http", "a body in chunks", _chunked),
        Case("http", "an offer of HTTP/2 is passed over", _offered, is_open=True),
        Case("limits", "ten thousand rows", _many_rows, is_open=True),
        Case("limits", "deeply nested JSON is no fault", _deep),
        Case("limits", "a body of 64 MB is answered or refused", _huge),
        Case("limits", "after all this the server still answers", _alive),
        Case("errors", "an unknown model", lambda server: refused(server.infer("nobody", {"inputs": [GOOD]}))),
        Case("errors", "an unknown model is 404", _not_found, is_open=True),
        Case("errors", "a missing second input", _missing_input),
        Case("errors", "inputs of different rows", _uneven),
        Case("errors", "GET on infer", _get),
        *(Case("errors", title, _wrong(content)) for title, content in WRONG.items()),
        *(Case("errors", title, _wrong(content), is_open=True) for title, content in OPEN_WRONG.items()),
    ]
    for title, header in (("too large", "9999"), ("negative", "-5"), ("no number", "abc"), ("within the JSON", "7")):
        found.append(Case("framing", f"a header length that is {title}", _length(header)))
    found += [
        Case("framing", "a tensor size above the body", _size(10**12)),
        Case("framing", "a negative tensor size", _size(-4)),
        Case("framing", "a tensor size that is no number", _size("12")),
        Case("framing", "two tensors in the bytes of one", _overlap),
        Case("framing", "bytes that belong to no tensor", _left_over, is_open=True),
        Case("framing", "bytes without the header", _no_header),
    ]
    return found


def _all(server: Server) -> None:
    reply = fine(server.infer("several", {"inputs": [SEVERAL]}))
    expect(set(reply.outputs) == {"twice", "whole", "positive"}, str(list(reply.outputs)))


def _only(name: str) -> Callable[[Server], None]:
    def check(server: Server) -> None:
        reply = fine(server.infer("several", {"inputs": [SEVERAL], "outputs": [{"name": name}]}))
        expect(list(reply.outputs) == [name], str(list(reply.outputs)))

    return check


def _selected(server: Server, *names: str) -> list[str]:
    outputs = [{"name": name} for name in names]
    return list(fine(server.infer("several", {"inputs": [SEVERAL], "outputs": outputs})).outputs)


def _two(server: Server) -> None:
    found = _selected(server, "twice", "positive")
    expect(set(found) == {"twice", "positive"}, str(found))


def _order(server: Server) -> None:
    found = _selected(server, "positive", "twice")
    expect(found == ["positive", "twice"], str(found))


def _none(server: Server) -> None:
    found = _selected(server)
    expect(len(found) == 3, str(found))


def _echoed(reply: Reply, name: str) -> None:
    expect(fine(reply).content.get("id") == name, f"id {reply.content.get('id')!r}")


def _id(server: Server, name: str) -> None:
    _echoed(server.infer("same_fp32", {"id": name, "inputs": [GOOD]}), name)


def _id_binary(server: Server) -> None:
    more = {"id": "42", "parameters": {"binary_data_output": True}}
    _echoed(server.infer("same_fp32", *binary([("x", "FP32", ONE)], **more)), "42")


def _no_id(server: Server) -> None:
    content = fine(server.infer("same_fp32", {"inputs": [GOOD]})).content
    expect("id" not in content, f"id {content.get('id')!r}")


def _unknown_parameters(server: Server) -> None:
    fine(server.infer("same_fp32", {"inputs": [GOOD], "parameters": {"colour": "red", "size": 3, "fast": True}}))


def _unknown_fields(server: Server) -> None:
    fine(server.infer("same_fp32", {"inputs": [{**GOOD, "colour": 1}], "model_name": "same_fp32"}))


def _compressed(name: str, compress: Callable[[bytes], bytes]) -> Callable[[Server], None]:
    def check(server: Server) -> None:
        body = compress(orjson.dumps({"inputs": [GOOD]}))
        same(fine(server.infer("same_fp32", body, {"content-encoding": name})).outputs.get("y"), ONE)

    return check


def _gzip_binary(server: Server) -> None:
    body, headers = binary([("x", "FP32", ONE)])
    reply = fine(server.infer("same_fp32", gzip.compress(body), {**headers, "content-encoding": "gzip"}))
    same(reply.outputs.get("y"), ONE)


def _bad_gzip(server: Server) -> None:
    status = server.infer("same_fp32", b"not gzip", {"content-encoding": "gzip"}).status
    expect(400 <= status < 500, f"status {status}, expected 4xx")


def _bad_encoding(server: Server) -> None:
    status = server.infer("same_fp32", {"inputs": [GOOD]}, {"content-encoding": "zzz"}).status
    expect(400 <= status < 500, f"status {status}, expected 4xx")


def _chunked(server: Server) -> None:
    body = orjson.dumps({"inputs": [GOOD]})
    chunks = (body[start : start + 10] for start in range(0, len(body), 10))
    same(fine(server.infer("same_fp32", chunks)).outputs.get("y"), ONE)


def _offered(server: Server) -> None:
    offer = {
        "connection": "Upgrade, HTTP2-Settings",
        "upgrade": "h2c",
        "http2-settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    }
    for _ in range(2):  # its body is no request of its own, and the next one is answered, too
        same(fine(server.infer("same_fp32", {"inputs": [GOOD]}, offer)).outputs.get("y"), ONE)


def _many_rows(server: Server) -> None:
    array = np.zeros((10_000, 3), np.float32)
    fine(server.infer("same_fp32", *binary([("x", "FP32", array)])))


def _deep(server: Server) -> None:
    status = server.infer("same_fp32", b"[" * 100_000).status
    expect(400 <= status < 500, f"status {status}, expected 4xx")


def _huge(server: Server) -> None:
    status = server.infer("free", *binary([("x", "FP32", np.zeros((1, 2**24), np.float32))])).status
    expect(status == 200 or 400 <= status < 500, f"status {status}")


def _alive(server: Server) -> None:
    same(
        fine(server.infer("same_fp32", {"inputs": [tensor("x", "FP32", samples("FP32"))]})).outputs.get("y"),
        samples("FP32"),
    )


def _not_found(server: Server) -> None:
    status = server.infer("nobody", {"inputs": [GOOD]}).status
    expect(status == 404, f"status {status}")


def _missing_input(server: Server) -> None:
    refused(server.infer("add_sub", {"inputs": [tensor("a", "FP32", np.ones((1, 4), np.float32))]}))


def _uneven(server: Server) -> None:
    a, b = np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)
    refused(server.infer("add_sub", {"inputs": [tensor("a", "FP32", a), tensor("b", "FP32", b)]}))


def _get(server: Server) -> None:
    status = server.get("/v2/models/same_fp32/infer").status_code
    expect(400 <= status < 500, f"status {status}, expected 4xx")


def _wrong(content: Any) -> Callable[[Server], None]:
    return lambda server: refused(server.infer("same_fp32", content))


def _length(value: str) -> Callable[[Server], None]:
    body, headers = binary([("x", "FP32", ONE)])
    return lambda server: _client_error(server.infer("same_fp32", body, {**headers, LENGTH: value}))


def _size(value: Any) -> Callable[[Server], None]:
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": value}}
    head = orjson.dumps({"inputs": [entry]})
    return lambda server: refused(server.infer("same_fp32", head + ONE.tobytes(), {LENGTH: str(len(head))}))


def _overlap(server: Server) -> None:
    entry = {"datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
    head = orjson.dumps({"inputs": [{"name": "a", **entry}, {"name": "b", **entry}]})
    refused(server.infer("add_sub", head + b"\0" * 16, {LENGTH: str(len(head))}))


def _left_over(server: Server) -> None:
    body, headers = binary([("x", "FP32", ONE)])
    refused(server.infer("same_fp32", body + b"\0" * 4, headers))


def _no_header(server: Server) -> None:
    body, _ = binary([("x", "FP32", ONE)])
    refused(server.infer("same_fp32", body))


def _client_error(reply: Reply) -> None:
    expect(400 <= reply.status < 500, f"status {reply.status}, expected 4xx")
