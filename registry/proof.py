"""Reference rows with the scores that they must get: what a server checks before it lets a version answer.

The rows are kept as JSON records, so that the check runs the way of a request: parse, tensors, graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from noria.errors import BundleError, SchemaError
from noria.runtime import open_session, score
from noria.schema import Schema

ROWS = 64
UNKNOWN = "a level that no record ever had"
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""How far a score may be off: providers differ in the last bits, wrong exports by far more."""


@dataclass(frozen=True)
class Proof:
    """Records [n] and their expected scores [n]."""

    records: tuple[Mapping[str, Any], ...]
    scores: tuple[float, ...]

    @classmethod
    def make(cls, model: bytes, schema: Schema, table: pa.Table) -> Proof:
        """From rows that have the schema's columns: rows spread over the table, each optional column missing once,
        each category unknown once. Rows that the server would refuse are left out."""
        records = [record for record in _records(schema, table) if _accepted(schema, record)]
        base = records[0] if records else schema.example()
        for column in schema.columns:
            if not column.required:
                records.append({**base, column.name: None})
            if column.kind in ("string", "text"):
                records.append({**base, column.name: UNKNOWN})
            elif column.kind == "integer":
                records.append({**base, column.name: 2**31 if column.high is None else int(column.high)})
        accepted = [record for record in records if _accepted(schema, record)]
        if not accepted:
            raise BundleError("No reference row passes the schema's own checks; correct the schema's ranges.")
        scores = score(open_session(model), schema.parse(accepted))
        if not np.isfinite(scores).all():
            broken = accepted[int(np.argmin(np.isfinite(scores)))]
            raise BundleError(f"The model's score is not finite for {broken}; it must answer every valid record.")
        return cls(tuple(accepted), tuple(float(value) for value in scores))

    def check(self, session: ort.InferenceSession, schema: Schema) -> None:
        """Score the records again.

        Raises:
            BundleError: a score is off; the sentence tells the row and both values.
        """
        found = score(session, schema.parse(self.records))
        expected = np.array(self.scores)
        off = ~(np.abs(found - expected) <= ABSOLUTE + RELATIVE * np.abs(expected))  # a NaN is off, too
        if off.any():
            row = int(np.argmax(off))
            raise BundleError(
                f"Reference row {row} scores {found[row]:g} instead of {expected[row]:g}: "
                "this machine does not compute what was registered; do not serve it."
            )


def _records(schema: Schema, table: pa.Table) -> list[dict[str, Any]]:
    extra = sum((not column.required) + (column.kind in ("string", "text", "integer")) for column in schema.columns)
    wanted = min(len(table), max(ROWS - extra, 16))
    rows = table.select(list(schema.names)).take(np.linspace(0, len(table) - 1, wanted).astype(int) if wanted else [])
    return [{name: _plain(value) for name, value in row.items()} for row in rows.to_pylist()]


def _plain(value: Any) -> Any:
    if hasattr(value, "isoformat"):
        return value.replace(microsecond=0).isoformat()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _accepted(schema: Schema, record: dict[str, Any]) -> bool:
    try:
        schema.parse([record])
    except SchemaError:
        return False
    return True
