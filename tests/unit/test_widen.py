"""Rows in the types of a table that is there: widened where nothing is lost, else refused."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from noria.errors import LakeError
from noria.widen import widened

LIST = pa.list_(pa.field("element", pa.float64()))


@pytest.mark.parametrize(
    ("values", "kind", "wanted", "found"),
    [
        ([7], pa.int32(), pa.int64(), [7]),
        ([7], pa.int16(), pa.float32(), [7.0]),
        ([2**53], pa.int64(), pa.float64(), [2.0**53]),
        ([0.5], pa.float32(), pa.float64(), [0.5]),
        ([None], pa.null(), pa.string(), [None]),
        ([None], pa.null(), LIST, [[None]]),
        (["a"], pa.large_string(), pa.string(), ["a"]),
        (["a", "a"], pa.dictionary(pa.int32(), pa.string()), pa.string(), ["a", "a"]),
        ([0.5, None], pa.float32(), LIST, [[0.5], [None]]),
        ([[0.5, 1], []], pa.list_(pa.float32()), LIST, [[0.5, 1], []]),
        ([[0.5, 1]], pa.list_(pa.float32(), 2), LIST, [[0.5, 1]]),
        ([[0.5], [1]], pa.list_(pa.float32()), pa.float64(), [0.5, 1]),
        ([1_000], pa.timestamp("ns", tz="UTC"), pa.timestamp("us", tz="UTC"), None),
        ([2**53 + 1], pa.int64(), pa.float64(), None),
        ([7], pa.int32(), pa.float32(), None),
        ([7], pa.int64(), pa.int32(), None),
        ([1.0], pa.float64(), pa.float32(), None),
        ([1.0], pa.float64(), pa.int64(), None),
        ([True], pa.bool_(), pa.int64(), None),
        (["7"], pa.string(), pa.int64(), None),
        ([7], pa.int64(), pa.string(), None),
        ([[0.5, 1], [1]], pa.list_(pa.float32()), pa.float64(), None),
        ([[0.5], None], pa.list_(pa.float32()), pa.float64(), None),
        ([[0.5]], pa.list_(pa.float32()), pa.int64(), None),
        (["a"], pa.string(), LIST, None),
    ],
    ids=str,
)
def test_no_value_changes(values: list[Any], kind: pa.DataType, wanted: pa.DataType, found: list[Any] | None) -> None:
    rows = pa.table({"other": [0] * len(values), "x": pa.array(values, kind)})
    columns = pa.schema([("x", wanted), ("more", pa.string())])
    if kind == pa.timestamp("ns", tz="UTC"):
        assert widened(rows, columns, "trips").column("x").cast(pa.int64()).to_pylist() == [1]
        rows = rows.set_column(1, "x", pa.array([1_001], kind))
    if found is None:
        with pytest.raises(LakeError, match="The column 'x' of trips holds"):
            widened(rows, columns, "trips")
        return
    fitting = widened(rows, columns, "trips")
    assert fitting.column("x").to_pylist() == found
    assert fitting.schema.field("x").type == wanted
    assert fitting.column_names == ["other", "x"]


@pytest.mark.parametrize("columns", [["x"], []], ids=["a table", "no table yet"])
def test_names_that_differ_in_capital_letters_only_are_refused(columns: list[str]) -> None:
    rows = pa.table({name: [1] for name in ("x", "X") if name not in columns})
    with pytest.raises(LakeError, match="'x' and 'X' of trips differ in capital letters only"):
        widened(rows, pa.schema([(name, pa.int64()) for name in columns]), "trips")
