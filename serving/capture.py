"""The prediction log, on the side of the worker: every answered prediction and every label.

A workload's rows go to an open segment (a file of JSON lines, columns as lists; the bytes of a plain model's tensors
follow their line). Each batch is one `write`, so what was written is in the operating system's memory and outlives a
killed worker; `sync` brings it onto the disk, where it outlives a power cut, too. Segments are synced and handed over
by renaming:

    log/open/<workload>.<source>.<number>             being written, locked by its writer
    log/ready/<workload>.<source>.<number>.<rows>     whole; the reconciler moves it into the lake

A full disk does not stop answers: rows that could not be written, or not synced, are counted. Not here: the lake
(`serving.drain`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from serving.entries import FLAGS, Entry
from serving.entries import write as lines_of
from serving.model import Model
from serving.rawlog import describe

MOST_PARTS = 512
"""Pieces that one write gathers; systems take 1,024."""

logger = logging.getLogger(__name__)


@dataclass
class Segment:
    """One open file of one workload."""

    workload: str
    path: Path
    descriptor: int
    rows: int = 0
    size: int = 0
    began: float = field(default_factory=time.time)
    tried: int = 0
    """Rows that a sync was tried for."""
    lost: int = 0
    """Rows of these for which it failed."""
    failure: str = ""
    """Why a sync failed. A later one proves nothing then: the system forgets what it could not bring onto the disk and
    says of the same bytes that they are there, and what was written since may lie behind a gap."""
    versions: dict[int, Model] = field(default_factory=dict)
    """By number, versions whose schema the file already holds, so that it can be read by itself."""


class Log:
    """The segments of one worker. Safe to use from several threads."""

    def __init__(self, folder: Path, source: str) -> None:
        self.open_folder, self.ready_folder = folder / "open", folder / "ready"
        self.open_folder.mkdir(parents=True, exist_ok=True)
        self.ready_folder.mkdir(parents=True, exist_ok=True)
        self.source = source
        self.lost = 0
        """Answered rows and labels that could not be written, or not synced."""
        self.failures = 0
        """Syncs that failed. What was written is on the disk if a sync followed and this did not change meanwhile."""
        self._unwritten, self._unsynced = "", ""
        self._segments: dict[str, Segment] = {}
        self._leaving: list[Segment] = []
        """Segments that nothing is written to any more and that are not handed over yet, oldest first."""
        self._number = 0
        self._lock = threading.Lock()
        self._handing_over = threading.Lock()

    @property
    def failure(self) -> str:
        """Why the last write failed, or else the last sync; empty again after one that did not."""
        return self._unwritten or self._unsynced

    def predictions(self, model: Model, entries: Sequence[Entry]) -> bool:
        """Log the answered rows of some runs, in one write. Returns whether it could."""
        rows = sum([entry.rows for entry in entries])
        return self._write(model.workload, rows, lines_of(model, entries), model)

    def labels(self, workload: str, ids: Sequence[str], labels: Sequence[float], times: np.ndarray) -> bool:
        """Log labels; `times` is when each arrived, microseconds [n]. Returns whether they could be."""
        return self._write(workload, len(ids), [orjson.dumps({"id": ids, "y": labels, "t": times}, option=FLAGS)])

    def sync(self) -> None:
        """Bring what was written onto the disk itself, so that it outlives a power cut; `failures` counts where not."""
        with self._handing_over:  # a failure is told once: to the sync of who waits, or to that of `rotate`
            with self._lock:
                held = [*self._leaving, *self._segments.values()]
            self._sync(held)

    def rotate(self) -> None:
        """Hand every segment that holds something over to the reconciler, in the order of their numbers. Writers do
        not wait for the disk meanwhile."""
        with self._handing_over:
            with self._lock:
                full = [workload for workload, segment in self._segments.items() if segment.rows]
                self._leaving += [self._segments.pop(workload) for workload in full]
                leaving = list(self._leaving)
            self._sync(leaving)
            for segment in leaving:
                self._hand_over(segment)
                with self._lock:
                    self._leaving.remove(segment)
                os.close(segment.descriptor)

    def writing(self) -> dict[str, tuple[int, int, float]]:
        """Rows, segments and the oldest one's beginning (seconds since 1970) of what this process has open."""
        found: dict[str, tuple[int, int, float]] = {}
        with self._lock:
            for segment in (*self._leaving, *self._segments.values()):
                if segment.rows:
                    rows, count, began = found.get(segment.workload, (0, 0, segment.began))
                    found[segment.workload] = (rows + segment.rows, count + 1, began)
        return found

    def pending(self) -> dict[str, tuple[int, int]]:
        """Rows and segments by workload that are not in the lake yet, whoever wrote them."""
        found: dict[str, list[int]] = {}
        with self._lock:  # first: what is handed over meanwhile may count twice, but never not at all
            own = [(one.workload, one.rows) for one in (*self._leaving, *self._segments.values())]
        names = (path.name.rsplit(".", 3) for path in self.ready_folder.iterdir())
        for workload, rows in (*own, *((workload, int(rows)) for workload, *_, rows in names)):
            count = found.setdefault(workload, [0, 0])
            count[0] += rows
            count[1] += 1
        return {workload: (rows, segments) for workload, (rows, segments) in found.items()}

    def _hand_over(self, segment: Segment) -> None:
        try:
            segment.path.rename(self.ready_folder / f"{segment.path.name}.{segment.rows}")
        except FileNotFoundError:
            if segment.path.exists():  # it is the folder that is missing
                raise
            logger.error("The log segment %s with %d rows was removed by somebody.", segment.path.name, segment.rows)
            with self._lock:
                self.lost += segment.rows - segment.lost

    def _sync(self, segments: Sequence[Segment]) -> None:
        """Sync those that hold something new. The caller holds `_handing_over`: nobody closes them meanwhile."""
        dirty = [segment for segment in segments if segment.rows > segment.tried]
        for segment in dirty:
            rows = segment.rows
            try:
                os.fdatasync(segment.descriptor)
            except OSError as error:
                segment.failure = f"The prediction log does not reach the disk: {error.strerror or error}."
            if segment.failure:
                segment.lost += rows - segment.tried
                with self._lock:
                    self.lost += rows - segment.tried
                    self.failures += 1
            segment.tried = rows
        if dirty:
            self._unsynced = next((segment.failure for segment in dirty if segment.failure), "")

    def _write(self, workload: str, rows: int, parts: list[Any], model: Model | None = None) -> bool:
        with self._lock:
            try:
                segment = self._segment(workload, model)
                if model is not None:
                    if model.version not in segment.versions:
                        parts.insert(0, orjson.dumps(_header(model), option=FLAGS))
                    segment.versions[model.version] = model
                self._append(segment, parts)
                segment.rows += rows
                self._unwritten = ""
                return True
            except OSError as error:
                self.lost += rows
                self._unwritten = f"The prediction log cannot be written: {error.strerror or error}."
                if workload in self._segments:
                    self._abandon(workload)
                return False

    def _segment(self, workload: str, model: Model | None) -> Segment:
        """The open one; a new one where the number of this version meant another schema until now."""
        segment = self._segments.get(workload)
        if segment is not None and model is not None:
            known = segment.versions.get(model.version, model)
            if known is not model and _header(known) != _header(model):
                self._leaving.append(self._segments.pop(workload))
                segment = None
        return segment or self._open(workload)

    def _append(self, segment: Segment, parts: list[Any]) -> None:
        size = sum(map(len, parts))
        written = os.write(segment.descriptor, parts[0]) if len(parts) == 1 else self._gather(segment, parts)
        if written != size:
            os.ftruncate(segment.descriptor, segment.size)
            raise OSError(28, "no space is left on the disk")
        segment.size += written

    def _gather(self, segment: Segment, parts: list[Any]) -> int:
        """One write of all parts, or of as many at once as the system takes."""
        written = 0
        for start in range(0, len(parts), MOST_PARTS):
            some = parts[start : start + MOST_PARTS]
            count = os.writev(segment.descriptor, some)
            written += count
            if count != sum(map(len, some)):
                break
        return written

    def _open(self, workload: str) -> Segment:
        while True:
            self._number += 1
            path = self.open_folder / f"{workload}.{self.source}.{self._number:09d}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
            # The reconciler looks for files of dead workers: it may be looking at this new one, or have removed it.
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    segment = self._segments[workload] = Segment(workload, path, descriptor)
                    return segment
            os.close(descriptor)

    def _abandon(self, workload: str) -> None:
        """After a failed write the file may end in half a line: it must be the last one."""
        segment = self._segments.pop(workload)
        if segment.rows:
            self._leaving.append(segment)
            return
        with suppress(OSError):  # else it stays among the open ones until this worker has ended
            segment.path.unlink()
        os.close(segment.descriptor)


def _header(model: Model) -> dict[str, Any]:
    if model.bundle is None:
        return {"h": model.version, "plain": describe(model)}
    return {"h": model.version, "schema": model.bundle.schema.to_json()}
