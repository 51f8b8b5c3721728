"""Copies of the prediction log's segments that wait to be shadowed: bounded, and shed rather than waited for.

The drain offers each segment once its rows are in the lake (a hard link, no bytes move); the shadow process takes the
oldest. Past the bounds the oldest are dropped and counted, so that a slow challenger holds up nothing.

    shadow/waiting/<workload>/<segment>   offered
    shadow/taken/<segment>                being scored; taken again by the next process when this one is killed

Not here: scoring (`serving.shadow`), which workloads have a challenger (`serving.shadowing`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from serving.drain import Ready

MOST_SEGMENTS = 64
MOST_BYTES = 64 * 2**20
"""What may wait for one workload."""


class Feed:
    """The waiting segments of one home. `offer` and `forget` belong to the parent, the rest to the shadow process."""

    def __init__(self, folder: Path, segments: int = MOST_SEGMENTS, size: int = MOST_BYTES) -> None:
        self.folder, self.segments, self.size = folder, segments, size
        self.wanted: frozenset[str] = frozenset()
        """Workloads whose segments are kept when they are offered."""
        self.dropped: dict[str, int] = {}
        """Rows that were shed, by workload, since this process started."""
        (folder / "taken").mkdir(parents=True, exist_ok=True)

    def offer(self, path: Path) -> None:
        """Keep a link to a segment if its workload is wanted, and shed the oldest past the bounds. Never raises: what
        cannot be kept is counted as dropped."""
        ready = Ready.parse(path)
        if ready.workload not in self.wanted:
            return
        folder = self._waiting(ready.workload)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.name)
        except FileExistsError:
            return  # offered before the drain was killed; the same rows
        except OSError:
            self._drop(ready)
            return
        self._shed(folder)

    def forget(self, workload: str) -> None:
        """Remove what waits for a workload, and what was taken and not finished."""
        for path in [*_entries(self._waiting(workload)), *self.taken(workload)]:
            path.unlink(missing_ok=True)

    def forget_others(self, workloads: Collection[str]) -> None:
        """The same for all but these: one that ends may be offered more until the drain knows, or take more itself."""
        found = {folder.name for folder in _entries(self.folder / "waiting")}
        found |= {Ready.parse(path).workload for path in _entries(self.folder / "taken")}
        for workload in found.difference(workloads):
            self.forget(workload)

    def waiting(self, workload: str) -> int:
        """Rows that wait."""
        return sum(Ready.parse(path).rows for path in _entries(self._waiting(workload)))

    def taken(self, workload: str) -> list[Path]:
        """Segments that a process is scoring, or was when it ended."""
        return [path for path in _entries(self.folder / "taken") if Ready.parse(path).workload == workload]

    def take(self, workload: str) -> Path | None:
        """Claim the next segment: one that an earlier process left unfinished, else the oldest; None: nothing waits."""
        taken = self.taken(workload)
        if taken:
            return taken[0]
        while path := _oldest(_entries(self._waiting(workload))):
            try:
                return path.rename(self.folder / "taken" / path.name)
            except FileNotFoundError:
                continue  # shed at this moment
        return None

    def _waiting(self, workload: str) -> Path:
        return self.folder / "waiting" / workload

    def _shed(self, folder: Path) -> None:
        sizes = {path: _size(path) for path in _entries(folder)}
        while sizes and (len(sizes) > self.segments or sum(sizes.values()) > self.size):
            path = _oldest(sizes)
            assert path is not None
            del sizes[path]
            try:
                path.unlink()
            except FileNotFoundError:
                continue  # taken at this moment
            self._drop(Ready.parse(path))

    def _drop(self, ready: Ready) -> None:
        self.dropped[ready.workload] = self.dropped.get(ready.workload, 0) + ready.rows


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _oldest(paths: Iterable[Path]) -> Path | None:
    """The first segment of the writer that has waited longest. A writer's segments never overtake each other, whatever
    the clock does: the lake takes a number below the last one for a repetition."""
    heads: dict[str, Ready] = {}
    for ready in map(Ready.parse, paths):
        if ready.source not in heads or ready.number < heads[ready.source].number:
            heads[ready.source] = ready
    return min(heads.values(), key=lambda ready: _written(ready.path)).path if heads else None


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
