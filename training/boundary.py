"""Raw rows at the edges of what may come, generated from a schema: where exports and preprocessing go wrong.

Not here: the comparison itself (`training.parity`).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np

from noria.column import MISSING, NUMPY
from noria.schema import MISSING_INTEGER, Column, Schema, Tensors

YEARS = (1970, 2000, 2018, 2020, 2038, 2100)
SECONDS = (-64, -1, 0, 1, 63, 1799, 3599, 3600)
"""Around a moment: a float32 cannot tell epoch seconds less than 64 apart."""
STRINGS = (
    "",
    " ",
    "\n",
    "a level that no record ever had",
    "ünïcödé",
    "🦆🦆",
    "\u202egnirts",
    "x" * 2000,
    "'\";--\x00",
    "NaN",
    "null",
)
TEXTS = (*STRINGS, "word " * 600, "LINE\nbreaks\r\nand\ttabs\n\n\n", "\n" * 400, "a\u00a0b", "  many   blanks  ")
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e-6, 0.5, 1e6, -1e6, 1e18, 3e38, -3e38)
INTEGERS = (0, 1, -1, 2, -2, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1, MISSING_INTEGER + 1)
STREW = 0.02
"""Share of sampled values made missing, and again as many made unknown or extreme."""


def boundary(schema: Schema, sample: Tensors) -> Tensors:
    """Every edge of each column, in rows that are otherwise the sample's first; then a row with everything missing.

    Missing and out-of-range values are part of it even where the schema refuses them: the graph must stand them.
    """
    rows: list[dict[str, object]] = []
    base = {name: sample[name][0] for name in schema.names}
    for column in schema.columns:
        rows += [{**base, column.name: value} for value in edges(column)]
    rows.append({column.name: MISSING[column.kind] for column in schema.columns})
    return {column.name: _array(column, (row[column.name] for row in rows), len(rows)) for column in schema.columns}


def edges(column: Column) -> list[object]:
    """The values of one column that are worth trying, missing among them."""
    if column.kind == "timestamp":
        return [MISSING_INTEGER, *_moments()]
    if column.kind == "string":
        return list(STRINGS)
    if column.kind == "text":
        return list(TEXTS)
    limits = [limit for limit in (column.low, column.high) if limit is not None]
    if column.kind == "integer":
        return [MISSING_INTEGER, *INTEGERS, *(int(limit) + step for limit in limits for step in (-1, 0, 1))]
    return [np.nan, *NUMBERS, *(limit + step for limit in limits for step in (-1e-3, 0, 1e-3))]


def strewn(schema: Schema, sample: Tensors, rows: int, seed: int = 0) -> Tensors:
    """`rows` rows drawn from the sample (each once before any comes twice), a share of values missing or at an edge."""
    generator = np.random.default_rng(seed)
    size = len(next(iter(sample.values())))
    chosen = np.concatenate([generator.permutation(size) for _ in range(-(-rows // size))])[:rows]
    made = {}
    for column in schema.columns:
        values = sample[column.name][chosen].copy()
        luck = generator.random(rows)
        values[luck < STREW] = MISSING[column.kind]
        odd = np.flatnonzero((luck >= STREW) & (luck < 2 * STREW))
        tried = _array(column, edges(column), len(edges(column)))
        values[odd] = tried[generator.integers(0, len(tried), len(odd))]
        made[column.name] = values
    return made


def _moments() -> list[int]:
    """Epoch seconds around midnights, hours and the week's edges, at calm and famous times, and the ends of int64."""
    starts = {int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in YEARS} | {2**31, 2**32, 0}
    around = {
        start + day * 86_400 + hour * 3600 + second
        for start in starts
        for day in range(8)
        for hour in (0, 6, 23)
        for second in SECONDS
    }
    return [*sorted(around), -1, -(2**31), -(2**40), 2**53, 2**63 - 1, MISSING_INTEGER + 1]


def _array(column: Column, values: Iterable[object], size: int) -> np.ndarray:
    made = np.empty(size, NUMPY[column.kind])
    for row, value in enumerate(values):
        made[row] = value
    return made
