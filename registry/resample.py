"""Paired bootstrap over rows: one set of resamples for every subject and every group of rows. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from noria.metrics import EDGE
from noria.records import Interval

RESAMPLES = 1000
CELLS = 2_000_000
"""Weights drawn at once, which bounds the memory."""


def weighted_means(
    losses: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray], *, seed: int, resamples: int = RESAMPLES
) -> dict[str, dict[str, np.ndarray]]:
    """Mean losses in `resamples` resamples, by group and subject: arrays [resamples], NaN where a group drew no row.

    `losses`: subject to row losses [n]; `groups`: name to mask [n]. A resample weights rows with Poisson(1) counts, the
    limit of drawing rows with replacement (Hanley & MacGibbon 2006), so that all means are one matrix product.
    """
    rows = len(next(iter(groups.values())))
    masks = np.stack([mask.astype(np.float64) for mask in groups.values()])
    terms = np.stack([mask * loss for mask in masks for loss in losses.values()])
    columns = np.concatenate([masks, terms]).T
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CELLS // max(rows, 1)))
    sums = np.concatenate(
        [
            generator.poisson(1.0, (min(chunk, resamples - start), rows)).astype(np.float64) @ columns
            for start in range(0, resamples, chunk)
        ]
    )
    counts, totals = sums[:, : len(masks)], sums[:, len(masks) :].reshape(resamples, len(masks), len(losses))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = totals / counts[:, :, None]
    return {
        group: {subject: means[:, row, column] for column, subject in enumerate(losses)}
        for row, group in enumerate(groups)
    }


def gain_interval(value: float, own: np.ndarray, other: np.ndarray, level: float) -> Interval:
    """Percentile interval of 1 - own / other over paired resamples [r]; `value` is the point estimate."""
    gains = 1 - own / np.maximum(other, EDGE)
    low, high = np.nanquantile(gains, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
