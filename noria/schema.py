"""What a raw record looks like: names, types, ranges; and the one place where records become tensors and back.

A missing value is a value here, and each type has one way to say it inside the ONNX graph:

    type        Arrow               tensor        missing
    number      double              float32 [n]   NaN
    integer     int64 (an id)       int64   [n]   MISSING_INTEGER
    string      string (a level)    string  [n]   ""
    text        string (free text)  string  [n]   ""
    timestamp   timestamp[us, UTC]  int64   [n]   MISSING_INTEGER; epoch seconds otherwise

Not here: what the columns mean to a model (`training.preprocess`) and cleaning rules (`noria.workload`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.errors import SchemaError

MISSING_INTEGER = -(2**63)
Kind = Literal["number", "integer", "string", "text", "timestamp"]
Tensors = dict[str, np.ndarray]

ARROW: dict[str, pa.DataType] = {
    "number": pa.float64(),
    "integer": pa.int64(),
    "string": pa.string(),
    "text": pa.string(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}
NUMPY: dict[str, Any] = {
    "number": np.float32,
    "integer": np.int64,
    "string": np.object_,
    "text": np.object_,
    "timestamp": np.int64,
}
MISSING: dict[str, Any] = {
    "number": math.nan,
    "integer": MISSING_INTEGER,
    "string": "",
    "text": "",
    "timestamp": MISSING_INTEGER,
}
FORMS = {
    "number": "a number",
    "integer": "a whole number",
    "string": "a string",
    "text": "a string",
    "timestamp": "an ISO 8601 time such as 2020-03-15T08:30:00 or whole seconds since 1970",
}


@dataclass(frozen=True)
class Column:
    """One raw column that the model reads."""

    name: str
    kind: Kind
    required: bool = False
    """A record without it is refused."""
    low: float | None = None
    """Smallest value accepted, inclusive (number, integer)."""
    high: float | None = None
    """Largest value accepted, inclusive (number, integer)."""
    description: str = ""
    example: Any = None
    """A valid value, shown in the server's documentation page."""


@dataclass(frozen=True)
class Schema:
    """The raw columns of a workload, in the order of the graph's inputs.

    `event_time` says when a record happened; it may be one of the columns or a column beside them. `target` is what is
    predicted: a number, known later, never one of the columns.
    """

    columns: tuple[Column, ...]
    event_time: str
    target: str

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise SchemaError("A schema needs at least one column.")
        if len(set(names)) != len(names):
            raise SchemaError(f"Column names must be unique: {', '.join(names)}.")
        if self.target in names:
            raise SchemaError(f"The target '{self.target}' is among the columns; remove it.", field=self.target)
        if self.event_time in names and self.column(self.event_time).kind != "timestamp":
            raise SchemaError(f"The event time '{self.event_time}' must be a timestamp.", field=self.event_time)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(column.name for column in self.columns)

    def column(self, name: str) -> Column:
        """The column called `name`. Raises SchemaError when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise SchemaError(f"There is no column '{name}'; there are: {', '.join(self.names)}.", field=name)

    def arrow(self) -> pa.Schema:
        """Arrow schema of a table of records: the columns, the event time and the target."""
        fields = [pa.field(column.name, ARROW[column.kind]) for column in self.columns]
        if self.event_time not in self.names:
            fields.append(pa.field(self.event_time, ARROW["timestamp"]))
        return pa.schema([*fields, pa.field(self.target, pa.float64())])

    def conform(self, table: pa.Table) -> pa.Table:
        """`table` with every schema column present in it cast to its Arrow type; other columns are left as they are.

        Raises:
            SchemaError: a column, or the event time, is absent or does not convert.
        """
        for field in self.arrow():
            if field.name not in table.column_names:
                if field.name == self.target:
                    continue
                raise SchemaError(f"The data has no column '{field.name}'; add it or remove it from the schema.", field.name)
            index = table.column_names.index(field.name)
            try:
                cast = _cast(table.column(index), field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SchemaError(
                    f"Column '{field.name}' holds {table.column(index).type}, the schema wants {field.type}: {error}",
                    field.name,
                ) from None
            table = table.set_column(index, field, cast)
        return table

    def violations(self, table: pa.Table) -> dict[str, int]:
        """Rows of a conforming table that break a column's rule, as `{"distance: below 0": 3}`; empty when none does."""
        found: dict[str, int] = {}
        for column in self.columns:
            values = table.column(column.name)
            checks = {"missing": values.null_count if column.required else 0}
            if column.low is not None:
                checks[f"below {column.low:g}"] = int(pc.sum(pc.less(values, column.low)).as_py() or 0)
            if column.high is not None:
                checks[f"above {column.high:g}"] = int(pc.sum(pc.greater(values, column.high)).as_py() or 0)
            found |= {f"{column.name}: {check}": count for check, count in checks.items() if count}
        return found

    def tensors(self, table: pa.Table) -> Tensors:
        """The graph's inputs for a table that has the columns: one array of shape [n] a column."""
        return {column.name: _tensor(column, self._cast_column(column, table)) for column in self.columns}

    def _cast_column(self, column: Column, table: pa.Table) -> pa.Array:
        if column.name not in table.column_names:
            raise SchemaError(f"The data has no column '{column.name}'.", column.name)
        return _cast(table.column(column.name), ARROW[column.kind]).combine_chunks()

    def table(self, tensors: Mapping[str, np.ndarray]) -> pa.Table:
        """The inverse of `tensors`: raw columns with nulls where a value is missing."""
        return pa.table({column.name: _array(column, tensors[column.name]) for column in self.columns})

    def parse(self, records: Sequence[Any]) -> Tensors:
        """The graph's inputs for JSON records (a list of objects), checked value by value.

        Besides the columns a record may carry the event time. Missing means absent or null.

        Raises:
            SchemaError: unknown or missing field, wrong type, out of range, not finite, or no records at all; the
                sentence names field and row.
        """
        if not records:
            raise SchemaError("There are no records; send at least one.")
        known = {*self.names, self.event_time}
        for row, record in enumerate(records):
            if not isinstance(record, dict):
                raise SchemaError(f"Row {row} is not an object; send records as {{column: value}}.", row=row)
            for name in record:
                if name not in known:
                    raise SchemaError(
                        f"Row {row} has the unknown field '{name}'; known are: {', '.join(self.names)}.", str(name), row
                    )
        return {
            column.name: np.array([_value(column, record.get(column.name), row) for row, record in enumerate(records)],
                                  dtype=NUMPY[column.kind])
            for column in self.columns
        }  # fmt: skip

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The same rules for tensors that arrive as such. Raises SchemaError naming the first field and row."""
        for column in self.columns:
            values = tensors[column.name]
            if column.kind in ("string", "text"):
                missing = values == ""
            elif column.kind == "number":
                missing = np.isnan(values)
                _first(column, np.isinf(values), "is not finite")
            else:
                missing = values == MISSING_INTEGER
            if column.required:
                _first(column, missing, "is missing, and the column is required")
            if column.low is not None:
                _first(column, ~missing & (values < column.low), f"is below {column.low:g}, the least accepted")
            if column.high is not None:
                _first(column, ~missing & (values > column.high), f"is above {column.high:g}, the most accepted")

    def example(self) -> dict[str, Any]:
        """One valid record, from the columns' examples."""
        return {column.name: column.example for column in self.columns}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; `from_json` reads it back equal."""
        return {"columns": [asdict(column) for column in self.columns], "event_time": self.event_time, "target": self.target}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schema:
        """The schema that `to_json` wrote."""
        return cls(tuple(Column(**column) for column in data["columns"]), data["event_time"], data["target"])


def parse_time(value: Any) -> int:
    """Epoch seconds of an ISO 8601 string (UTC where it names no zone) or of whole seconds. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("not a time")
    if isinstance(value, int):
        return value
    moment = datetime.fromisoformat(value)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _value(column: Column, value: Any, row: int) -> Any:
    """One JSON value as the tensor's element."""
    if value is None or (value == "" and column.kind in ("string", "text")):
        if column.required:
            raise SchemaError(f"Row {row} has no '{column.name}', and it is required.", column.name, row)
        return MISSING[column.kind]
    if column.kind in ("string", "text"):
        if isinstance(value, str):
            return value
    elif column.kind == "timestamp":
        try:
            return _in_int64(parse_time(value))
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if column.kind == "number" and math.isfinite(value) and abs(value) < 3e38:
            return _in_range(column, value, row)
        if column.kind == "integer" and value == int(value if math.isfinite(value) else 0) and abs(value) < 2**63:
            return _in_range(column, int(value), row)
        if not math.isfinite(value):
            raise SchemaError(f"Row {row}: '{column.name}' is not finite; send null where it is missing.", column.name, row)
    shown = repr(value)[:60]
    raise SchemaError(f"Row {row}: '{column.name}' is {shown}; it must be {FORMS[column.kind]}.", column.name, row)


def _in_int64(value: int) -> int:
    if abs(value) >= 2**53:
        raise OverflowError
    return value


def _in_range(column: Column, value: float, row: int) -> float:
    if column.low is not None and value < column.low:
        raise SchemaError(f"Row {row}: '{column.name}' is {value:g}, below {column.low:g}, the least accepted.", column.name, row)
    if column.high is not None and value > column.high:
        raise SchemaError(f"Row {row}: '{column.name}' is {value:g}, above {column.high:g}, the most accepted.", column.name, row)
    return value


def _first(column: Column, broken: np.ndarray, sentence: str) -> None:
    if broken.any():
        row = int(np.argmax(broken))
        raise SchemaError(f"Row {row}: '{column.name}' {sentence}.", column.name, row)


def _cast(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Cast; times without a zone are taken as UTC, strings as ISO 8601."""
    if pa.types.is_timestamp(kind) and pa.types.is_string(values.type):
        values = pc.cast(values, pa.timestamp("us"))
    if pa.types.is_null(values.type):
        return pa.chunked_array([pa.nulls(len(values), kind)])
    return values.cast(kind)


def _tensor(column: Column, values: pa.Array) -> np.ndarray:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if column.kind == "timestamp":
        # Floor, not cast: whole seconds of a time before 1970 must not round towards zero.
        micros = values.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        return np.where(values.is_null().to_numpy(zero_copy_only=False), MISSING_INTEGER, micros // 1_000_000)
    filled = values.fill_null(MISSING[column.kind])
    array: np.ndarray = filled.to_numpy(zero_copy_only=False).astype(NUMPY[column.kind])
    return array


def _array(column: Column, values: np.ndarray) -> pa.Array:
    if column.kind == "number":
        return pa.array(values.astype(np.float64), mask=np.isnan(values))
    if column.kind in ("string", "text"):
        return pa.array(values, pa.string(), mask=values == "")
    missing = values == MISSING_INTEGER
    if column.kind == "integer":
        return pa.array(values, pa.int64(), mask=missing)
    return pa.array(np.where(missing, 0, values) * 1_000_000, pa.int64(), mask=missing).cast(ARROW["timestamp"])
