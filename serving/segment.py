"""What lies in a segment of the log, as the lake's tables. Pure functions of bytes.

Not here: writing lines (`serving.entries`, `serving.rawlog`), moving segments (`serving.drain`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa

from noria.column import ARROW
from noria.schema import Schema
from serving.entries import spread
from serving.ids import at_row, expand
from serving.rawlog import columns, unpack

Logged = Literal["predictions", "labels", "shadow"]
Tables = dict[Logged, pa.Table]


def read(content: bytes) -> tuple[Tables, int]:
    """The tables in a segment, and how many of its lines cannot be read (a torn last one does not count).

    Raises ValueError, KeyError or TypeError when readable lines are not what the log writes.
    """
    lines, broken = lines_of(content)
    found: Tables = {}
    served = []
    for header in (line for line in lines if "h" in line):
        of_version = [line for line in lines if line.get("v") == header["h"]]
        if of_version and "plain" in header:
            served.append(_plain(of_version, header["h"], header["plain"]))
        elif of_version:
            served.append(_predictions(of_version, header["h"], Schema.from_json(header["schema"])))
    if served:
        found["predictions"] = pa.concat_tables(served, promote_options="permissive")
    labels = [line for line in lines if "y" in line]
    if labels:
        found["labels"] = _labels(labels)
    shadowed = [line for line in lines if "shadow" in line]
    if shadowed:
        found["shadow"] = _shadow(shadowed)
    return found, broken


def _predictions(lines: Sequence[dict[str, Any]], version: int, schema: Schema) -> pa.Table:
    """As the lake keeps them: the log's own columns, then the raw inputs."""
    counts, ids = [len(line["t"]) for line in lines], _ids(lines)
    actions = [action for line, count in zip(lines, counts, strict=True) for action in line["a"] or [None] * count]
    rows = len(ids)
    raw = schema.table({
        column.name: _array(column.kind, [value for line in lines for value in line["c"][column.name]])
        for column in schema.columns
    })  # fmt: skip
    own = {
        "prediction_id": pa.array(ids, pa.string()),
        "event_time": _times(lines),
        "version": pa.array([version] * rows, pa.int64()),
        "score": pa.array([value for line in lines for value in line["s"]], pa.float64()),
        "action": pa.array(actions, pa.string()),
        "latency_ms": _latencies(lines),
    }
    return pa.table({**own, **{name: raw.column(name) for name in raw.column_names if name not in own}})


def _plain(lines: Sequence[dict[str, Any]], version: int, described: Mapping[str, Any]) -> pa.Table:
    """The rows of a plain model: the log's own columns, then its tensors."""
    ids = _ids(lines)
    own = {
        "prediction_id": pa.array(ids, pa.string()),
        "event_time": _times(lines),
        "version": pa.array([version] * len(ids), pa.int64()),
        "latency_ms": _latencies(lines),
    }
    return pa.table({**own, **columns(lines, described)})


def _ids(lines: Sequence[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for line in lines:
        first, count = 0, 0
        for name, rows in zip(line["i"], line["n"], strict=True):
            number = int(name, 16)
            if number == at_row(first, count):  # the runs of a line mostly share the ids of one batch
                count += rows
            else:
                found += _named(first, count)
                first, count = number, rows
        found += _named(first, count)
    return found


def _named(first: int, rows: int) -> Iterable[str]:
    return expand(first, rows) if rows > 1 else [f"{first:032x}"] * rows


def _latencies(lines: Sequence[dict[str, Any]]) -> pa.Array:
    milliseconds, rows = ([one for line in lines for one in line[key]] for key in ("ms", "n"))
    return pa.array(np.repeat(milliseconds, rows), pa.float64())


def _labels(lines: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.table({
        "prediction_id": pa.array([name for line in lines for name in line["id"]], pa.string()),
        "label": pa.array([value for line in lines for value in line["y"]], pa.float64()),
        "arrived": _times(lines),
    })  # fmt: skip


def _shadow(lines: Sequence[dict[str, Any]]) -> pa.Table:
    """A challenger's answers, as `serving.shadow` writes them."""
    columns = {
        "prediction_id": ("id", pa.string()),
        "champion": ("champion", pa.int64()),
        "score": ("s", pa.float64()),
        "action": ("a", pa.string()),
        "latency_ms": ("ms", pa.float64()),
    }
    versions = np.repeat([line["shadow"] for line in lines], [len(line["id"]) for line in lines])
    return pa.table({
        "event_time": _times(lines),
        "version": pa.array(versions, pa.int64()),
        **{name: pa.array([one for line in lines for one in line[key]], kind) for name, (key, kind) in columns.items()},
    })  # fmt: skip


def _times(lines: Sequence[dict[str, Any]]) -> pa.Array:
    return pa.array([value for line in lines for value in line["t"]], pa.int64()).cast(ARROW["timestamp"])


def _array(kind: str, values: list[Any]) -> np.ndarray:
    """As a raw tensor, but numbers in double precision: what was sent, not what the graph was given."""
    return np.array(values, {"number": np.float64, "integer": np.int64, "timestamp": np.int64}.get(kind, np.object_))


def lines_of(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a segment with the bytes that belong to them, and how many cannot be read besides a torn end."""
    lines, broken, start, whole = [], 0, 0, memoryview(content)
    while (end := content.find(b"\n", start)) >= 0:
        behind, start = start, end + 1
        try:
            line = _line(whole[behind:end])
            size = line.get("raw", 0)
            if len(content) < start + size:
                break
            lines.append(unpack(line, whole[start : start + size]) if "raw" in line else line)
        except (LookupError, TypeError, ValueError):  # bytes of a tensor, too, where the line before them is damaged
            broken += 1
        else:
            start += size
    return lines, broken


def _line(content: memoryview) -> dict[str, Any]:
    """Raises ValueError or TypeError where it is no line of the log."""
    line = orjson.loads(content)
    if not isinstance(line, dict) or not isinstance(line.get("t", []), list) or line.get("raw", 0) < 0:
        raise ValueError("no line of the log")
    spread(line)
    return line
