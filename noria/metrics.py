"""How good predictions are: row losses, and the metrics that are shown. NumPy only; every array has shape [n].

A *row loss* has a mean that can be bootstrapped, so that gate and watch judge with an interval. Residuals are on the
scale on which the model is fitted: log(y) - log(prediction) for a log target, y - prediction otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from noria.records import Evaluation, Interval

Loss = Literal["absolute_error", "squared_error", "log_loss", "brier"]
EDGE = 1e-7


def row_losses(loss: Loss, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Loss of each row, in the target's unit (absolute_error), squared, or nats (log_loss)."""
    labels, scores = labels.astype(np.float64), scores.astype(np.float64)
    losses: np.ndarray
    if loss == "absolute_error":
        losses = np.abs(labels - scores)
    elif loss in ("squared_error", "brier"):
        losses = (labels - scores) ** 2
    else:
        scores = np.clip(scores, EDGE, 1 - EDGE)
        losses = -(labels * np.log(scores) + (1 - labels) * np.log(1 - scores))
    return losses


def residuals(labels: np.ndarray, scores: np.ndarray, *, log: bool) -> np.ndarray:
    """Signed residual of each row; positive: the truth is above the prediction."""
    labels, scores = labels.astype(np.float64), scores.astype(np.float64)
    if log:
        labels, scores = np.log(np.maximum(labels, EDGE)), np.log(np.maximum(scores, EDGE))
    difference: np.ndarray = labels - scores
    return difference


def bootstrap(values: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of `values` with its percentile bootstrap interval (Efron 1979). `values` must not be empty."""
    return bootstraps(values[:, None], resamples=resamples, level=level, seed=seed)[0]


def bootstraps(
    columns: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Interval, ...]:
    """`bootstrap` of each column of [n, k], on the same resamples: drawing them is what takes the time."""
    generator = np.random.default_rng(seed)
    # Poisson(1) counts a row instead of drawing indices: the same limit, one matrix product (Hanley & MacGibbon 2006).
    means = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, 50):
        counts = generator.poisson(1.0, (min(50, resamples - start), len(columns))).astype(np.float64)
        means[start : start + len(counts)] = counts @ columns / np.maximum(counts.sum(1, keepdims=True), 1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return tuple(Interval(*(float(part) for part in one)) for one in zip(columns.mean(0), low, high, strict=True))


def recalibration(
    labels: np.ndarray, scores: np.ndarray, *, task: Literal["regression", "binary"], log: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """The one offset that best corrects `scores` on these rows, as a function of scores.

    Regression: the median residual, on the scale that is fitted. Binary: a shift of the logit that makes the mean score
    the share of positives (prior correction, Saerens et al. 2002).
    """
    if task == "regression":
        offset = float(np.median(residuals(labels, scores, log=log)))
        return lambda new: new * np.exp(offset) if log else new + offset
    share = float(np.clip(labels.mean(), EDGE, 1 - EDGE))

    def shifted(new: np.ndarray, by: float) -> np.ndarray:
        clipped = np.clip(new.astype(np.float64), EDGE, 1 - EDGE)
        return np.asarray(1 / (1 + (1 - clipped) / clipped * np.exp(-by)))

    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if shifted(scores, middle).mean() < share else (low, middle)
    shift = (low + high) / 2
    return lambda new: shifted(new, shift)


def regression_metrics(labels: np.ndarray, scores: np.ndarray, *, log: bool) -> dict[str, float]:
    """Mean absolute and root mean squared error, WAPE (sum of errors / sum of truths), mean and spread of residuals."""
    errors, rest = np.abs(labels - scores), residuals(labels, scores, log=log)
    return {
        "mae": float(errors.mean()),
        "rmse": float(np.sqrt((errors**2).mean())),
        "wape": float(errors.sum() / max(float(np.abs(labels).sum()), EDGE)),
        "mean_residual": float(rest.mean()),
        "residual_spread": float(rest.std()),
    }


def binary_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Log loss, Brier score, F1 at 0.5, ROC AUC (NaN with one class), mean and spread of residuals."""
    chosen, truth = scores > 0.5, labels > 0.5
    hits = float((chosen & truth).sum())
    rest = residuals(labels, scores, log=False)
    return {
        "log_loss": float(row_losses("log_loss", labels, scores).mean()),
        "brier": float(row_losses("brier", labels, scores).mean()),
        "f1": 2 * hits / max(float(chosen.sum() + truth.sum()), 1.0),
        "auc": _auc(truth, scores),
        "mean_residual": float(rest.mean()),
        "residual_spread": float(rest.std()),
    }


def evaluate(
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    task: Literal["regression", "binary"],
    loss: Loss,
    log: bool = False,
    slices: dict[str, np.ndarray] | None = None,
) -> Evaluation:
    """Every metric of the task plus `error`, the mean row loss that gate and watch judge; `slices`: name to mask [n].

    Slices without rows are left out.
    """

    def measure(mask: np.ndarray) -> dict[str, float]:
        truth, score = labels[mask], scores[mask]
        shown = regression_metrics(truth, score, log=log) if task == "regression" else binary_metrics(truth, score)
        return {"error": float(row_losses(loss, truth, score).mean()), "rows": float(mask.sum()), **shown}

    everything = np.ones(len(labels), bool)
    parts = {name: measure(mask) for name, mask in (slices or {}).items() if mask.any()}
    return Evaluation(len(labels), measure(everything) if len(labels) else {}, parts)


def _auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties at their mean rank."""
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))
