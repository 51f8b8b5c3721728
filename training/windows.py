"""How far back to look: each candidate window trains small boosted trees, and the newest rows say which one is best.

On a system that grows, old rows help; after a break they mislead. The same held-out newest rows judge all windows, and
none of them is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.column import ARROW
from noria.errors import DataError
from noria.metrics import row_losses
from noria.workload import Scorer, Workload
from training import preprocess
from training.data import labelled
from training.evaluate import Boosted

FEWEST, MOST = 150, 1000
"""Newest rows that judge: a fifth of the shortest window within these limits; more would hide a change a week old."""
ROUNDS = 80
LARGEST = 50_000
"""Rows that a cheap model is trained on; longer windows are thinned evenly."""


@dataclass(frozen=True)
class Choice:
    """The chosen window, and why."""

    window: timedelta
    start: datetime
    """First event time of the window; it ends with the newest labelled row."""
    errors: Mapping[timedelta, float]
    """Error of each window's cheap model on the same newest rows."""
    rows: Mapping[timedelta, int]
    """Rows that each window has."""
    judged_on: int

    def reason(self) -> str:
        """One sentence for people."""
        if len(self.errors) < 2:
            return f"The last {self.window.days} days: the only window with enough rows."
        table = ", ".join(f"{window.days} days {error:.3f}" for window, error in self.errors.items())
        return f"The last {self.window.days} days predict the newest {self.judged_on} rows best ({table})."


def choose(workload: Workload, table: pa.Table, *, champion: Scorer | None = None) -> Choice:
    """Among `workload.training.windows`, counted back from the newest labelled row; windows without rows are skipped.

    For a warm start give the `champion`: its score becomes a feature, as a stand-in for going on from its weights.

    Raises:
        DataError: no window has `minimum_rows`.
    """
    rows, _ = labelled(table, workload)
    options = workload.training
    if not len(rows):
        raise DataError(f"'{workload.name}' has no usable labelled rows to choose a training window from.")
    times = rows.column(workload.schema.event_time)
    newest = times[-1].as_py()
    sizes = {window: _count_since(times, newest - window) for window in sorted(options.windows, reverse=True)}
    usable = {window: size for window, size in sizes.items() if size >= options.minimum_rows}
    if not usable:
        longest = max(sizes)
        raise DataError(
            f"'{workload.name}' has {sizes[longest]} usable labelled rows in its longest window, {longest.days} days; "
            f"training needs {options.minimum_rows}. Wait for more, or lower TrainingOptions.minimum_rows."
        )
    judging = int(np.clip(min(usable.values()) // 5, FEWEST, MOST))
    errors: dict[timedelta, float] = {}
    if len(set(usable.values())) > 1:
        held, rest = rows.slice(len(rows) - judging), rows.slice(0, len(rows) - judging)
        for window, size in usable.items():
            # Two windows with the same rows (a young system) are one.
            if size not in [usable[tried] for tried in errors]:
                errors[window] = _error(workload, rest.slice(len(rest) - (size - judging)), held, champion)
    best = min(errors, key=lambda window: errors[window]) if errors else max(usable)
    return Choice(best, newest - best, errors, sizes, judging)


def _count_since(times: pa.ChunkedArray, start: datetime) -> int:
    return int(pc.sum(pc.greater(times, pa.scalar(start, ARROW["timestamp"]))).as_py() or 0)


def _error(workload: Workload, rows: pa.Table, held: pa.Table, champion: Scorer | None) -> float:
    """Mean row loss on `held` of small boosted trees trained on `rows`."""
    if len(rows) > LARGEST:
        rows = rows.take(np.linspace(0, len(rows) - 1, LARGEST).astype(np.int64))
    target, schema = workload.schema.target, workload.schema
    made = preprocess.fit(schema, rows, workload.training)
    extra = [None if champion is None else _stretched(workload, champion(part)) for part in (rows, held)]
    labels = rows.column(target).to_numpy()
    trees = Boosted.fit(workload, made.inputs, made.run(schema.tensors(rows)), labels, rounds=ROUNDS, extra=extra[0])
    scores = trees.score(made.run(schema.tensors(held)), extra[1])
    return float(row_losses(workload.loss, held.column(target).to_numpy(), scores).mean())


def _stretched(workload: Workload, scores: np.ndarray) -> np.ndarray:
    """Scores as one feature column [n, 1], on the scale that is fitted."""
    return np.asarray((np.log(np.maximum(scores, 1e-12)) if workload.log_target else scores)[:, None], np.float64)
