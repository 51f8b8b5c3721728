"""Records in, tensors out, and sentences that name field and row where they cannot."""

import math
import re
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from noria.errors import SchemaError
from noria.schema import MISSING_INTEGER, Column, Schema, parse_time

SCHEMA = Schema(
    (
        Column("at", "timestamp", required=True, example="2020-03-15T08:30:00"),
        Column("zone", "integer", low=0, high=300, example=7),
        Column("miles", "number", low=0, high=100, example=1.5),
        Column("shop", "string", example="north"),
        Column("note", "text", example="two words"),
    ),
    event_time="at",
    target="minutes",
)
FULL = {"at": "2020-03-15T08:30:00", "zone": 7, "miles": 1.5, "shop": "north", "note": "two words"}


def test_each_kind_has_its_tensor():
    tensors = SCHEMA.parse([FULL, {"at": 0}])
    assert tensors["at"].tolist() == [1584261000, 0]
    assert tensors["zone"].tolist() == [7, MISSING_INTEGER]
    assert tensors["miles"].dtype == np.float32 and math.isnan(tensors["miles"][1])
    assert tensors["shop"].tolist() == ["north", ""]
    assert tensors["note"].dtype == object


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"speed": 1}, "speed", "unknown field 'speed'"),
        ({"at": None}, "at", "it is required"),
        ({"at": "yesterday"}, "at", "ISO 8601"),
        ({"at": True}, "at", "ISO 8601"),
        ({"at": 10**30}, "at", "ISO 8601"),
        ({"zone": 1.5}, "zone", "a whole number"),
        ({"zone": True}, "zone", "a whole number"),
        ({"zone": 10**400}, "zone", "a whole number"),
        ({"zone": 301}, "zone", "above 300"),
        ({"zone": "7"}, "zone", "a whole number"),
        ({"miles": float("nan")}, "miles", "not finite"),
        ({"miles": float("inf")}, "miles", "not finite"),
        ({"miles": 10**400}, "miles", "a number"),
        ({"miles": 1e39}, "miles", "a number"),
        ({"miles": -0.1}, "miles", "below 0"),
        ({"miles": [1]}, "miles", "a number"),
        ({"shop": 3}, "shop", "a string"),
        ({"note": {"a": 1}}, "note", "a string"),
    ],
)
def test_a_bad_value_is_named(change, field, sentence):
    with pytest.raises(SchemaError, match=sentence) as caught:
        SCHEMA.parse([FULL, {**FULL, **change}])
    assert (caught.value.field, caught.value.row) == (field, 1)
    assert "Row 1" in str(caught.value)


@pytest.mark.parametrize("records", [[], ["text"], [None], [[1]]])
def test_what_is_no_record_is_refused(records):
    with pytest.raises(SchemaError, match="record"):
        SCHEMA.parse(records)


def test_a_whole_float_is_an_integer():
    assert SCHEMA.parse([{**FULL, "zone": 7.0}])["zone"].tolist() == [7]


def test_times_round_down_everywhere():
    early = "1969-12-31T23:59:59.5"
    assert parse_time(early) == -1
    table = pa.table({"at": pa.array([datetime(1969, 12, 31, 23, 59, 59, 500_000, UTC)])})
    one = Schema((Column("at", "timestamp"),), event_time="at", target="y")
    assert one.tensors(table)["at"].tolist() == [-1]


@pytest.mark.parametrize(
    "odd",
    [
        "2020-02-30T00:00:00", "2019-02-29T12:00:00", "2020-13-01T00:00:00", "2020-01-01T24:00:00",
        "2020-01-01T23:59:60", "0000-01-01T00:00:00", "1969-12-31T23:59:59", "1969-12-31T23:59:59.5",
        "2020-01-01 00:00:00", "2020-01-01", "20200101T000000", "2020-01-01T00:00:00Z", "2020-W01-1T00:00:00",
        "\u0662020-01-01T00:00:00", "2020-01-01T00:00+01:00", "-020-01-01T00:00:00", "NaT", "now", "", "2020-01",
        12, -10**12, None,
    ],
)  # fmt: skip
def test_an_odd_time_among_many_is_what_it_is_alone(odd):
    one = Schema((Column("at", "timestamp"),), event_time="at", target="y")
    records = [{"at": "2020-03-15T08:30:00"}] * 9 + [{"at": odd}]
    try:
        alone = one.parse([{"at": odd}])["at"].tolist()
    except SchemaError:
        with pytest.raises(SchemaError, match="Row 9"):
            one.parse(records)
        return
    assert one.parse(records)["at"].tolist() == [1584261000] * 9 + alone


def test_an_unknown_field_of_all_is_unknown():
    with pytest.raises(SchemaError, match="Row 0 has the unknown field 'speed'"):
        SCHEMA.parse([{**FULL, "speed": 1}] * 20)


def test_a_zone_in_the_text_counts():
    assert (
        parse_time("2020-03-15T08:30:00+02:00")
        == parse_time("2020-03-15T06:30:00")
        == parse_time("2020-03-15T06:30:00Z")
    )


def test_tensors_become_a_table_and_back():
    tensors = SCHEMA.parse([FULL, {"at": 60}])
    table = SCHEMA.table(tensors)
    assert table.column("zone").null_count == table.column("shop").null_count == 1
    again = SCHEMA.tensors(table)
    for name in SCHEMA.names:
        np.testing.assert_array_equal(tensors[name], again[name])


def test_check_says_what_parse_says():
    good = SCHEMA.parse([FULL, FULL])
    SCHEMA.check(good)
    bad = {**good, "miles": np.array([1, np.inf], np.float32)}
    with pytest.raises(SchemaError, match="Row 1: 'miles' is not finite"):
        SCHEMA.check(bad)
    with pytest.raises(SchemaError, match="Row 0: 'zone' is above 300"):
        SCHEMA.check({**good, "zone": np.array([301, 5])})
    with pytest.raises(SchemaError, match="'at' is missing"):
        SCHEMA.check({**good, "at": np.array([5, MISSING_INTEGER])})


def test_conform_casts_and_leaves_other_columns():
    table = pa.table(
        {"at": ["2020-01-01T00:00:00"], "zone": [7.0], "miles": [1], "shop": ["a"], "note": [None], "fare": ["x"]}
    )
    conforming = SCHEMA.conform(table)
    assert conforming.schema.field("at").type == pa.timestamp("us", tz="UTC")
    assert conforming.schema.field("zone").type == pa.int64()
    assert conforming.column("fare").to_pylist() == ["x"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_times_that_are_strings_conform_with_zones_and_without(kind):
    times = pa.array(["2020-01-01T00:00:00.25", "2020-01-01T02:00:00.123456789+02:00", "2020-01-01T00Z", None], kind)
    table = SCHEMA.table(SCHEMA.parse([FULL] * 4)).set_column(0, "at", times).append_column("fare", [[1.0] * 4])
    micros = SCHEMA.conform(table).column("at").cast(pa.int64()).to_pylist()
    assert micros == [1577836800_250_000, 1577836800_123_456, 1577836800_000_000, None]
    for odd in ("soon", "0001-01-01T00:00+14:00"):
        with pytest.raises(SchemaError, match=f"'at' holds .*{re.escape(odd)}"):
            SCHEMA.conform(table.set_column(0, "at", pa.array([*times.to_pylist()[:3], odd], kind)))


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("zone", ["seven"], "'zone' holds string"),
        ("zone", [1.5], "'zone' holds double"),
        (None, None, "no column 'shop'"),
    ],
)
def test_conform_names_the_column(column, values, sentence):
    table = SCHEMA.table(SCHEMA.parse([FULL]))
    changed = table.drop_columns("shop") if column is None else table.set_column(1, column, pa.array(values))
    with pytest.raises(SchemaError, match=sentence):
        SCHEMA.conform(changed)


def test_violations_are_counted():
    table = SCHEMA.table(SCHEMA.parse([FULL] * 3)).set_column(2, "miles", pa.array([-1.0, 500.0, None]))
    assert SCHEMA.violations(table) == {"miles: below 0": 1, "miles: above 100": 1}


@pytest.mark.parametrize(
    ("columns", "time", "target", "sentence"),
    [
        ((), "at", "y", "at least one"),
        ((Column("a", "number"), Column("a", "text")), "at", "y", "unique"),
        ((Column("y", "number"),), "at", "y", "target 'y' is among"),
        ((Column("at", "number"),), "at", "y", "must be a timestamp"),
    ],
)
def test_a_schema_that_cannot_be(columns, time, target, sentence):
    with pytest.raises(SchemaError, match=sentence):
        Schema(columns, time, target)


def test_json_reads_back_equal():
    assert Schema.from_json(SCHEMA.to_json()) == SCHEMA
