"""The prediction log, on the side of the reconciler: whole segments go into the lake, once each.

A segment is named (source, number), and the lake remembers the last number of each source in the same commit as its
rows: a process that was killed between commit and clean-up repeats itself without effect. Segments that a dead worker
left open are adopted; the half line at their end, if any, was never answered. Not here: writing (`serving.capture`).
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

import pyarrow as pa

from noria.column import Column
from noria.errors import LakeError, NoriaError
from noria.lake import Lake
from noria.schema import Schema
from serving.segment import Logged, Tables, lines_of, read

MOST_ROWS, MOST_BYTES = 100_000, 2**26
"""Rows, and bytes of segments, that one append takes, about."""
COMPACT_AFTER = 50
"""Appends to a table between two looks at whether it has too many small files."""

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
        """From its name; a model's own may have dots."""
        workload, source, number, rows = path.name.rsplit(".", 3)
        return cls(path, workload, source, int(number), int(rows))


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
        self.failing: dict[str, str] = {}
        """What the last step could not move, and why; it is tried again."""
        self._failed: dict[str, str] = {}
        """The same of the step before: a fault is logged once while it lasts."""
        self._known: dict[tuple[str, Logged, str], int] = {}
        self._refused: set[tuple[str, str]] = set()
        """Workloads, and why the lake could not take their rows: said once."""
        self._synced: dict[tuple[str, Logged], int] = {}
        """The version of each table up to which it lies on the disk itself."""
        self._appends: Counter[tuple[str, Logged]] = Counter()
        for each in (self.open_folder, self.ready_folder):
            each.mkdir(parents=True, exist_ok=True)

    def adopt(self) -> int:
        """Make segments ready whose writer has ended; returns how many."""
        adopted = 0
        for path in sorted(self.open_folder.iterdir()):
            try:
                with suppress(FileNotFoundError), path.open("rb") as file:  # its writer hands it over meanwhile
                    if _locked(file):  # held until the file is renamed: a writer that just made it takes another one
                        adopted += self._adopt(path, file.read())
            except Exception as error:
                self._fail(path.name, error)
        return adopted

    def _adopt(self, path: Path, content: bytes) -> bool:
        lines, broken = lines_of(content)
        rows = sum(len(line["t"]) for line in lines if "t" in line)
        if not rows and not broken:
            path.unlink()
            return False
        # A source of its own: later numbers of its writer may be in the lake already.
        workload, source, number = path.name.rsplit(".", 2)
        path.rename(self.ready_folder / f"{workload}.{source}-{number}.{number}.{rows}")
        return True

    def step(self) -> int:
        """Append what is ready and remove it; returns the rows that were moved.

        Where a segment fails, those of its workload and source that come behind it wait, for the lake takes a lower
        number for a repetition; all others go on.
        """
        self._failed, self.failing = self.failing, {}
        self.adopt()
        moved = 0
        for (workload, source), group in groupby(self._whole(), key=_writer):
            try:
                for part in _parts(group):
                    self._move(part)
                    moved += sum(segment.rows for segment in part)
            except Exception as error:  # whatever the lake raises
                self._fail(f"{workload}.{source}", error)
        return moved

    def _whole(self) -> list[Ready]:
        """What is ready, in order. A long listing is no picture of a moment: it may have a segment and not the one that
        its writer handed over before. A second one has all that come before the last that the first one saw."""
        seen: dict[tuple[str, str], int] = {}
        for segment in self._ready():
            seen[_writer(segment)] = max(segment.number, seen.get(_writer(segment), 0))
        return sorted((one for one in self._ready() if one.number <= seen.get(_writer(one), -1)), key=_order)

    def _ready(self) -> list[Ready]:
        found = []
        for path in self.ready_folder.iterdir():
            try:
                found.append(Ready.parse(path))
            except ValueError:
                self.broken_folder.mkdir(exist_ok=True)
                path.rename(self.broken_folder / path.name)
                logger.error("%s is no name of a log segment; the file is now in %s.", path.name, self.broken_folder)
        return found

    def _fail(self, name: str, error: Exception) -> None:
        if self._failed.get(name) != str(error):
            logger.exception("The log of %s does not reach the lake; it is tried again.", name)
        self.failing[name] = str(error)

    def _move(self, segments: Sequence[Ready]) -> None:
        """Segments of one workload and source, in order: append, sync, then remove. Raises what the lake raises."""
        contents = {segment.number: self._read(segment) for segment in segments}
        for table in TABLES:
            self._append(table, segments, contents)
        for table in {table for tables in contents.values() for table in tables}:
            place = segments[0].workload, table
            self._synced[place] = Lake(self.lake, place[0], ANY).sync(table, self._synced.get(place, -1))
        for segment in segments:
            if "predictions" in contents[segment.number]:
                self.offer(segment.path)
            segment.path.unlink()

    def _append(self, table: Logged, segments: Sequence[Ready], contents: Mapping[int, Tables]) -> None:
        """What the segments have for a table. What the table cannot take is set aside, whatever comes behind it."""
        try:
            self._write(table, segments, contents)
        except LakeError as error:
            if len(segments) == 1:
                self._refuse(segments[0], str(error))
                del contents[segments[0].number][table]
            else:
                for segment in segments:
                    self._append(table, [segment], {segment.number: contents[segment.number]})

    def _write(self, table: Logged, segments: Sequence[Ready], contents: Mapping[int, Tables]) -> None:
        """Raises LakeError where the table, or one of the segments, has a column otherwise than the others."""
        if not any(table in tables for tables in contents.values()):
            return
        workload, source = segments[0].workload, segments[0].source
        key, lake = (workload, table, source), Lake(self.lake, workload, ANY)
        if key not in self._known:
            self._known[key] = lake.appended(table, source)
        known = self._known[key]
        parts = {number: tables[table] for number, tables in contents.items() if number > known and table in tables}
        if not parts:
            return
        rows = _joined(list(parts.values()))
        if not lake.append(table, rows, batch=(source, max(parts)), after=known):
            del self._known[key]  # another process drains this log, too; what it left is cut anew
            self._write(table, segments, contents)
            return
        self._known[key] = max(parts)
        self._appends[workload, table] += 1
        if self._appends[workload, table] % COMPACT_AFTER == 0:
            lake.compact(table)

    def _read(self, segment: Ready) -> Tables:
        content = segment.path.read_bytes()
        try:
            tables, broken = read(content)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            NoriaError,
            pa.ArrowException,
        ) as error:
            self._set_aside(segment, f"{type(error).__name__}: {error}")
            return {}
        if broken:
            self._set_aside(segment, f"{broken} lines are not readable; the others are in the lake")
        return tables

    def _refuse(self, segment: Ready, reason: str) -> None:
        """Keep a segment that the lake cannot take, as a source of its own: later numbers of its writer may be in the
        lake by the time that it is moved back."""
        self.broken_folder.mkdir(exist_ok=True)
        source = f"{segment.source}-{segment.number}"
        copy = self.broken_folder / f"{segment.workload}.{source}.{segment.number}.{segment.rows}"
        with suppress(FileExistsError):  # by a drain that was killed before it removed the segment
            os.link(segment.path, copy)
        if (segment.workload, reason) not in self._refused:
            self._refused.add((segment.workload, reason))
            logger.error(
                "The log segment %s, and what comes like it, is kept as %s and not in the lake: %s Once the lake can "
                "take it, move the file to %s.", segment.path.name, copy, reason, self.ready_folder,
            )  # fmt: skip

    def _set_aside(self, segment: Ready, reason: str) -> None:
        """Keep a damaged segment for a person; it must not hold up the ones behind it."""
        self.broken_folder.mkdir(parents=True, exist_ok=True)
        copy = self.broken_folder / segment.path.name
        if not copy.exists():
            os.link(segment.path, copy)
            logger.error("The log segment %s is damaged (%s); it is kept at %s.", segment.path.name, reason, copy)


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise LakeError(f"The rows of several versions differ: {error}") from error


def _locked(file: IO[bytes]) -> bool:
    """Take the segment's lock, unless its writer still holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _writer(segment: Ready) -> tuple[str, str]:
    return segment.workload, segment.source


def _order(segment: Ready) -> tuple[str, str, int]:
    return segment.workload, segment.source, segment.number


def _parts(segments: Iterable[Ready]) -> list[list[Ready]]:
    """Cut into appends of about MOST_ROWS or MOST_BYTES."""
    parts: list[list[Ready]] = [[]]
    rows = size = 0
    for segment in segments:
        more = segment.path.stat().st_size
        if rows and (rows + segment.rows > MOST_ROWS or size + more > MOST_BYTES):
            parts.append([])
            rows = size = 0
        parts[-1].append(segment)
        rows += segment.rows
        size += more
    return [part for part in parts if part]
