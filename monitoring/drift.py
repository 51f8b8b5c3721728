"""How far a window is from the reference, and whether that is further than the reference's periods are from their past.

`calibrate` runs once, when a version is made; what it learns travels in the bundle. `measure` judges a window by it.
The distance is Jensen-Shannon, base 2, over the categories of `monitoring.binning` (Lin 1991).

Real weeks differ by more than sampling noise, so a threshold from resampled rows alarms on every calm week. Here each
period of the reference is compared with what came before it, at the window's length; a new window is judged by the
prediction interval of those divergences (cube roots, near normal by Wilson & Hilferty 1931; Student's t, for there are
few periods), after the part that is sampling noise is exchanged for the noise of the window's actual row count.
Verdicts over all columns and the score keep one false-alarm budget (Benjamini & Hochberg 1995). What follows from a
verdict is decided in `monitoring.policy`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import stdtr, stdtrit

from monitoring.binning import SCORE, Binning, binnings
from noria.options import DriftOptions
from noria.records import ColumnDrift
from noria.schema import Schema

PERIODS = 6
"""Fewer periods of the window's length say too little about their variation; shorter ones are compared then."""
DIVISORS = (1, 2, 7, 14, 28)
NOISE = 1 / (8 * math.log(2))
"""Divergence of a sample of n rows from its source: about NOISE x (categories - 1) / n (chi-squared approximation)."""
SHORT_REFERENCE = 0.05**2
"""Least between-period divergence assumed where shorter periods had to be taken: they cannot show slow changes."""


@dataclass(frozen=True)
class Null:
    """How the divergence of a calm period from its past is distributed: its cube root has this mean and spread."""

    mean: float
    spread: float
    periods: int
    """Periods that were compared."""
    between: float
    """Mean divergence between periods that is not sampling noise."""
    noise: float
    """Mean divergence that is."""

    def p_value(self, distance: float, noise: float) -> float:
        """Probability that a calm window with this sampling noise is at least this far."""
        if distance <= 0:
            return 1.0
        z = (np.cbrt(distance**2 / self._scale(noise)) - self.mean) / self._width
        return float(stdtr(self.periods - 1, -z))

    def distance(self, p_value: float, noise: float) -> float:
        """The distance that has this p-value; at most 1."""
        cube_root = self.mean - self._width * float(stdtrit(self.periods - 1, p_value))
        return min(1.0, math.sqrt(max(0.0, cube_root) ** 3 * self._scale(noise)))

    def _scale(self, noise: float) -> float:
        return (self.between + noise) / (self.between + self.noise)

    @property
    def _width(self) -> float:
        """Spread of a prediction: the mean is an estimate too."""
        return self.spread * math.sqrt(1 + 1 / self.periods)


def calibrate(reference: pa.Table, schema: Schema, options: DriftOptions) -> dict[str, Any]:
    """What `measure` needs to judge windows against `reference`, as plain JSON data.

    Args:
        reference: rows that the version was trained on: the schema's columns, the event time, and `score`.

    A reference smaller than the least window is no reference: no column is compared then, and drift stays unknown.
    """
    if len(reference) < options.minimum_rows:
        note = f"{len(reference)} rows are too few to compare with; at least {options.minimum_rows} are needed"
        return {"rows": len(reference), "periods": 0, "note": note, "columns": {}}
    micros = reference.column(schema.event_time).cast(pa.int64()).to_numpy()
    periods, divisor = _periods(micros, round(options.window.total_seconds() * 1e6))
    columns = {}
    for binning in binnings(reference, schema, options.bins):
        width = len(binning.labels)
        cells = np.bincount(periods * width + binning.codes(reference), minlength=(periods.max() + 1) * width)
        counts = cells.reshape(-1, width)
        columns[binning.name] = {
            "binning": binning.to_json(),
            "counts": counts.sum(0).tolist(),
            "null": vars(_null(counts, SHORT_REFERENCE if divisor != 1 else 0.0)),
        }
    return {"rows": len(reference), "periods": int(periods.max() + 1), "note": _note(divisor), "columns": columns}


def measure(
    table: pa.Table, thresholds: Mapping[str, Any], options: DriftOptions, answered: pa.Table | None = None
) -> tuple[ColumnDrift, ...]:
    """The drift of every compared column and of the score; columns that the table lacks count as missing throughout.

    `threshold` is the distance above which a column is called drifted in this window: the one that keeps the budget.

    Args:
        table: the window's rows, whoever answered them.
        thresholds: what `calibrate` returned.
        options: the budget.
        answered: the rows whose `score` is compared, those of the serving version; all of them where not given. The
            score is left out when they are too few.
    """
    scored = table if answered is None else answered
    found = [
        _Comparison.of(name, entry, scored if name == SCORE else table)
        for name, entry in thresholds.get("columns", {}).items()
        if name != SCORE or len(scored) >= options.minimum_rows
    ]
    cut = _cut([one.p_value for one in found], options.false_alarms)
    return tuple(one.drift(cut, options.minimum_distance) for one in found)


def split(columns: Sequence[ColumnDrift]) -> tuple[tuple[ColumnDrift, ...], ColumnDrift | None]:
    """What `measure` returned, as the columns and the prediction."""
    score = [one for one in columns if one.column == SCORE]
    return tuple(one for one in columns if one.column != SCORE), score[0] if score else None


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon distance, base 2, of two arrays of counts; 0 when either has none."""
    return math.sqrt(_divergence(first, second))


@dataclass(frozen=True)
class _Comparison:
    name: str
    distance: float
    noise: float
    null: Null
    p_value: float
    missing: float
    missing_reference: float

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any], table: pa.Table) -> _Comparison:
        reference, null = np.array(entry["counts"]), Null(**entry["null"])
        counts = Binning.from_json(entry["binning"]).counts(table)
        noise = _noise(reference, counts.sum(), reference.sum())
        far = distance(counts, reference)
        shares = [float(part[-1] / max(part.sum(), 1)) for part in (counts, reference)]
        return cls(name, far, noise, null, null.p_value(far, noise), *shares)

    def drift(self, cut: float, least: float) -> ColumnDrift:
        threshold = max(self.null.distance(cut, self.noise), least)
        drifted = self.p_value <= cut and self.distance >= least
        return ColumnDrift(
            self.name, self.distance, threshold, self.p_value, drifted, self.missing, self.missing_reference
        )


def _cut(p_values: Sequence[float], budget: float) -> float:
    """The largest p-value that Benjamini and Hochberg call significant; with none, the one that a single would need."""
    ordered = np.sort(p_values)
    lines = budget * np.arange(1, len(ordered) + 1) / max(len(ordered), 1)
    below = np.flatnonzero(ordered <= lines)
    return float(lines[below[-1] if len(below) else 0]) if len(ordered) else budget


def _periods(micros: np.ndarray, window: int) -> tuple[np.ndarray, int]:
    """The period of each row (counted back from the newest), and by what the window had to be divided to get enough.

    Periods with few rows (holes, the oldest part) are merged into their newer neighbour. 0 as the divisor: time says
    nothing (all at once, or a few days), so the rows are cut into equal parts in order of time.
    """
    back = micros.max() - micros
    for divisor in DIVISORS:
        _, periods = np.unique(back // max(window // divisor, 1), return_inverse=True)
        sizes = np.bincount(periods)
        least = float(np.median(sizes)) / 2
        if (sizes >= least).sum() >= PERIODS:
            return _merged(periods, least), divisor
    order = np.empty(len(micros), np.int64)
    order[np.argsort(micros, kind="stable")] = np.arange(len(micros))
    return order * PERIODS // len(micros), 0


def _merged(periods: np.ndarray, least: float) -> np.ndarray:
    """Numbers without the small periods, whose rows join the newer neighbour."""
    starts = np.bincount(periods) >= least
    starts[0] = True
    return np.asarray((np.cumsum(starts) - 1)[periods])


def _null(counts: np.ndarray, least_between: float) -> Null:
    """The null distribution from the counts of each period, newest first: [periods, categories].

    A period is compared with all that came before it, as a new window will be: comparing it with the periods on both
    sides would hide trends, and alarmed twice as often on calm weeks of the taxi stream.
    """
    before = counts[::-1].cumsum(0)[::-1] - counts
    compared = slice(0, len(counts) - max(2, len(counts) // 4))
    total = counts.sum(0)
    divergences, noises = np.array(
        [
            (_divergence(part, past), _noise(total, part.sum(), past.sum()))
            for part, past in zip(counts[compared], before[compared], strict=True)
        ]
    ).T
    noise = float(noises.mean())
    between = max(float((divergences - noises).mean()), least_between)
    # Neither mean nor spread may fall below what sampling alone gives (a constant column has none of its own).
    freedom = max(1, int((total > 0).sum()) - 1)
    floor = np.cbrt(between + noise)
    usual, roots = float(floor * (1 - 2 / (9 * freedom))), np.cbrt(divergences)
    spread = max(float(roots.std(ddof=1)), float(floor * math.sqrt(2 / (9 * freedom))))
    return Null(max(float(roots.mean()), usual), spread, len(roots), between, noise)


def _noise(reference: np.ndarray, rows: int, others: int) -> float:
    """Mean divergence that sampling gives `rows` and `others` rows of the same source.

    Categories seen nearly never add at most their share; one never seen could have had half a row.
    """
    if rows == 0 or others == 0:
        return NOISE
    shares = np.maximum(reference, 0.5) / max(reference.sum(), 1)
    return float(np.minimum(shares, NOISE * np.clip(1 - shares, 0, 1) * (1 / rows + 1 / others)).sum())


def _divergence(first: np.ndarray, second: np.ndarray) -> float:
    if not first.sum() or not second.sum():
        return 0.0
    p, q = first / first.sum(), second / second.sum()
    middle = (p + q) / 2

    def to_middle(part: np.ndarray) -> float:
        seen = part > 0
        return float((part[seen] * np.log2(part[seen] / middle[seen])).sum())

    return min(1.0, max(0.0, (to_middle(p) + to_middle(q)) / 2))


def _note(divisor: int) -> str:
    if divisor == 1:
        return "periods of the watched window's length"
    how = f"periods of 1/{divisor} of the window" if divisor else "equal parts of the rows in order of time"
    return f"short reference: {how}, and at least {math.sqrt(SHORT_REFERENCE):.2f} of distance between periods assumed"
