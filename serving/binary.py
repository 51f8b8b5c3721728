"""Tensors as bytes: the binary extension of the Open Inference Protocol v2, which gRPC's raw contents share.

Elements lie row-major, little-endian, without padding; a BOOL is a byte, a BYTES element is its length as four bytes
and then its UTF-8. Nothing is allocated before the sizes that a client states agree with the bytes that it sent.
Source: github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md. Not here: JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from serving.datatypes import NUMPY, WIRE
from serving.wire import Refusal

HEADER = b"inference-header-content-length"
"""The header that gives the length of the JSON before the bytes."""
CONTENT_TYPE = b"application/octet-stream"


def header_length(value: bytes) -> int:
    """The number that the header gives. Raises Refusal 400."""
    # int() would take signs, spaces and underscores as well.
    if not value.isdigit() or len(value) > 18:
        raise Refusal(400, "The header Inference-Header-Content-Length must be a number of bytes.")
    return int(value)


def split(body: bytes, json_length: int) -> tuple[bytes, memoryview]:
    """The JSON of a body, and the bytes behind it. Raises Refusal 400."""
    if not 0 < json_length <= len(body):
        raise Refusal(
            400,
            f"The header Inference-Header-Content-Length says {json_length}, and the body has {len(body)} bytes.",
        )
    return body[:json_length], memoryview(body)[json_length:]


def read(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> np.ndarray:
    """A tensor of `shape` from exactly its bytes; a view where it can be. Raises Refusal 400."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(name, count, data).reshape(shape)
    kind = WIRE.get(datatype)
    if kind is None:
        raise Refusal(400, f"The input '{name}' has the datatype {datatype[:20]}; there are: {', '.join(NUMPY)}.")
    if count * kind.itemsize != len(data):
        raise Refusal(
            400,
            f"The input '{name}' has {len(data)} bytes; {datatype} of the shape {_shown(shape)} takes "
            f"{count * kind.itemsize}.",
        )
    if datatype == "BOOL":
        array = np.frombuffer(data, np.uint8)
        if count and array.max() > 1:
            raise Refusal(400, f"The input '{name}' has a BOOL byte that is neither 0 nor 1.")
        return array.view(np.bool_).reshape(shape)
    array = np.frombuffer(data, kind).reshape(shape)
    # ONNX Runtime reads whole words: a tensor behind JSON of odd length must move first.
    return array if array.flags.aligned else array.copy()


def _strings(name: str, count: int, data: bytes | memoryview) -> np.ndarray:
    if count * 4 > len(data):
        raise Refusal(400, f"The input '{name}' has {len(data)} bytes, too few for {count} strings with their lengths.")
    found: list[str] = []
    start, end = 0, len(data)
    for _ in range(count):
        begin = start + 4
        start = begin + int.from_bytes(data[begin - 4 : begin], "little")
        if begin > end or start > end:
            raise Refusal(400, f"The input '{name}' ends within string {len(found)}.")
        try:
            found.append(str(data[begin:start], "utf-8"))
        except UnicodeDecodeError:
            raise Refusal(400, f"The input '{name}': string {len(found)} is not UTF-8.") from None
    if start != end:
        raise Refusal(400, f"The input '{name}' has {end - start} bytes behind its {count} strings.")
    return np.array(found, np.object_)


def _shown(shape: Sequence[int]) -> str:
    return str(list(shape))[:60]
