"""noria's own figures and calibrated verdicts, as Evidently metrics: what an Evidently run holds and its panels plot.

`CalibratedDrift` is Evidently's `ValueDrift` with a method registered here, whose score is the distance over its
calibrated threshold: one limit, 1, for every column and every window. The rest are plain named numbers. Imports
Evidently: import this module from `monitoring.publish` only.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from evidently import DataDefinition, Dataset, Report
from evidently.core.metric_types import SingleValue, SingleValueCalculation, SingleValueMetric
from evidently.core.report import Context, Snapshot
from evidently.legacy.calculations.stattests import StatTest, register_stattest
from evidently.legacy.core import ColumnType
from evidently.legacy.model.widget import BaseWidgetInfo
from evidently.metrics.column_statistics import ValueDrift, ValueDriftCalculation

from monitoring.binning import SCORE, Binning
from monitoring.window import Observation
from noria.records import ColumnDrift, DriftReport, Window

ROWS = 1000
"""Rows of the frames that Evidently sees: shares to a tenth of a percent, whatever the window holds."""
METHOD = StatTest("noria", "Jensen-Shannon distance / calibrated threshold", [ColumnType.Categorical], 1.0)

_verdicts: ContextVar[Mapping[str, ColumnDrift]] = ContextVar("verdicts")


class Figure(SingleValueMetric):  # type: ignore[misc]
    """One number of a watch, by name, and by column where there is one a column."""

    name: str
    column: str = ""


class FigureCalculation(SingleValueCalculation[Figure]):  # type: ignore[misc]
    """Reads the number from the run's `figures`."""

    def calculate(self, context: Context, current_data: Dataset, reference_data: Dataset | None) -> SingleValue:
        """The number, without a widget: the page draws them together."""
        numbers = context.additional_data["figures"].as_dataframe()
        value = numbers.loc[numbers["name"] == self.metric.name + self.metric.column, "value"]
        result = self.result(float(value.iloc[0]))
        result.widget = []
        return result

    def display_name(self) -> str:
        """The name, and the column."""
        return f"{self.metric.name}: {self.metric.column}" if self.metric.column else self.metric.name


class CalibratedDriftCalculation(ValueDriftCalculation, ABC):  # type: ignore[misc]
    """Evidently's calculation without its widget, which takes most of the time: the page draws columns itself."""

    def _render(self, *_: Any) -> list[BaseWidgetInfo]:
        return []


class CalibratedDrift(ValueDrift):  # type: ignore[misc]
    """Drift of one column, by noria's method."""

    # Said here because Evidently would register a calculation (one without ABC) for ValueDrift itself.
    __calculation_type__ = CalibratedDriftCalculation


def run(observation: Observation) -> Snapshot:
    """An Evidently run of the window: every figure, and the drift of every column that was compared."""
    report = observation.report
    drifts = [*report.columns, *([report.prediction] if report.prediction else [])]
    named = figures(report)
    metrics: list[Any] = [Figure(name=name, column=column) for name, column in named]
    metrics += [CalibratedDrift(column=shown(one.column), method=METHOD.name, threshold=1.0) for one in drifts]
    numbers = pd.DataFrame({"name": ["".join(key) for key in named], "value": list(named.values())})
    frames = _frames(observation, [one.column for one in drifts]) if drifts else (numbers, None)
    register_stattest(METHOD, _score)
    token = _verdicts.set({shown(one.column): one for one in drifts})
    try:
        return Report(metrics, metadata=_metadata(report), tags=[report.verdict]).run(
            *frames,
            additional_data={"figures": numbers},
            timestamp=report.window.end.replace(tzinfo=None),
            name=f"{report.workload} version {report.version}, {between(report.window)}",
        )
    finally:
        _verdicts.reset(token)


def figures(report: DriftReport) -> dict[tuple[str, str], float]:
    """(name, column) to value, for all that the report knows; what it does not know is left out."""
    found: dict[tuple[str, str], float] = {("rows", ""): report.rows, ("version", ""): report.version}
    compared = [*report.columns, *([report.prediction] if report.prediction else [])]
    if compared:
        found["drifted share", ""] = sum(one.drifted for one in compared) / len(compared)
        # A line to hold the columns' drift against.
        found["limit", ""] = 1.0
        found["missing share", ""] = float(np.mean([one.missing for one in report.columns] or [0.0]))
        found |= {("missing", one.column.partition(" (")[0]): one.missing for one in report.columns}
    if report.prediction:
        found["prediction distance", ""] = report.prediction.distance
        found["prediction threshold", ""] = report.prediction.threshold
    if quality := report.quality:
        found["error", ""], found["reference error", ""] = quality.error.value, quality.reference_error
        found["error low", ""], found["error high", ""] = quality.error.low, quality.error.high
        found["bias", ""], found["reference bias", ""] = quality.bias.value, quality.reference_bias
        found["labelled rows", ""] = quality.rows
        if quality.relative:
            found["relative error", ""] = quality.relative.value
            found["reference relative error", ""] = quality.reference_relative
    found["broken rows", ""] = sum(report.violations.values())
    return {key: float(value) for key, value in found.items() if np.isfinite(value)}


def between(window: Window) -> str:
    """A window as people write it; midnights without their hour."""
    first, last = f"{window.start:%Y-%m-%d %H:%M}", f"{window.end:%Y-%m-%d %H:%M}"
    if first.endswith("00:00") and last.endswith("00:00"):
        first, last = first[:10], last[:10]
    return f"{first} to {last}"


def shown(column: str) -> str:
    """What people call a compared column."""
    return "prediction" if column == SCORE else column


def shares(observation: Observation, column: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Categories of a compared column, and their shares in the reference and in the window; only those that occur."""
    entry = observation.bundle.thresholds["columns"][column]
    binning = Binning.from_json(entry["binning"])
    rows: pa.Table = observation.answered if column == SCORE else observation.rows
    counts = [np.array(entry["counts"]), binning.counts(rows)]
    seen = counts[0] + counts[1] > 0
    reference, current = (part[seen] / max(part.sum(), 1) for part in counts)
    return tuple(label for label, kept in zip(binning.labels, seen, strict=True) if kept), reference, current


def _frames(observation: Observation, columns: list[str]) -> tuple[Dataset, Dataset]:
    """Window and reference as Evidently sees them: each compared column as its categories, in their shares."""
    drawn: list[dict[str, np.ndarray]] = [{}, {}]
    for column in columns:
        labels, reference, current = shares(observation, column)
        for frame, part in zip(drawn, (current, reference), strict=True):
            ends = np.round(np.cumsum(part) * ROWS).astype(int)
            frame[shown(column)] = np.repeat(np.array(labels, object), np.diff(ends, prepend=0))
    definition = DataDefinition(categorical_columns=list(drawn[0]))
    current_data, reference_data = (
        Dataset.from_pandas(pd.DataFrame(frame, dtype=object), definition) for frame in drawn
    )
    return current_data, reference_data


def _score(reference: pd.Series, current: pd.Series, kind: ColumnType, threshold: float) -> tuple[float, bool]:
    """The verdict that `monitoring.drift` reached on all rows, as an Evidently method answers."""
    verdict = _verdicts.get()[str(current.name)]
    return verdict.distance / verdict.threshold, verdict.drifted


def _metadata(report: DriftReport) -> dict[str, str]:
    return {
        "model version": str(report.version),
        "verdict": report.verdict,
        "window start": report.window.start.isoformat(),
        "window end": report.window.end.isoformat(),
        "rows": str(report.rows),
    }
