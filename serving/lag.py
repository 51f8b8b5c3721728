"""What of the prediction log is not in the lake yet, for the metrics.

A worker tells of what it is writing, the parent of what was handed over. Not here: moving it (`serving.drain`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from serving.metrics import Metrics

Waiting = Mapping[str, tuple[int, int, float]]
"""By workload: rows, files, and when the oldest of them was begun, seconds since 1970."""


def handed_over(folder: Path) -> Waiting:
    """What lies ready in the log's `folder`."""
    found: dict[str, tuple[int, int, float]] = {}
    for path in (folder / "ready").glob("*"):
        with suppress(FileNotFoundError):  # it went into the lake meanwhile
            workload, *_, rows = path.name.rsplit(".", 3)
            before = found.get(workload, (0, 0, float("inf")))
            found[workload] = before[0] + int(rows), before[1] + 1, min(before[2], path.stat().st_mtime)
    return found


def look_at_log(metrics: Metrics, waiting: Waiting, workloads: Iterable[str]) -> None:
    """Tell the metrics what waits; nothing, for the other `workloads`; and of no others any more."""
    known = {*workloads, *waiting}
    for workload in known:
        rows, segments, oldest = waiting.get(workload, (0, 0, None))
        metrics.log_lag(workload, rows, segments, oldest)
    metrics.log_lag_only(known)
