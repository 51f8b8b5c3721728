"""What the shadow did, for the metrics: rows scored, refused and shed, the time of its runs, what waits and how long.

The shadow's process and its parent keep running counts in files (`serving.shadow_state`); they begin anew with another
challenger. Here the rises of those counts are added to counters that never fall, by the process that outlives both.
Not here: the counting itself (`serving.shadow`, `serving.feed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from serving import shadow_state
from serving.metrics import Metrics
from serving.shadow_state import Reached, Status


class ShadowCounts:
    """The counts of one home. What was there at the first look, an earlier process has counted."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the server's."""
        self.folder = folder / "shadow"
        self._last: tuple[Mapping[str, Reached], Mapping[str, Status]] | None = None

    def look(self, metrics: Metrics) -> None:
        """Add what has happened since the last look, and tell what waits."""
        try:
            reached = shadow_state.read(self.folder / "state.json", Reached)
            status = shadow_state.read(self.folder / "status.json", Status)
        except OSError:  # `serving.shadowing` reads them, too, and says so; the next look counts what this one missed
            return
        was_reached, was_status = self._last or (reached, status)
        self._last = reached, status
        for workload, now in reached.items():
            before = was_reached.get(workload)
            if before is None or before.asked != now.asked:
                before = Reached(now.version, now.asked, "loading")
            runs = _rises(now.runs, before.runs)
            scored, failed = now.rows - before.rows, now.errors - before.errors
            metrics.shadowed(workload, now.version, scored=scored, failed=failed, runs=runs)
        for workload, stands in status.items():
            was = was_status.get(workload)
            if was is not None and stands.asked and was.asked != stands.asked:
                was = None  # another challenger, whose counts begin anew
            dropped = _rise(stands.dropped, was.dropped if was else 0)
            restarts = _rise(stands.restarts, was.restarts if was else 0)
            metrics.shadowed(workload, stands.version, dropped=dropped)
            metrics.shadow_stands(workload, failed=stands.status == "failed", restarts=restarts)
        for workload in was_status.keys() - status.keys():  # no challenger any more
            metrics.shadow_stands(workload, failed=False, restarts=0)
        for workload in {*reached, *status, *was_reached}:
            metrics.shadow_waits(workload, *self._waiting(workload))

    def _waiting(self, workload: str) -> tuple[int, float | None]:
        """Rows that wait or are being scored, and when the oldest of them were logged, seconds since 1970."""
        rows, oldest = 0, None
        for path in _segments(self.folder, workload):
            with suppress(FileNotFoundError):  # done, or shed, at this moment
                written = path.stat().st_mtime
                rows += int(path.name.rpartition(".")[2])
                oldest = written if oldest is None else min(oldest, written)
        return rows, oldest


def _segments(folder: Path, workload: str) -> Iterator[Path]:
    yield from (folder / "waiting" / workload).glob("*")
    yield from (path for path in (folder / "taken").glob("*") if path.name.rsplit(".", 3)[0] == workload)


def _rise(now: int, before: int) -> int:
    """How much a count rose; one that fell began anew."""
    return now - before if now >= before else now


def _rises(now: Sequence[float], before: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(now, before or [0.0] * len(now), strict=False)]
