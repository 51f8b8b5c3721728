"""The prediction log, on the side of the reconciler: whole segments go into the lake, once each.

A segment is named (source, number), and the lake remembers the last number of each source in the same commit as its
rows: a parent that was killed between commit and clean-up repeats itself without effect. Segments that a dead worker
left open are adopted; the half line at their end, if any, was never answered. Not here: writing (`serving.capture`).
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import orjson
import pyarrow as pa

from noria.column import ARROW, Column
from noria.lake import Lake
from noria.schema import Schema
from serving.ids import expand
from serving.rawlog import columns, unpack

MOST_ROWS = 100_000
"""Rows that one append takes, about."""
COMPACT_AFTER = 50
"""Appends between two looks at whether the tables have too many small files."""

Logged = Literal["predictions", "labels", "shadow"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """One whole segment."""

    path: Path
    workload: str
    source: str
    number: int
    rows: int

    @classmethod
    def parse(cls, path: Path) -> Ready:
        """From its name."""
        workload, source, number, rows = path.name.split(".")
        return cls(path, workload, source, int(number), int(rows))


Tables = dict[Logged, pa.Table]
TABLES: tuple[Logged, ...] = ("predictions", "labels", "shadow")
ANY = Schema((Column("-", "number"),), event_time="-t", target="-y")
"""A segment brings its own columns; appending asks the schema nothing."""


class Drain:
    """Moves ready segments into the lake. One a home: the caller holds the lock."""

    def __init__(self, folder: Path, lake: str, offer: Callable[[Path], None] = lambda _: None) -> None:
        """`offer` is called with each segment of predictions before it is removed; it must not raise, nor wait."""
        self.offer = offer
        self.open_folder, self.ready_folder = folder / "open", folder / "ready"
        self.broken_folder = folder / "broken"
        self.lake = lake
        self._known: dict[tuple[str, Logged, str], int] = {}
        self._appends = 0
        for each in (self.open_folder, self.ready_folder):
            each.mkdir(parents=True, exist_ok=True)

    def adopt(self) -> int:
        """Make segments ready whose writer has ended; returns how many."""
        adopted = 0
        for path in sorted(self.open_folder.iterdir()):
            with suppress(FileNotFoundError), path.open("rb") as file:  # its writer hands it over meanwhile
                if _locked(file):  # held until the file is renamed: a writer that just made it takes another one
                    adopted += self._adopt(path, file.read())
        return adopted

    def _adopt(self, path: Path, content: bytes) -> bool:
        rows = sum(len(line["t"]) for line in _lines(content)[0] if "t" in line)
        if not rows:
            path.unlink()
            return False
        # A source of its own: later numbers of its writer may be in the lake already.
        workload, source, number = path.name.split(".")
        path.rename(self.ready_folder / f"{workload}.{source}-{number}.{number}.{rows}")
        return True

    def step(self) -> int:
        """Append what is ready and remove it; returns the rows that were moved."""
        self.adopt()
        ready = sorted((Ready.parse(path) for path in self.ready_folder.iterdir()), key=_order)
        moved = 0
        for _, group in groupby(ready, key=lambda segment: (segment.workload, segment.source)):
            for part in _parts(group):
                self._move(part)
                moved += sum(segment.rows for segment in part)
        return moved

    def _move(self, segments: Sequence[Ready]) -> None:
        """Segments of one workload and source, in order: append, then remove. Raises what the lake raises."""
        contents = {segment.number: self._read(segment) for segment in segments}
        for table in TABLES:
            self._append(table, segments, contents)
        for segment in segments:
            if "predictions" in contents[segment.number]:
                self.offer(segment.path)
            segment.path.unlink()

    def _append(self, table: Logged, segments: Sequence[Ready], contents: Mapping[int, Tables]) -> None:
        if not any(table in tables for tables in contents.values()):
            return
        workload, source = segments[0].workload, segments[0].source
        key, lake = (workload, table, source), Lake(self.lake, workload, ANY)
        if key not in self._known:
            self._known[key] = lake.appended(table, source)
        parts = [
            (number, tables[table])
            for number, tables in contents.items()
            if number > self._known[key] and table in tables
        ]
        if not parts:
            return
        rows = pa.concat_tables([part for _, part in parts], promote_options="permissive")
        lake.append(table, rows, batch=(source, parts[-1][0]))
        self._known[key] = parts[-1][0]
        self._appends += 1
        if self._appends % COMPACT_AFTER == 0:
            lake.compact(*TABLES)

    def _read(self, segment: Ready) -> Tables:
        try:
            tables, broken = read(segment.path.read_bytes())
        except (ValueError, KeyError, TypeError, OverflowError, pa.ArrowException) as error:
            self._set_aside(segment, f"{type(error).__name__}: {error}")
            return {}
        if broken:
            self._set_aside(segment, f"{broken} lines are not readable; the others are in the lake")
        return tables

    def _set_aside(self, segment: Ready, reason: str) -> None:
        """Keep a damaged segment for a person; it must not hold up the ones behind it."""
        self.broken_folder.mkdir(parents=True, exist_ok=True)
        copy = self.broken_folder / segment.path.name
        if not copy.exists():
            os.link(segment.path, copy)
            logger.error("The log segment %s is damaged (%s); it is kept at %s.", segment.path.name, reason, copy)


def read(content: bytes) -> tuple[Tables, int]:
    """The tables in a segment, and how many of its lines cannot be read (a torn last one does not count).

    Raises ValueError, KeyError or TypeError when readable lines are not what the log writes.
    """
    lines, broken = _lines(content)
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
    counts = [len(line["t"]) for line in lines]
    ids = [name for line, count in zip(lines, counts, strict=True) for name in expand(int(line["i"], 16), count)]
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
        "latency_ms": pa.array(np.repeat([line["ms"] for line in lines], counts), pa.float64()),
    }
    return pa.table({**own, **{name: raw.column(name) for name in raw.column_names if name not in own}})


def _plain(lines: Sequence[dict[str, Any]], version: int, described: Mapping[str, Any]) -> pa.Table:
    """The rows of a plain model: the log's own columns, then its tensors."""
    ids = [name for line in lines for name in expand(int(line["i"], 16), len(line["t"]))]
    counts = [len(line["t"]) for line in lines]
    own = {
        "prediction_id": pa.array(ids, pa.string()),
        "event_time": _times(lines),
        "version": pa.array([version] * len(ids), pa.int64()),
        "latency_ms": pa.array(np.repeat([line["ms"] for line in lines], counts), pa.float64()),
    }
    return pa.table({**own, **columns(lines, described, len(ids))})


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


def _lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a segment with the bytes that belong to them, and how many cannot be read besides a torn end."""
    lines, broken, start, whole = [], 0, 0, memoryview(content)
    while (end := content.find(b"\n", start)) >= 0:
        try:
            line = orjson.loads(whole[start:end])
        except orjson.JSONDecodeError:
            broken += 1
            start = end + 1
            continue
        start = end + 1
        if "n" in line:  # rows of one moment
            line["t"] = [line["t"]] * line["n"]
        if "raw" in line:
            tail = whole[start : start + line["raw"]]
            if len(tail) < line["raw"]:
                break
            start += line["raw"]
            line = unpack(line, tail)
        lines.append(line)
    return lines, broken


def _locked(file: IO[bytes]) -> bool:
    """Take the segment's lock, unless its writer still holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _order(segment: Ready) -> tuple[str, str, int]:
    return segment.workload, segment.source, segment.number


def _parts(segments: Iterable[Ready]) -> list[list[Ready]]:
    """Cut into appends of about MOST_ROWS."""
    parts: list[list[Ready]] = [[]]
    rows = 0
    for segment in segments:
        if rows and rows + segment.rows > MOST_ROWS:
            parts.append([])
            rows = 0
        parts[-1].append(segment)
        rows += segment.rows
    return [part for part in parts if part]
