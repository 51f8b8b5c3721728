"""How good the serving version's own predictions are, on rows whose labels have arrived, beside its reference.

Numbers with intervals only; whether they are an alarm is `monitoring.policy`.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.metrics import EDGE, bootstraps, evaluate, residuals, row_losses
from noria.records import Evaluation, Interval, Quality
from noria.workload import Workload

EXACT_ROWS = 20_000
"""More rows than this get the normal interval, which is the same by then and costs nothing."""
NORMAL_95 = 1.959964


def judge(rows: pa.Table, reference: Evaluation, workload: Workload) -> Quality:
    """Error and bias of labelled predictions.

    Args:
        rows: predictions of one version, not empty, with `score`, `label` and `event_time`.
        reference: the same version on the test part of its own training window.
        workload: its task, loss and scale.
    """
    labels = np.asarray(rows.column("label").to_numpy(), np.float64)
    scores = np.asarray(rows.column("score").to_numpy(), np.float64)
    sizes, errors = max(float(np.abs(labels).mean()), EDGE), np.abs(labels - scores)
    ratio = float(errors.mean()) / sizes
    # The interval of a ratio by the delta method: that of the mean of its linear part.
    linear = ratio + (errors - ratio * np.abs(labels)) / sizes
    losses, rest = row_losses(workload.loss, labels, scores), residuals(labels, scores, log=workload.log_target)
    error, bias, relative = _intervals(np.stack([losses, rest, linear], axis=1))
    found = evaluate(labels, scores, task=workload.task, loss=workload.loss, log=workload.log_target)
    known = reference.metrics
    return Quality(
        rows=len(rows),
        error=error,
        reference_error=known.get("error", float("nan")),
        bias=bias,
        reference_bias=known.get("mean_residual", 0.0),
        reference_spread=known.get("residual_spread", float("nan")),
        metrics=found.metrics,
        relative=relative if workload.log_target else None,
        reference_relative=known.get("wape", 0.0),
        reference_rows=reference.rows,
        newest=_newest(rows),
    )


def _intervals(columns: np.ndarray) -> tuple[Interval, ...]:
    """The mean of each column of [n, k] with its interval."""
    if len(columns) <= EXACT_ROWS:
        return bootstraps(columns)
    means, halves = columns.mean(0), NORMAL_95 * columns.std(0) / len(columns) ** 0.5
    return tuple(Interval(float(m), float(m - h), float(m + h)) for m, h in zip(means, halves, strict=True))


def _newest(rows: pa.Table) -> datetime | None:
    newest = pc.max(rows.column("event_time")).as_py()
    return newest.astimezone(UTC) if newest else None
