"""The protocol as a client speaks it: JSON and binary requests over HTTP. Written from the specification alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import orjson

NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"UINT{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
LENGTH = "inference-header-content-length"


def samples(datatype: str) -> np.ndarray:
    """Two rows of three values of a datatype, its extremes among them."""
    kind = NUMPY[datatype]
    if datatype == "BYTES":
        return np.array([["a", "two words", ""], ["naïve ☃", '"quoted"\n', "x" * 300]], np.object_)
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    if datatype.startswith("FP"):
        largest = np.finfo(kind).max
        return np.array([[0, -1.5, largest], [1 / 3, np.finfo(kind).tiny, -largest]], kind)
    limits = np.iinfo(kind)
    return np.array([[0, 1, limits.max], [limits.min, 7, limits.max - 1]], kind)


def pack(datatype: str, array: np.ndarray) -> bytes:
    """An array as the binary extension lays it out."""
    if datatype != "BYTES":
        return np.ascontiguousarray(array).astype(np.dtype(NUMPY[datatype]).newbyteorder("<")).tobytes()
    encoded = [value.encode() for value in array.ravel()]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


def unpack(datatype: str, shape: Sequence[int], data: bytes) -> np.ndarray:
    """The inverse of `pack`."""
    if datatype != "BYTES":
        kind = np.dtype(NUMPY[datatype]).newbyteorder("<")
        return np.frombuffer(data, kind).astype(NUMPY[datatype]).reshape(shape)
    found, start = [], 0
    while start < len(data):
        (size,) = struct.unpack_from("<I", data, start)
        found.append(data[start + 4 : start + 4 + size].decode())
        start += 4 + size
    return np.array(found, np.object_).reshape(shape)


def tensor(name: str, datatype: str, array: np.ndarray, *, nested: bool = False, **more: Any) -> dict[str, Any]:
    """An input with its data in JSON."""
    data = array.tolist() if nested else array.ravel().tolist()
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data, **more}


def binary(inputs: Sequence[tuple[str, str, np.ndarray]], **more: Any) -> tuple[bytes, dict[str, str]]:
    """A request with its tensors behind the JSON: body and headers."""
    entries, chunks = [], []
    for name, datatype, array in inputs:
        chunk = pack(datatype, array)
        parameters = {"binary_data_size": len(chunk)}
        entries.append({"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": parameters})
        chunks.append(chunk)
    head = orjson.dumps({"inputs": entries, **more})
    headers = {LENGTH: str(len(head)), "content-type": "application/octet-stream"}
    return head + b"".join(chunks), headers


class Reply:
    """An inference response, read as the specification says."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        length = response.headers.get(LENGTH)
        head, tail = response.content, b""
        if length is not None and self.status == 200:
            head, tail = head[: int(length)], head[int(length) :]
        try:
            self.content: Any = orjson.loads(head)
        except orjson.JSONDecodeError:
            self.content = None
        self.outputs: dict[str, np.ndarray] = {}
        self.forms: dict[str, str] = {}
        """By output, `json` or `binary`."""
        if self.status == 200:
            self._read(tail)

    @property
    def error(self) -> str | None:
        """The sentence of an error in the protocol's form; None: it has another form."""
        error = self.content.get("error") if isinstance(self.content, dict) else None
        return error if isinstance(error, str) and error else None

    def _read(self, tail: bytes) -> None:
        for output in self.content["outputs"]:
            name, datatype, shape = output["name"], output["datatype"], output["shape"]
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                self.forms[name] = "json"
                self.outputs[name] = np.array(_flat(output["data"]), NUMPY[datatype]).reshape(shape)
            else:
                self.forms[name] = "binary"
                self.outputs[name] = unpack(datatype, shape, tail[:size])
                tail = tail[size:]
        if tail:
            raise ValueError(f"{len(tail)} bytes belong to no output")


def _flat(data: Any) -> list[Any]:
    return [one for part in data for one in _flat(part)] if isinstance(data, list) else [data]


class Server:
    """A server under test."""

    def __init__(self, url: str, grpc: str | None = None) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        self.grpc = grpc

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def get(self, path: str) -> httpx.Response:
        """GET below the server's address."""
        return self.http.get(path)

    def post(self, path: str, body: bytes | Iterator[bytes], headers: Mapping[str, str] | None = None) -> Reply:
        """POST bytes, or each as a chunk; JSON without another content type."""
        return Reply(
            self.http.post(path, content=body, headers={"content-type": "application/json", **(headers or {})})
        )

    def infer(self, model: str, content: Any, headers: Mapping[str, str] | None = None) -> Reply:
        """An inference request: plain data, or bytes and chunks of them as they are."""
        body = content if isinstance(content, (bytes, Iterator)) else orjson.dumps(content)
        return self.post(f"/v2/models/{model}/infer", body, headers)
