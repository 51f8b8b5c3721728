"""How a raw column becomes a few counted categories, so that windows of any size can be compared.

A missing value is a category of its own, and so is a level that the reference has never seen. Times are never compared
as such (a later window always differs) but as hour of day and weekday; free text as its length and its share of rare
words.
What is done with the counts is decided in `monitoring.drift`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.schema import Column, Schema

Reading = Literal["value", "level", "hour", "weekday", "words", "rare words"]
READINGS: dict[str, tuple[Reading, ...]] = {
    "number": ("value",),
    "integer": ("level",),
    "string": ("level",),
    "text": ("words", "rare words"),
    "timestamp": ("hour", "weekday"),
}
SCORE = "score"
"""The prediction, compared like a numeric column."""
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
HOURS_PER_BIN = 3
KNOWN_LEVELS = 2_000
"""Levels remembered, beyond the counted ones, to tell a rare level from a new one."""
COMMON_WORDS = 2_000
LEVELS_PER_BIN = 3
"""Levels counted for each bin that a number would get: with fewer, 'other' swallows most of a column of ids."""


@dataclass(frozen=True)
class Binning:
    """Categories of one reading of one column. Levels: those counted, other, new, missing. Numbers: below what the
    reference has, its bins, above, missing."""

    column: str
    reading: Reading
    edges: tuple[float, ...] = ()
    """Upper ends of all bins but the last, for numeric readings; in single precision, as the model reads numbers."""
    levels: tuple[Any, ...] = ()
    """The counted levels; of numbers the names of the bins within the reference's range."""
    known: tuple[Any, ...] = ()
    """Rarer levels of the reference, counted together as 'other'; for rare words: the common ones."""

    @property
    def name(self) -> str:
        """What people read; the column's name where there is one reading of it."""
        return self.column if self.reading in ("value", "level") else f"{self.column} ({self.reading})"

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each category, in order."""
        if self.reading == "level":
            return (*(str(level) for level in self.levels), "(other)", "(new)", "(missing)")
        if self.reading == "weekday":
            return (*WEEKDAYS, "(missing)")
        if self.reading == "hour":
            return (*(f"{hour:02d}-{hour + HOURS_PER_BIN:02d} h" for hour in range(0, 24, HOURS_PER_BIN)), "(missing)")
        return ("(below)", *self.levels, "(above)", "(missing)")

    def codes(self, table: pa.Table) -> np.ndarray:
        """The category of each row: int64 [n]. A column that the table lacks is missing in every row."""
        missing = len(self.labels) - 1
        if self.column not in table.column_names:
            return np.full(len(table), missing)
        values = table.column(self.column).combine_chunks()
        if self.reading == "level":
            return self._level_codes(values)
        read = _read(values, self.reading, self.known)
        codes = np.searchsorted(np.array(self.edges, np.float32), read, side="left")
        return np.where(np.isnan(read), missing, codes)

    def counts(self, table: pa.Table) -> np.ndarray:
        """Rows in each category: int64 [number of categories]."""
        return np.bincount(self.codes(table), minlength=len(self.labels))

    def _level_codes(self, values: pa.Array) -> np.ndarray:
        kind, counted = values.type, len(self.levels)
        missing = pc.fill_null(pc.equal(values, ""), True) if _is_text(kind) else values.is_null()
        top = pc.index_in(values, pa.array(self.levels, kind)).fill_null(-1).to_numpy(zero_copy_only=False)
        rare = pc.is_in(values, pa.array(self.known, kind)).to_numpy(zero_copy_only=False)
        codes = np.where(top >= 0, top, np.where(rare, counted, counted + 1))
        return np.where(missing.to_numpy(zero_copy_only=False), counted + 2, codes).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; `from_json` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Binning:
        """The binning that `to_json` wrote."""
        lists = {name: tuple(data[name]) for name in ("edges", "levels", "known")}
        return cls(data["column"], data["reading"], **lists)


def binnings(reference: pa.Table, schema: Schema, bins: int) -> Iterator[Binning]:
    """Every reading of every column that the reference has, and of the score."""
    for column in (*schema.columns, Column(SCORE, "number")):
        if column.name in reference.column_names:
            for reading in READINGS[column.kind]:
                yield _learn(column.name, reading, reference.column(column.name).combine_chunks(), bins)


def _learn(column: str, reading: Reading, values: pa.Array, bins: int) -> Binning:
    if reading == "level":
        top, rest = _frequent(values, bins * LEVELS_PER_BIN, KNOWN_LEVELS)
        return Binning(column, reading, levels=top, known=rest)
    if reading == "hour":
        return Binning(column, reading, edges=tuple(hour - 0.5 for hour in range(HOURS_PER_BIN, 24, HOURS_PER_BIN)))
    if reading == "weekday":
        return Binning(column, reading, edges=tuple(day + 0.5 for day in range(6)))
    words = _frequent(_words(values).flatten(), COMMON_WORDS, 0)[0] if reading == "rare words" else ()
    edges, names = _bins(_read(values, reading, words), bins)
    return Binning(column, reading, edges, names, words)


def _bins(values: np.ndarray, bins: int) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Edges and names of quantile bins; a number with few distinct values gets one bin a value."""
    values = values[np.isfinite(values)]
    distinct = np.unique(values)
    if not len(distinct):
        return (0.0,), ()
    lowest = np.nextafter(distinct[0], np.float32(-np.inf))
    if len(distinct) <= bins:
        return tuple(float(edge) for edge in (lowest, *distinct)), tuple(f"{value:.4g}" for value in distinct)
    inner = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="higher")
    upper = np.unique(np.array([*inner, distinct[-1]]))
    ends = [f"{value:.4g}" for value in (distinct[0], *upper)]
    names = (f"{low} to {high}" for low, high in itertools.pairwise(ends))
    return tuple(float(edge) for edge in (lowest, *upper)), tuple(names)


def _frequent(values: pa.Array, counted: int, known: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The most frequent values and the next ones; ties in the values' order, so that a calibration repeats itself."""
    found = pa.Table.from_struct_array(pc.value_counts(values))
    found = found.sort_by([("counts", "descending"), ("values", "ascending")]).column("values").to_pylist()
    present = [value for value in found if value is not None and value != ""]
    return tuple(present[:counted]), tuple(present[counted : counted + known])


def _read(values: pa.Array, reading: Reading, words: tuple[Any, ...]) -> np.ndarray:
    """A numeric reading of each row: float32 [n], NaN where missing.

    Single precision because the reference may hold what a file said (2.3) and the log what the model read of it.
    """
    if reading in ("words", "rare words"):
        split = _words(values)
        lengths = np.diff(split.offsets.to_numpy()).astype(np.float64)
        lengths[lengths == 0] = np.nan
        return np.asarray(lengths if reading == "words" else _rare(split, words) / lengths, np.float32)
    if reading == "value":
        return np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False)).astype(np.float32)
    # Whole-number arithmetic instead of Arrow's calendar functions: those need a time-zone database on the machine.
    hours = values.cast(pa.int64()).fill_null(0).to_numpy() // 3_600_000_000
    read = hours % 24 if reading == "hour" else (hours // 24 + 3) % 7
    return np.where(values.is_null().to_numpy(zero_copy_only=False), np.nan, read).astype(np.float32)


def _words(values: pa.Array) -> pa.Array:
    """The lower-cased words of each text; none where it is missing."""
    return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(values.fill_null(""))))


def _rare(split: pa.Array, words: tuple[Any, ...]) -> np.ndarray:
    """How many words of each text are not among the common ones."""
    rare = ~pc.is_in(split.flatten(), pa.array(words, pa.string())).to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(split).to_numpy()
    counted: np.ndarray = np.bincount(rows, weights=rare, minlength=len(split))
    return counted


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
