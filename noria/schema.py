"""What a raw record looks like, and the one place where records become tensors and back.

A missing value is a value here; `noria.column` says how each type spells it.

Not here: what the columns mean to a model (`training.preprocess`) and cleaning rules (`noria.workload`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.column import (
    ARROW,
    EARLIEST,
    LATEST,
    MISSING,
    MISSING_INTEGER,
    NUMPY,
    Column,
    Kind,
    Tensors,
    cast,
    parse_column,
    parse_time,
    parse_value,
    refuse,
    to_array,
    to_tensor,
)
from noria.errors import SchemaError

__all__ = ["ARROW", "MISSING", "MISSING_INTEGER", "NUMPY", "Column", "Kind", "Schema", "Tensors", "parse_time"]

FEW = 8
"""Up to so many records, looking at each value costs less than setting up arrays."""


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
                raise SchemaError(
                    f"The data has no column '{field.name}'; add it or remove it from the schema.", field.name
                )
            index = table.column_names.index(field.name)
            try:
                converted = cast(table.column(index), field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SchemaError(
                    f"Column '{field.name}' holds {table.column(index).type}, the schema wants {field.type}: {error}",
                    field.name,
                ) from None
            table = table.set_column(index, field, converted)
        return table

    def violations(self, table: pa.Table) -> dict[str, int]:
        """Rows of a conforming table that break a column's rule, as `{"distance: below 0": 3}`; empty: none does."""
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
        return {column.name: to_tensor(column, self._cast_column(column, table)) for column in self.columns}

    def _cast_column(self, column: Column, table: pa.Table) -> pa.Array:
        if column.name not in table.column_names:
            raise SchemaError(f"The data has no column '{column.name}'.", column.name)
        return cast(table.column(column.name), ARROW[column.kind]).combine_chunks()

    def table(self, tensors: Mapping[str, np.ndarray]) -> pa.Table:
        """The inverse of `tensors`: raw columns with nulls where a value is missing."""
        return pa.table({column.name: to_array(column, tensors[column.name]) for column in self.columns})

    def parse(self, records: Sequence[Any]) -> Tensors:
        """The graph's inputs for JSON records (a list of objects), checked value by value.

        Besides the columns a record may carry the event time. Missing means absent or null.

        Raises:
            SchemaError: unknown or missing field, wrong type, out of range, not finite, or no records at all; the
                sentence names field and row.
        """
        if not records:
            raise SchemaError("There are no records; send at least one.")
        if len(records) > FEW and (quick := self._parse_many(records)) is not None:
            return quick
        known = {*self.names, self.event_time}
        for row, record in enumerate(records):
            if not isinstance(record, dict):
                raise SchemaError(f"Row {row} is not an object; send records as {{column: value}}.", row=row)
            if not record.keys() <= known:
                name = next(name for name in record if name not in known)
                raise SchemaError(
                    f"Row {row} has the unknown field '{name}'; known are: {', '.join(self.names)}.", str(name), row
                )
        return {
            column.name: np.array(
                [parse_value(column, record.get(column.name), row) for row, record in enumerate(records)],
                dtype=NUMPY[column.kind],
            )
            for column in self.columns
        }

    def _parse_many(self, records: Sequence[Any]) -> Tensors | None:
        """A column at a time. None where something is unusual: value by value gives the sentence with the value."""
        fields = self._fields(records)
        if fields is None:
            return None
        tensors: Tensors = {}
        for column in self.columns:
            tensor = parse_column(column, fields.get(column.name) or [None] * len(records))
            if tensor is None:
                return None
            tensors[column.name] = tensor
        try:
            self.check(tensors)
        except SchemaError:
            return None
        return tensors

    def _fields(self, records: Sequence[Any]) -> dict[str, Sequence[Any]] | None:
        """The records' values by field; None where one is no object or has an unknown field."""
        first, known = records[0], {*self.names, self.event_time}
        if set(map(type, records)) != {dict} or not known.issuperset(first):
            return None
        if first and set(map(len, records)) == {len(first)}:
            # What has all fields of the first has no others. One name is given twice: a single one would give no tuple.
            values = itemgetter(*first, next(iter(first)))
            with suppress(KeyError):
                return dict(zip(first, zip(*map(values, records), strict=True), strict=False))
        if not all(map(known.issuperset, records)):
            return None
        return {name: [record.get(name) for record in records] for name in self.names}

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The same rules for tensors that arrive as such. Raises SchemaError naming the first field and row."""
        for column in self.columns:
            values = tensors[column.name]
            if column.kind == "number":
                refuse(column, np.isinf(values), "is not finite")
            if column.required:
                refuse(column, _missing(column, values), "is missing, and the column is required")
            if column.kind == "timestamp":
                outside = (values < EARLIEST) | (values > LATEST)
                refuse(column, outside & ~_missing(column, values), "is outside the years 1 to 9999")
            if column.low is not None:
                below = (values < column.low) & ~_missing(column, values)
                refuse(column, below, f"is below {column.low:g}, the least accepted")
            if column.high is not None:
                refuse(column, values > column.high, f"is above {column.high:g}, the most accepted")

    def example(self) -> dict[str, Any]:
        """One valid record, from the columns' examples."""
        return {column.name: column.example for column in self.columns}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; `from_json` reads it back equal."""
        return {
            "columns": [asdict(column) for column in self.columns],
            "event_time": self.event_time,
            "target": self.target,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schema:
        """The schema that `to_json` wrote."""
        return cls(tuple(Column(**column) for column in data["columns"]), data["event_time"], data["target"])


def _missing(column: Column, values: np.ndarray) -> np.ndarray:
    """Which values [n] are missing."""
    if column.kind in ("string", "text"):
        return np.asarray(values == "")
    return np.isnan(values) if column.kind == "number" else np.asarray(values == MISSING_INTEGER)
