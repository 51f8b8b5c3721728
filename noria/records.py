"""The frozen dataclasses that cross rooms. Data only: no behaviour beyond their own consistency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from noria.errors import DataError


def moment(value: str | datetime) -> datetime:
    """A time with a zone: ISO 8601 or datetime, UTC where it names none."""
    parsed = datetime.fromisoformat(value) if isinstance(value, str) else value
    return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Window:
    """Event times from `start` (included) to `end` (not included)."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise DataError("A window's times need a zone; use noria.records.moment().")
        if self.start >= self.end:
            raise DataError(f"A window must start before it ends: {self}.")

    @classmethod
    def last(cls, length: timedelta, now: datetime) -> Window:
        """The window of that length that ends `now`."""
        return cls(now - length, now)

    def __str__(self) -> str:
        return f"[{self.start:%Y-%m-%d %H:%M}, {self.end:%Y-%m-%d %H:%M})"


@dataclass(frozen=True)
class DatasetRef:
    """Names rows of the lake for ever: reading it back gives the same rows after later appends and compaction."""

    workload: str
    window: Window
    as_of: datetime
    """Labels that arrived later are not part of it."""
    versions: Mapping[str, int]
    """Delta version of each table that the rows come from; -1 where the table did not exist yet."""
    rows: int
    fingerprint: str
    """SHA-256 of the rows in their canonical order."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; `from_json` reads it back equal."""
        data = asdict(self)
        data["window"] = {"start": self.window.start.isoformat(), "end": self.window.end.isoformat()}
        return {**data, "as_of": self.as_of.isoformat(), "versions": dict(self.versions)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DatasetRef:
        """The reference that `to_json` wrote."""
        window = Window(moment(data["window"]["start"]), moment(data["window"]["end"]))
        return cls(**{**data, "window": window, "as_of": moment(data["as_of"])})


@dataclass(frozen=True)
class Evaluation:
    """How good predictions are on labelled rows. `metrics` and each slice: name to value (see `noria.metrics`)."""

    rows: int
    metrics: Mapping[str, float]
    slices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; `from_json` reads it back equal."""
        slices = {name: dict(metrics) for name, metrics in self.slices.items()}
        return {"rows": self.rows, "metrics": dict(self.metrics), "slices": slices}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_json` wrote."""
        return cls(data["rows"], data["metrics"], data["slices"])


@dataclass(frozen=True)
class Version:
    """A registered version of a workload's model."""

    workload: str
    number: int
    run_id: str
    created: datetime
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """A point estimate with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ColumnDrift:
    """How far one column of the window is from the reference."""

    column: str
    distance: float
    """Jensen-Shannon distance, base 2, in [0, 1]; a missing value counts as a category."""
    threshold: float
    """Distance that the reference's own periods exceed with the budgeted probability."""
    p_value: float
    drifted: bool
    """After correction across columns."""
    missing: float
    """Share of missing values in the window."""
    missing_reference: float


@dataclass(frozen=True)
class Quality:
    """The error of the serving version's own predictions whose labels have arrived, beside its reference."""

    rows: int
    error: Interval
    reference_error: float
    bias: Interval
    """Mean residual; 0 is unbiased."""
    reference_bias: float
    reference_spread: float
    """Standard deviation of the residual on the reference."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    relative: Interval | None = None
    """Sum of errors / sum of truths (WAPE); only for a log target, where it is judged instead of the error."""
    reference_relative: float = 0.0
    reference_rows: int = 0
    """Rows behind the reference's figures; few make them uncertain."""
    newest: datetime | None = None
    """Event time of the newest row judged."""


@dataclass(frozen=True)
class DriftReport:
    """Evidence about the serving version in one window. What the policy judges and the dashboards show."""

    workload: str
    version: int
    window: Window
    rows: int
    violations: Mapping[str, int]
    """Schema rule broken: rows."""
    columns: tuple[ColumnDrift, ...]
    prediction: ColumnDrift | None
    quality: Quality | None
    """None: no, or too few, labels of this version's predictions have arrived."""
    verdict: Literal["ok", "drift", "quality", "schema", "unknown"]
    reasons: tuple[str, ...]
    serving_since: datetime | None = None
    """Event time of this version's first prediction (as far as the watch looked back); None: it has made none."""


@dataclass(frozen=True)
class Decision:
    """What the policy says, with its reasons in sentences."""

    action: Literal["hold", "retrain", "unknown", "ask"]
    """`ask`: a person must look (a schema fault); nothing is retrained."""
    reasons: tuple[str, ...]
    cause: Literal["", "quality", "probation", "age", "drift"] = ""
    """Why a retrain is asked for, in a word; kept with the version that comes of it."""


@dataclass(frozen=True)
class Verdict:
    """What the gate says about a candidate, with its reasons in sentences and the numbers behind them."""

    action: Literal["promoted", "refused"]
    reasons: tuple[str, ...]
    gain: Interval | None = None
    """Relative improvement over the champion (0.05 = 5% less error); None when there is no champion."""
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    """By subject: candidate, champion, boosted, naive."""
