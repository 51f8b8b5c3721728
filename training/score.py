"""Scores of a table with a registered bundle, the same numbers as online; large tables in parallel on Ray.

Not here: where results go (the `batch` flow writes them like online predictions).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from noria import runtime
from noria.schema import Tensors
from registry.bundle import Bundle
from training.launch import connect

CHUNK = 50_000
"""Rows of one Ray task."""
LARGE = 200_000
"""Tables with more rows are worth starting Ray for."""


def score(bundle: Bundle, table: pa.Table, *, ray_address: str | None = None, large: int = LARGE) -> np.ndarray:
    """Scores float32 [n] of a table that has the schema's columns, in its order.

    Raises:
        SchemaError: the table lacks a column or holds another type.
    """
    if len(table) <= large:
        return runtime.score(runtime.open_session(bundle.model), bundle.schema.tensors(table))
    connect(ray_address)
    model = ray.put(bundle.model.read_bytes())
    tasks = [
        _score.remote(model, bundle.schema.tensors(table.slice(start, CHUNK))) for start in range(0, len(table), CHUNK)
    ]
    return np.concatenate(ray.get(tasks))


@ray.remote  # type: ignore[untyped-decorator]
def _score(model: bytes, tensors: Tensors) -> np.ndarray:
    return runtime.score(_session(model), tensors)


@lru_cache(maxsize=2)
def _session(model: bytes) -> Any:
    """Kept by the worker process between tasks."""
    return runtime.open_session(model, "cpu")
