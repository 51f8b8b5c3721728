"""One raw column: its type, how each type says *missing*, and its values as JSON, Arrow and tensor.

    type        Arrow               tensor        missing
    number      double              float32 [n]   NaN
    integer     int64 (an id)       int64   [n]   MISSING_INTEGER
    string      string (a level)    string  [n]   ""
    text        string (free text)  string  [n]   ""
    timestamp   timestamp[us, UTC]  int64   [n]   MISSING_INTEGER; epoch seconds otherwise

Not here: how columns form a record (`noria.schema`), what they mean to a model (`training.preprocess`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
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
LARGEST_NUMBER = 3e38
"""A number's magnitude stays below it, so that it is finite as float32."""
EARLIEST, LATEST = -62_135_596_800, 253_402_300_799
"""Epoch seconds of the years 1 to 9999: the times that Arrow, Delta Lake and Python can all hold."""
EPOCH, SECOND, MICROSECOND = datetime(1970, 1, 1), timedelta(seconds=1), timedelta(microseconds=1)
SECONDS = re.compile(r"(?:[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})*")
"""Times to the second, one after another; of them NumPy and Python think alike."""
FORMS = {
    "number": "a number",
    "integer": "a whole number",
    "string": "a string",
    "text": "a string",
    "timestamp": "an ISO 8601 time such as 2020-03-15T08:30:00 or whole seconds since 1970",
}


@dataclass(frozen=True)
class Column:
    """One raw column of a record."""

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
    feature: bool = True
    """False: logged, watched and there for slices, but the model does not read it."""


def parse_time(value: Any) -> int:
    """Epoch seconds of an ISO 8601 string (UTC where it names no zone) or of whole seconds. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("not a time")
    if isinstance(value, int):
        return value
    moment = datetime.fromisoformat(value)
    # Floor, as in `to_tensor`: a time before 1970 must not round towards zero.
    return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def parse_value(column: Column, value: Any, row: int) -> Any:
    """One JSON value as the tensor's element. Raises SchemaError naming the field and the row."""
    if value is None or (value == "" and column.kind in ("string", "text")):
        if column.required:
            raise SchemaError(f"Row {row} has no '{column.name}', and it is required.", column.name, row)
        return MISSING[column.kind]
    if column.kind in ("string", "text"):
        if isinstance(value, str):
            return value
    elif column.kind == "timestamp":
        try:
            return _in_calendar(parse_time(value))
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise SchemaError(
                f"Row {row}: '{column.name}' is not finite; send null where it is missing.", column.name, row
            )
        if column.kind == "number" and abs(value) < LARGEST_NUMBER:
            return _in_range(column, value, row)
        if column.kind == "integer" and value == int(value) and abs(value) < 2**63:
            return _in_range(column, int(value), row)
    shown = repr(value)[:60]
    raise SchemaError(f"Row {row}: '{column.name}' is {shown}; it must be {FORMS[column.kind]}.", column.name, row)


def parse_column(column: Column, values: Sequence[Any]) -> np.ndarray | None:
    """JSON values of the usual types as a tensor [n], all at once; whether one is missing or out of range is not looked
    at. None where a value must be looked at by itself (`parse_value`, which gives the same tensor ten times slower)."""
    kinds = set(map(type, values))
    gaps = values.count(None) if type(None) in kinds else 0
    kinds.discard(type(None))
    try:
        if column.kind in ("string", "text"):
            return np.array([value or "" for value in values], np.object_) if kinds <= {str} else None
        if column.kind == "number":
            return _numbers(np.array(values, np.float64), gaps) if kinds <= {int, float} else None
        if column.kind == "timestamp" and kinds == {str} and not gaps:
            if set(map(len, values)) == {19} and SECONDS.fullmatch("".join(values)):
                return np.array(values, "datetime64[s]").astype(np.int64)
            moments = [datetime.fromisoformat(value) for value in values]
            if any(moment.tzinfo for moment in moments):
                return None
            return np.array([(moment - EPOCH) // SECOND for moment in moments], np.int64)
        if kinds <= {int}:
            filled = [MISSING_INTEGER if value is None else value for value in values] if gaps else values
            array = np.array(filled, np.int64)
            return array if int(np.count_nonzero(array == MISSING_INTEGER)) == gaps else None
    except (ValueError, OverflowError):
        pass
    return None


def _numbers(array: np.ndarray, gaps: int) -> np.ndarray | None:
    """As float32, unless a number is NaN or too large itself."""
    if int(np.count_nonzero(np.abs(array) < LARGEST_NUMBER)) + gaps != len(array):
        return None
    return array.astype(np.float32)


def _in_calendar(seconds: int) -> int:
    if not EARLIEST <= seconds <= LATEST:
        raise OverflowError
    return seconds


def _in_range(column: Column, value: float, row: int) -> float:
    if column.low is not None and value < column.low:
        raise SchemaError(
            f"Row {row}: '{column.name}' is {value:g}, below {column.low:g}, the least accepted.", column.name, row
        )
    if column.high is not None and value > column.high:
        raise SchemaError(
            f"Row {row}: '{column.name}' is {value:g}, above {column.high:g}, the most accepted.", column.name, row
        )
    return value


def refuse(column: Column, broken: np.ndarray, sentence: str) -> None:
    """Raise SchemaError with the first row that is `broken` [n]; nothing when none is."""
    if broken.any():
        row = int(np.argmax(broken))
        raise SchemaError(f"Row {row}: '{column.name}' {sentence}.", column.name, row)


def cast(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Cast; times without a zone are taken as UTC, strings as ISO 8601."""
    text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if pa.types.is_timestamp(kind) and (text or pa.types.is_string_view(values.type)):
        values = _moments(values.cast(pa.string()))
    if pa.types.is_null(values.type):
        return pa.chunked_array([pa.nulls(len(values), kind)])
    return values.cast(kind)


def _moments(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings as times. Arrow takes them all at once where none has a zone or more than microseconds; else each is read
    as JSON's are."""
    try:
        return pc.cast(values, pa.timestamp("us"))
    except pa.ArrowInvalid:
        micros = [None if value is None else _micros(value) for value in values.to_pylist()]
        return pa.chunked_array([pa.array(micros, pa.int64())]).cast(ARROW["timestamp"])


def _micros(value: str) -> int:
    """Microseconds since 1970. Raises ArrowInvalid."""
    try:
        moment = datetime.fromisoformat(value)
        micros = (moment.replace(tzinfo=moment.tzinfo or UTC) - EPOCH.replace(tzinfo=UTC)) // MICROSECOND
        _in_calendar(micros // 1_000_000)
    except (ValueError, OverflowError):
        raise pa.ArrowInvalid(f"'{value[:60]}' is not an ISO 8601 time in the years 1 to 9999") from None
    return micros


def to_tensor(column: Column, values: pa.Array) -> np.ndarray:
    """An Arrow array of the column's type as the graph's input [n]."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if column.kind == "timestamp":
        # Floor, not cast: whole seconds of a time before 1970 must not round towards zero.
        micros = values.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        return np.where(values.is_null().to_numpy(zero_copy_only=False), MISSING_INTEGER, micros // 1_000_000)
    filled = values.fill_null(MISSING[column.kind])
    array: np.ndarray = filled.to_numpy(zero_copy_only=False).astype(NUMPY[column.kind])
    return array


def to_array(column: Column, values: np.ndarray) -> pa.Array:
    """The inverse of `to_tensor`: nulls where a value is missing."""
    if column.kind == "number":
        return pa.array(values.astype(np.float64), mask=np.isnan(values))
    if column.kind in ("string", "text"):
        return pa.array(values, pa.string(), mask=values == "")
    missing = values == MISSING_INTEGER
    if column.kind == "integer":
        return pa.array(values, pa.int64(), mask=missing)
    return pa.array(np.where(missing, 0, values) * 1_000_000, pa.int64(), mask=missing).cast(ARROW["timestamp"])
