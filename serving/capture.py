"""The prediction log, on the side of the worker: every answered prediction and every label, written before the answer.

A workload's rows go to an open segment (a file of JSON lines, columns as lists). Each request is one `write`, so what
was answered is in the operating system's memory and outlives a killed worker. Segments are handed over by renaming:

    log/open/<workload>.<source>.<number>             being written, locked by its writer
    log/ready/<workload>.<source>.<number>.<rows>     whole; the reconciler moves it into the lake

A full disk does not stop answers: rows that could not be written are counted. Not here: the lake (`serving.drain`).
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from noria.schema import Schema
from serving.wire import Rows

FLAGS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


def batch_ids(base: int, count: int) -> list[str]:
    """Prediction ids of a request: 32 hexadecimal digits that begin with the time, as in a ULID."""
    return [f"{base + offset:032x}" for offset in range(count)]


def new_base(milliseconds: int) -> int:
    """The first id of a request: 48 bits of time, 80 random bits."""
    return (milliseconds << 80) | int.from_bytes(os.urandom(10), "big")


@dataclass
class Segment:
    """One open file of one workload."""

    path: Path
    descriptor: int
    rows: int = 0
    size: int = 0
    versions: set[int] = field(default_factory=set)
    """Versions whose schema the file already holds, so that it can be read by itself."""


class Log:
    """The segments of one worker. Safe to use from several threads."""

    def __init__(self, folder: Path, source: str) -> None:
        self.open_folder, self.ready_folder = folder / "open", folder / "ready"
        self.open_folder.mkdir(parents=True, exist_ok=True)
        self.ready_folder.mkdir(parents=True, exist_ok=True)
        self.source = source
        self.lost = 0
        """Answered rows and labels that could not be written."""
        self.failure = ""
        """Why the last write failed; empty again after one that did not."""
        self._segments: dict[str, Segment] = {}
        self._number = 0
        self._lock = threading.Lock()

    def predictions(
        self,
        workload: str,
        version: int,
        schema: Schema,
        *,
        base: int,
        rows: Rows,
        scores: np.ndarray,
        actions: Sequence[str | None],
        latency_ms: float,
    ) -> None:
        """Log answered rows; the id of row i is base + i."""
        columns = {name: values.tolist() if values.dtype == object else values for name, values in rows.tensors.items()}
        line = orjson.dumps(
            {"v": version, "i": f"{base:x}", "t": rows.times, "s": scores, "c": columns, "ms": round(latency_ms, 3),
             "a": actions if actions and actions[0] is not None else None}, option=FLAGS
        )  # fmt: skip
        self._write(workload, len(rows), line, version, schema)

    def labels(self, workload: str, ids: Sequence[str], labels: Sequence[float], times: np.ndarray) -> None:
        """Log labels; `times` is when each arrived, microseconds [n]."""
        self._write(workload, len(ids), orjson.dumps({"id": ids, "y": labels, "t": times}, option=FLAGS))

    def rotate(self) -> None:
        """Hand every segment that holds something over to the reconciler."""
        with self._lock:
            for workload in list(self._segments):
                self._hand_over(workload)

    def pending(self) -> dict[str, tuple[int, int]]:
        """Rows and segments by workload that are not in the lake yet, whoever wrote them."""
        found: dict[str, list[int]] = {}
        for path in self.ready_folder.iterdir():
            workload, *_, rows = path.name.split(".")
            count = found.setdefault(workload, [0, 0])
            count[0] += int(rows)
            count[1] += 1
        with self._lock:
            for workload, segment in self._segments.items():
                count = found.setdefault(workload, [0, 0])
                count[0] += segment.rows
                count[1] += 1
        return {workload: (rows, segments) for workload, (rows, segments) in found.items()}

    def _write(self, workload: str, rows: int, line: bytes, version: int = 0, schema: Schema | None = None) -> None:
        with self._lock:
            try:
                segment = self._segments.get(workload) or self._open(workload)
                if schema is not None and version not in segment.versions:
                    line = orjson.dumps({"h": version, "schema": schema.to_json()}, option=FLAGS) + line
                    segment.versions.add(version)
                self._append(segment, line)
                segment.rows += rows
                self.failure = ""
            except OSError as error:
                self.lost += rows
                self.failure = f"The prediction log cannot be written: {error.strerror or error}."
                if workload in self._segments:
                    self._abandon(workload)

    def _append(self, segment: Segment, line: bytes) -> None:
        written = os.write(segment.descriptor, line)
        if written != len(line):
            os.ftruncate(segment.descriptor, segment.size)
            raise OSError(28, "no space is left on the disk")
        segment.size += written

    def _open(self, workload: str) -> Segment:
        while True:
            self._number += 1
            path = self.open_folder / f"{workload}.{self.source}.{self._number:09d}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # the reconciler looks for files of dead workers, and looked at this new one
                os.close(descriptor)
                continue
            segment = self._segments[workload] = Segment(path, descriptor)
            return segment

    def _hand_over(self, workload: str) -> None:
        segment = self._segments[workload]
        if not segment.rows:
            return
        segment.path.rename(self.ready_folder / f"{segment.path.name}.{segment.rows}")
        os.close(segment.descriptor)
        del self._segments[workload]

    def _abandon(self, workload: str) -> None:
        """After a failed write the file may end in half a line: it must be the last one."""
        segment = self._segments.pop(workload)
        try:
            if segment.rows:
                segment.path.rename(self.ready_folder / f"{segment.path.name}.{segment.rows}")
            else:
                segment.path.unlink()
        except OSError:
            pass  # it stays among the open ones, and is adopted when this worker has ended
        os.close(segment.descriptor)
