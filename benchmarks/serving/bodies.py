"""The same rows in each server's dialect, and the scores back out of its answer, to be compared before any timing.

A dialect is a content type, a way to write rows and a way to read scores. Not here: sending anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import orjson

TOLERANCE = 1e-4
"""Largest difference to onnxruntime, absolute and relative, that is taken for float32's own."""


@dataclass(frozen=True)
class Body:
    """A request."""

    content: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """What came back: the status, headers in lower case, and the body."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True)
class Dialect:
    """Writes rows `x` [n, k] and reads scores [n, m]."""

    write: Callable[[np.ndarray], Body]
    read: Callable[[Answered], np.ndarray]


def _json(content: object) -> Body:
    # Numbers as short as float32 allows, not the 17 digits of the same numbers as float64.
    return Body(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


def _v2(rows: np.ndarray) -> Body:
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel()}
    return _json({"inputs": [tensor]})


def _read_v2(answered: Answered) -> np.ndarray:
    (output,) = orjson.loads(answered.content)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def _binary(rows: np.ndarray) -> Body:
    size = {"binary_data_size": rows.nbytes}
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "parameters": size}
    head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    length = {"inference-header-content-length": str(len(head))}
    return Body(head + rows.astype("<f4").tobytes(), "application/octet-stream", length)


def _read_binary(answered: Answered) -> np.ndarray:
    length = int(answered.headers["inference-header-content-length"])
    (output,) = orjson.loads(answered.content[:length])["outputs"]
    return np.frombuffer(answered.content[length:], "<f4").reshape(output["shape"])


def _read_bentoml(answered: Answered) -> np.ndarray:
    return np.array(orjson.loads(answered.content), np.float32)


def _read_mlflow(answered: Answered) -> np.ndarray:
    found = orjson.loads(answered.content)["predictions"]
    return np.array(found["y"] if isinstance(found, dict) else found, np.float32)


V2 = Dialect(_v2, _read_v2)
BINARY = Dialect(_binary, _read_binary)
BENTOML = Dialect(lambda rows: _json({"x": rows}), _read_bentoml)
MLFLOW = Dialect(lambda rows: _json({"inputs": {"x": rows}}), _read_mlflow)


def wrong(dialect: Dialect, answered: Answered, expected: np.ndarray) -> str:
    """Why an answer is not onnxruntime's; empty when it is."""
    if answered.status != 200:
        return f"status {answered.status}: {answered.content[:200]!r}"
    try:
        found = dialect.read(answered)
    except (ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__} ({error}) while reading {answered.content[:200]!r}"
    if found.shape != expected.shape:
        return f"shape {found.shape} instead of {expected.shape}"
    if not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        return f"scores differ from onnxruntime's by up to {np.abs(found - expected).max():g}"
    return ""
