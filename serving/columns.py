"""v2 tensors as the raw columns of a workload: several datatypes fit a column, and a value may be missing.

Missing: null, "" in BYTES, NaN, the smallest INT64, or the whole input left out. Times: whole seconds since 1970, or
ISO 8601 in BYTES. Not here: the request around the tensors (`serving.tensors`), plain models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from struct import error, pack
from typing import Any, NoReturn

import numpy as np

from noria.column import FORMS, LARGEST_NUMBER, MISSING, MISSING_INTEGER, NUMPY, Column, parse_column, parse_value
from noria.errors import SchemaError
from noria.schema import FEW, Schema
from serving.protocol import event_times, limit_rows
from serving.wire import Refusal, Rows

WHOLE = frozenset({"INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"})
DECIMAL = frozenset({"FP16", "FP32", "FP64"})
FORMATS = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
"""The letter of each datatype in the standard library's struct."""
NUMBERS = {int, float}
NUMBERS_AND_NULL, TEXT_AND_NULL = {*NUMBERS, type(None)}, {str, type(None)}
ACCEPTED = {
    "number": WHOLE | DECIMAL,
    "integer": WHOLE,
    "string": frozenset({"BYTES"}),
    "text": frozenset({"BYTES"}),
    "timestamp": frozenset({"INT64", "BYTES"}),
}
Given = tuple[str, Sequence[int], Any]
"""An input as it was sent: datatype, shape, and a flat list (JSON) or an array."""


def to_rows(given: Mapping[str, Given], schema: Schema) -> Rows:
    """Rows of a workload.

    Raises:
        Refusal: 400 the tensors do not fit each other, 413 too many rows. SchemaError: a tensor breaks the schema.
    """
    size = _size(given)
    tensors = {}
    known = 0
    exact = True
    for column in schema.columns:
        sent = given.get(column.name)
        if sent is None:
            tensors[column.name] = np.full(size, MISSING[column.kind], NUMPY[column.kind])
            exact = exact and not column.required
        else:
            known += 1
            tensors[column.name], looked_at = _column(column, sent, size)
            exact = exact and looked_at
    when = tensors.get(schema.event_time)
    if when is None and schema.event_time in given:
        known += 1
        when, _ = _column(Column(schema.event_time, "timestamp"), given[schema.event_time], size)
    if known != len(given):
        name = next(name for name in given if name not in schema.names and name != schema.event_time)
        raise SchemaError(f"There is no input '{name}'; there are: {', '.join(schema.names)}.", name)
    if not exact:
        schema.check(tensors)
    return Rows(tensors, size, None if when is None else event_times(when))


def _size(given: Mapping[str, Given]) -> int:
    """The number of rows that all inputs agree on."""
    if not given:
        raise Refusal(400, "There are no inputs; send one tensor a column.")
    size = -1
    for name, (_, shape, _) in given.items():
        if len(shape) != 1 and not (len(shape) == 2 and shape[1] == 1):
            raise SchemaError(f"The input '{name}' must have the shape [n] or [n, 1].", name)
        if size not in (-1, shape[0]):
            shown = ", ".join(f"{one} {sent[1][0] if sent[1] else 1}" for one, sent in given.items())
            raise Refusal(400, f"The inputs differ in their number of rows: {shown[:300]}.")
        size = shape[0]
    if size == 0:
        raise Refusal(400, "There are no rows; send at least one.")
    limit_rows(size, "rows")
    return size


def _column(column: Column, sent: Given, size: int) -> tuple[np.ndarray, bool]:
    """One input as the graph's tensor [n], and whether the schema's rules were looked at value by value."""
    datatype, _, data = sent
    kind = column.kind
    if datatype not in ACCEPTED[kind]:
        wanted = ", ".join(sorted(ACCEPTED[kind]))
        sentence = f"The input '{column.name}' has the datatype {datatype[:20]}; it must be one of {wanted}."
        raise SchemaError(sentence, column.name)
    if isinstance(data, np.ndarray):
        if datatype != "BYTES" or kind != "timestamp":
            return _converted(column, datatype, data.reshape(size)), False
        data = data.ravel().tolist()
    if datatype in WHOLE:
        _check_whole(column, datatype, data)
    elif datatype == "FP16" and NUMBERS_AND_NULL.issuperset(map(type, data)):
        return _halves(column, data), False
    elif kind == "timestamp":
        if not TEXT_AND_NULL.issuperset(map(type, data)):
            _refuse(column, datatype, data, [value.__class__ in TEXT_AND_NULL for value in data])
        data = [value or None for value in data]
    if size > FEW:
        quick = parse_column(column, data)
        if quick is not None:
            return quick, False
    values = [parse_value(column, value, row) for row, value in enumerate(data)]
    return np.array(values, NUMPY[kind]), True


def _check_whole(column: Column, datatype: str, data: list[Any]) -> None:
    """Refuses what is no whole number of its datatype (true is left to the column); null is missing."""
    letter = FORMATS[datatype]
    try:
        pack(f"<{len(data)}{letter}", *data)  # all at once where nothing is odd
    except error:
        given = [value for value in data if value is not None]
        try:
            pack(f"<{len(given)}{letter}", *given)
        except error:
            _refuse(column, datatype, data, [value is None or _packs(letter, value) for value in data])


def _halves(column: Column, data: list[Any]) -> np.ndarray:
    """Numbers rounded to FP16, as they would be in bytes."""
    filled = [math.nan if value is None else value for value in data]
    try:
        return _converted(column, "FP16", np.frombuffer(pack(f"<{len(data)}e", *filled), np.float16))
    except (OverflowError, error):
        _refuse(column, "FP16", data, [_packs("e", value) for value in filled])


def _packs(letter: str, value: Any) -> bool:
    try:
        pack(f"<{letter}", value)
    except (OverflowError, error):
        return False
    return True


def _refuse(column: Column, datatype: str, data: list[Any], fits: list[bool]) -> NoReturn:
    row = fits.index(False)
    raise SchemaError(
        f"Row {row}: '{column.name}' is {repr(data[row])[:60]}, which is no {datatype}.", column.name, row
    )


def _converted(column: Column, datatype: str, values: np.ndarray) -> np.ndarray:
    """An array of another datatype as the column's own; NaN is missing."""
    if column.kind in ("string", "text"):
        return values
    if column.kind == "number":
        if datatype == "FP32":
            return values
        if datatype == "FP64" and bool((np.abs(values) >= LARGEST_NUMBER).any()):
            row = int(np.argmax(np.abs(values) >= LARGEST_NUMBER))
            shown = f"{values[row]:g}; it must be {FORMS['number']}, below {LARGEST_NUMBER:g}"
            raise SchemaError(f"Row {row}: '{column.name}' is {shown}.", column.name, row)
        return values.astype(np.float32)
    if datatype == "UINT64" and bool((values > np.uint64(-(MISSING_INTEGER + 1))).any()):
        row = int(np.argmax(values > np.uint64(-(MISSING_INTEGER + 1))))
        raise SchemaError(f"Row {row}: '{column.name}' is above {2**63 - 1}.", column.name, row)
    return values.astype(np.int64, copy=False)
