"""What the serving version saw in the window that ends now, judged: the evidence that dashboards show and policy reads.

Reads the lake and the version's bundle; writes nothing. Time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from monitoring.drift import measure, split
from monitoring.policy import quality_alarms
from monitoring.quality import judge
from noria.lake import Lake
from noria.records import ColumnDrift, DriftReport, Quality, Version, Window, moment
from noria.schema import ARROW
from noria.workload import Workload
from registry.bundle import Bundle

LABEL_WINDOWS = (2, 8)
"""How many windows back labelled predictions are looked for; the second only when the first has too few."""
PRESENT, GONE = 0.5, 0.99
"""A column at most half missing in the reference that is missing in nearly every row of the window: a schema fault."""

Verdict = Literal["ok", "drift", "quality", "schema", "unknown"]


@dataclass(frozen=True)
class Observation:
    """A report, and what a dashboard needs to draw it."""

    report: DriftReport
    rows: pa.Table
    """Every prediction logged in the window, whoever made it."""
    bundle: Bundle
    workload: Workload

    @property
    def answered(self) -> pa.Table:
        """The rows that the serving version answered itself."""
        return _of(self.rows, self.report.version)


def observe(*, lake: Lake, bundle: Bundle, version: Version, window: Window, workload: Workload) -> Observation:
    """Judge a version by one window of the lake.

    Inputs are those of every prediction logged in the window; scores and quality count the version's own answers only,
    quality by labels that arrived by the window's end.
    """
    rows = lake.predictions(window)
    quality = _quality(lake, bundle, version, window, workload)
    enough = len(rows) >= workload.drift.minimum_rows
    answered = _of(rows, version.number)
    drifts = measure(rows, bundle.thresholds, workload.drift, answered) if enough else ()
    columns, prediction = split(drifts)
    violations = workload.schema.violations(rows) if len(rows) else {}
    verdict, reasons = _verdict(len(rows), violations, drifts, quality, workload)
    report = DriftReport(
        workload=workload.name,
        version=version.number,
        window=window,
        rows=len(rows),
        violations=violations,
        columns=columns,
        prediction=prediction,
        quality=quality,
        verdict=verdict,
        reasons=reasons,
        serving_since=_since(lake, version, window, workload) if quality is None else None,
    )
    return Observation(report, rows, bundle, workload)


def _quality(lake: Lake, bundle: Bundle, version: Version, window: Window, workload: Workload) -> Quality | None:
    """Quality on the newest window with enough labels (or the windows together); None where there are too few."""
    length, least = window.end - window.start, workload.policy.minimum_labels
    for back in LABEL_WINDOWS:
        judged = _of(lake.judged(Window(window.end - back * length, window.end), window.end), version.number)
        judged = judged.filter(pc.is_valid(judged.column("score")))
        if len(judged) >= least:
            return judge(_newest(judged, window.end, length, least), bundle.evaluations["candidate"], workload)
    return None


def _newest(judged: pa.Table, end: datetime, length: timedelta, least: int) -> pa.Table:
    """The rows of the newest window that has enough of them; all where none has."""
    times = judged.column("event_time")
    for back in range(max(LABEL_WINDOWS)):
        first, last = (pa.scalar(end - number * length, ARROW["timestamp"]) for number in (back + 1, back))
        rows = judged.filter(pc.and_(pc.greater_equal(times, first), pc.less(times, last)))
        if len(rows) >= least:
            return rows
    return judged


def _since(lake: Lake, version: Version, window: Window, workload: Workload) -> datetime | None:
    """When the version's first prediction was made, looking back as far as the policy's patience with labels."""
    back = Window(min(window.start, window.end - workload.policy.label_patience), window.end)
    first = pc.min(_of(lake.predictions(back), version.number).column("event_time")).as_py()
    return moment(first) if first else None


def _of(rows: pa.Table, version: int) -> pa.Table:
    return rows.filter(pc.equal(rows.column("version"), version))


def _verdict(
    rows: int,
    violations: dict[str, int],
    drifts: tuple[ColumnDrift, ...],
    quality: Quality | None,
    workload: Workload,
) -> tuple[Verdict, tuple[str, ...]]:
    """The gravest finding, and what led to it."""
    enough = rows >= workload.drift.minimum_rows
    faults = _faults(rows, violations, drifts, workload) if enough else ()
    alarms = quality_alarms(quality, workload.policy) if quality else ()
    drifted = tuple(
        f"{one.column} drifted: distance {one.distance:.2f}, threshold {one.threshold:.2f}."
        for one in drifts
        if one.drifted
    )
    if faults:
        return "schema", faults
    if alarms:
        return "quality", alarms
    if not enough:
        least = f"at least {workload.drift.minimum_rows:,} are needed to judge them"
        return "unknown", (f"{rows:,} rows in the window; {least}.",)
    if not drifts:
        return "unknown", ("This version has no reference to compare the window with.",)
    if drifted:
        return "drift", drifted
    return "ok", ("The inputs and predictions are no further from the reference than its own periods are.",)


def _faults(
    rows: int, violations: dict[str, int], drifts: tuple[ColumnDrift, ...], workload: Workload
) -> tuple[str, ...]:
    broken = [
        f"{count:,} of {rows:,} rows break the schema: {rule}."
        for rule, count in violations.items()
        if count > workload.drift.violations * rows
    ]
    empty = [one for one in drifts if one.missing >= GONE and one.missing_reference <= PRESENT]
    names = sorted({one.column.partition(" (")[0] for one in empty})
    gone = [f"'{name}' is missing in nearly every row, and was present in the reference." for name in names]
    return (*broken, *gone)
