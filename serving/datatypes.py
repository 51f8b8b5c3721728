"""The tensor types of the Open Inference Protocol v2: their names, and what they are in NumPy and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
"""NumPy's type of each datatype; BYTES are strings to ONNX Runtime, held as Python strings."""

WIRE = {name: np.dtype(kind).newbyteorder("<") for name, kind in NUMPY.items() if name != "BYTES"}
"""NumPy's type of each datatype of numbers as it goes over the wire."""

ONNX = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""The datatype of each type that ONNX Runtime names."""


def to_bytes(datatype: str, values: Any) -> bytes:
    """An array, or for BYTES also a sequence of strings, as it goes over the wire (`serving.binary`)."""
    if datatype == "BYTES":
        return _packed(values.ravel().tolist() if isinstance(values, np.ndarray) else values)
    return np.ascontiguousarray(values, WIRE[datatype]).tobytes()


def _packed(values: Iterable[Any]) -> bytes:
    parts: list[bytes] = []
    for value in values:
        encoded = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        parts += (len(encoded).to_bytes(4, "little"), encoded)
    return b"".join(parts)
