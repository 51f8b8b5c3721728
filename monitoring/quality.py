"""How good the serving version's own predictions are, on rows whose labels have arrived, beside its reference.

Numbers with intervals only; whether they are an alarm is `monitoring.policy`.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.metrics import EDGE, bootstrap, evaluate, residuals, row_losses
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
    losses = row_losses(workload.loss, labels, scores)
    found = evaluate(labels, scores, task=workload.task, loss=workload.loss, log=workload.log_target)
    known = reference.metrics
    return Quality(
        rows=len(rows),
        error=_interval(losses),
        reference_error=known.get("error", float("nan")),
        bias=_interval(residuals(labels, scores, log=workload.log_target)),
        reference_bias=known.get("mean_residual", 0.0),
        reference_spread=known.get("residual_spread", float("nan")),
        metrics=found.metrics,
        relative=_ratio(np.abs(labels - scores), np.abs(labels)) if workload.log_target else None,
        reference_relative=known.get("wape", 0.0),
        reference_rows=reference.rows,
        newest=_newest(rows),
    )


def _interval(values: np.ndarray) -> Interval:
    if len(values) <= EXACT_ROWS:
        return bootstrap(values)
    mean, half = float(values.mean()), NORMAL_95 * float(values.std()) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def _ratio(errors: np.ndarray, sizes: np.ndarray) -> Interval:
    """Sum of errors / sum of sizes; its interval by the delta method, as the mean of its linear part."""
    mean = max(float(sizes.mean()), EDGE)
    ratio = float(errors.mean()) / mean
    around = _interval((errors - ratio * sizes) / mean)
    return Interval(ratio, ratio + around.low, ratio + around.high)


def _newest(rows: pa.Table) -> datetime | None:
    newest = pc.max(rows.column("event_time")).as_py()
    return newest.astimezone(UTC) if newest else None
