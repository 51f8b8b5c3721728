"""What goes over the wire: every way to say a row, and every way to say it wrong."""

from __future__ import annotations

import struct

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noria.column import MISSING_INTEGER
from noria.errors import SchemaError
from noria.schema import Column, Schema
from serving import columns, operate
from serving.limits import JSON_LISTS
from serving.protocol import MOST_ROWS, decode_feedback, decode_predict, read_records
from serving.tensors import decode_infer, example
from serving.wire import Refusal

RECORD = {"pickup": "2020-03-15T08:30:00", "vendor": "Midtown", "distance": 2.5, "zone": 1}


def infer(**columns):
    kinds = {"pickup": "INT64", "vendor": "BYTES", "distance": "FP32", "zone": "INT64"}
    inputs = [
        {"name": name, "datatype": kinds[name], "shape": [len(data)], "data": data} for name, data in columns.items()
    ]
    return orjson.dumps({"inputs": inputs})


@pytest.mark.parametrize("depth", [70, 500, 990, 1010, 1030, 100_000])
@pytest.mark.parametrize(
    "around",
    ["%s", '{"records":%s}', '{"distance":%s}', '[{"distance":%s}]', '{"records":[{"pickup":%s}]}', '{"records":[%s]}',
     '{"records":[],"more":%s}', "[" + '{"distance":1},' * 20 + '{"zone":%s}]'],
)  # fmt: skip
def test_what_is_nested_too_deeply_is_refused_for_that_wherever_it_stands(trips_model, around, depth):
    for opens, closes in ((b"[", b"]"), (b'{"distance":', b"}")):
        body = around.encode() % (opens * depth + b"1" + closes * depth)
        with pytest.raises(Refusal, match="nested deeper") as refused:
            decode_predict(body, trips_model)
        assert refused.value.status == 400


@pytest.mark.parametrize("body", [b'{"records":[%s]}', b'{"inputs":[%s]}', b'{"labels":[%s]}', b"[%s]"])
def test_a_body_that_is_all_lists_is_refused_before_it_is_read(trips_model, monkeypatch, body):
    monkeypatch.setattr("serving.protocol.orjson.loads", None)
    body %= b"[]," * JSON_LISTS
    for decode in (decode_predict, decode_infer):
        with pytest.raises(Refusal, match="more than 1,048,576 lists and objects") as refused:
            decode(body, trips_model)
        assert refused.value.status == 413
    with pytest.raises(Refusal, match="more than 1,048,576 lists and objects"):
        decode_feedback(body, "binary")
    with pytest.raises(Refusal, match="more than 1,048,576 lists and objects"):
        operate.read(["", "v2", "repository", "index"], body)


def test_three_ways_to_send_records(trips_model):
    for body in ({"records": [RECORD]}, [RECORD], RECORD):
        rows = decode_predict(orjson.dumps(body), trips_model).rows
        assert rows.times.tolist() == [1584261000_000_000]
        assert rows.tensors["vendor"].tolist() == ["Midtown"]


def test_event_time_beside_the_columns_and_without_it_the_clock():
    schema = Schema((Column("x", "number"),), event_time="at", target="y")
    rows = read_records(b'[{"x": 1, "at": 60}, {"x": 2}]', schema)
    assert rows.times[0] == 60_000_000
    assert rows.times[1] > 1_600_000_000_000_000
    assert set(rows.tensors) == {"x"}
    with pytest.raises(SchemaError, match="Row 1: 'at' is 'soon'"):
        read_records(b'[{"x": 1, "at": 60}, {"x": 2, "at": "soon"}]', schema)
    with pytest.raises(SchemaError, match="years 1 to 9999"):
        read_records(b'[{"x": 1, "at": 999999999999999}]', schema)


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (b"", 400, "empty"),
        (b"{", 400, "not JSON"),
        (b'{"records": [{"distance": NaN}]}', 400, "NaN is not JSON"),
        (b'{"records": 3}', 422, "list"),
        (b'"text"', 422, "list"),
        (b'{"records": [], "more": 1}', 422, "more"),
        (orjson.dumps([RECORD] * (MOST_ROWS + 1)), 413, "at most 10000"),
    ],
)
def test_refusals_of_the_body(trips_model, body, status, part):
    with pytest.raises(Refusal, match=part) as caught:
        decode_predict(body, trips_model)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"colour": "red"}, "Row 1 has the unknown field 'colour'"),
        ({"pickup": None}, "Row 1 has no 'pickup'"),
        ({"distance": "far"}, "Row 1: 'distance' is 'far'; it must be a number"),
        ({"distance": -1}, "below 0"),
        ({"distance": 101}, "above 100"),
        ({"zone": 1.5}, "whole number"),
        ({"vendor": 7}, "it must be a string"),
        ({"pickup": 10**18}, "ISO 8601"),
    ],
)
def test_refusals_name_field_and_row(trips_model, change, part):
    with pytest.raises(Refusal, match=part) as caught:
        decode_predict(orjson.dumps([RECORD, {**RECORD, **change}]), trips_model)
    assert caught.value.status == 422
    assert "Row 1" in caught.value.message


def test_infer_reads_tensors_with_missing_values(trips_model):
    body = infer(pickup=[60, 120], vendor=["", None], distance=[None, 3], zone=[None, 2])
    asked = decode_infer(body, trips_model)
    rows = asked.rows
    assert asked.id is None
    assert rows.tensors["vendor"].tolist() == ["", ""]
    assert np.isnan(rows.tensors["distance"][0])
    assert rows.tensors["distance"].dtype == np.float32
    assert rows.tensors["zone"].tolist() == [MISSING_INTEGER, 2]
    assert rows.times.tolist() == [60_000_000, 120_000_000]


def test_a_null_among_many_whole_numbers_is_no_reason_to_look_at_each(trips_model, monkeypatch):
    formats = []
    monkeypatch.setattr(columns, "pack", lambda form, *values: (formats.append(form), struct.pack(form, *values))[1])
    rows = decode_infer(infer(pickup=[60] * 100, zone=[None, *range(99)]), trips_model).rows
    assert rows.tensors["zone"].tolist() == [MISSING_INTEGER, *range(99)]
    assert sorted(formats) == ["<100q", "<100q", "<99q"]
    with pytest.raises(Refusal, match=r"Row 2.*which is no INT64"):
        decode_infer(infer(pickup=[60] * 100, zone=[None, 1, 2**63, *range(97)]), trips_model)


def test_infer_takes_columns_of_one_and_iso_times(trips_model):
    inputs = [
        {"name": "pickup", "datatype": "BYTES", "shape": [2, 1], "data": [["2020-03-15T08:30:00"], ["2020-03-16"]]},
        {"name": "vendor", "datatype": "BYTES", "shape": [2, 1], "data": [["a"], ["b"]]},
    ]
    asked = decode_infer(orjson.dumps({"id": "q1", "inputs": inputs}), trips_model)
    rows = asked.rows
    assert asked.id == "q1"
    assert rows.tensors["pickup"].tolist() == [1584261000, 1584316800]
    assert np.isnan(rows.tensors["distance"]).all()  # a column that was not sent is missing


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"[]", "inference request"),
        (b'{"inputs": []}', "no inputs"),
        (b'{"inputs": [4]}', "object with name"),
        (infer(pickup=[], vendor=[]), "no rows"),
        (infer(pickup=[1], vendor=["a", "b"]), "differ in their number of rows"),
        (infer(pickup=[1], distance=["2"]), "'distance' is '2'; it must be a number"),
        (infer(pickup=[1], distance=[True]), "must be a number"),
        (infer(pickup=[1], distance=[1e300]), "'distance'"),
        (infer(pickup=[1], distance=[101]), "above 100"),
        (infer(pickup=[None]), "Row 0.*'pickup'"),
        (infer(pickup=[2**63]), "'pickup'"),
        (infer(pickup=[10**17]), "years 1 to 9999|'pickup'"),
        (infer(pickup=[1], zone=[2**64 - 1]), "'zone'"),
        (infer(pickup=[1], vendor=[["a", "b"]]), "must be a string"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}', "no input 'x'"),
        (b'{"inputs": [{"name": "vendor", "datatype": "FP32", "shape": [1], "data": [1]}]}', "one of BYTES"),
        (b'{"inputs": [{"name": "vendor", "datatype": "BYTES", "shape": [2], "data": ["a"]}]}', "1 values"),
        (b'{"inputs": [{"name": "vendor", "datatype": "BYTES", "shape": [1, 2], "data": ["a"]}]}', "shape"),
        (b'{"inputs": [{"name": "vendor", "datatype": "BYTES", "shape": "1", "data": ["a"]}]}', "shape"),
        (b'{"inputs": [{"name": "vendor", "datatype": "BYTES", "shape": [1]}]}', "no data"),
    ],
)
def test_infer_refusals(trips_model, body, part):
    with pytest.raises(Refusal, match=part) as caught:
        decode_infer(body, trips_model)
    assert caught.value.status == 400


def test_infer_takes_its_own_example(trips_schema, trips_model):
    assert decode_infer(orjson.dumps(example(trips_schema, RECORD)), trips_model).rows.count == 1


def test_feedback():
    body = {"labels": [{"id": "a", "label": 3, "time": "1970-01-01T00:01:00"}, {"id": "b", "label": 0.5}]}
    ids, labels, times = decode_feedback(orjson.dumps(body), "regression")
    assert (ids, labels, times[0]) == (["a", "b"], [3.0, 0.5], 60_000_000)


@pytest.mark.parametrize(
    ("label", "part"),
    [
        ({"id": "a", "label": "3"}, "Row 0: 'label' is '3'; it must be a number"),
        ({"id": "a", "label": True}, "must be a number"),
        ({"id": "a", "label": 2}, "must be 0 or 1"),
        ({"id": "a"}, "'label' is None"),
        ({"id": 4, "label": 1}, "'id' must be"),
        ({"id": "", "label": 1}, "'id' must be"),
        ({"id": "a", "label": 1, "time": "late"}, "'time' is 'late'"),
        ({"id": "a", "label": 1, "x": 1}, "unknown field 'x'"),
        ([], "not an object"),
    ],
)
def test_feedback_refusals(label, part):
    with pytest.raises(SchemaError, match=part):
        decode_feedback(orjson.dumps([label]), "binary")


@pytest.mark.parametrize("body", [b"{}", b"[]", b"3", b'{"labels": {}}'])
def test_feedback_needs_labels(body):
    with pytest.raises(Refusal, match="labels"):
        decode_feedback(body, "binary")


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "pickup": st.sampled_from(["2020-03-15T08:30:00", "1969-12-31T23:59:59.5", "2020-03-15", "2020-03-15T08+02:00"])
        | st.integers(-(10**9), 10**10) | ODD,
        "vendor": st.sampled_from(["A", ""]) | ODD,
        "distance": st.floats(0, 100) | st.integers(0, 100) | ODD,
        "zone": st.integers(-(2**64), 2**64) | ODD,
    },
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.lists(FIELDS, min_size=1, max_size=30), st.booleans())
def test_many_records_are_read_as_one_by_one(trips_schema, records, usual):
    if usual:  # the odd ones nearly always refuse the whole: keep those that pass alone
        records = [record for record in records if _alone(trips_schema, record)] * 10
    alone = [_alone(trips_schema, record) for record in records]
    if not records or not all(alone):
        with pytest.raises(SchemaError):
            trips_schema.parse(records)
        return
    together = trips_schema.parse(records)
    for name, values in together.items():
        one_by_one = np.concatenate([tensors[name] for tensors in alone])
        assert values.dtype == one_by_one.dtype
        np.testing.assert_array_equal(values, one_by_one)


def _alone(schema, record):
    try:
        return schema.parse([record])
    except SchemaError:
        return None
