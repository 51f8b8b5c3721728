"""Records as Arrow: the same rows as JSON gives, whatever the columns' types; and no stream breaks the server."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noria.schema import Column, Schema
from serving.arrow import CONTENT_TYPE, decode_arrow
from serving.outcome import Outcome
from serving.protocol import MOST_ROWS, decode_predict
from serving.wire import Refusal

RECORDS = [
    {"pickup": "2020-03-15T08:30:00", "vendor": "A", "distance": 2.5, "zone": 1},
    {"pickup": "1969-12-31T23:59:59.5", "vendor": None, "distance": None, "zone": None},
    {"pickup": "2020-03-15", "vendor": "Midtown", "distance": 0.0, "zone": -5},
]


def stream(table, batch=None, compression=None):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, batch)
    return sink.getvalue().to_pybytes()


def columns(**changes):
    usual = {name: pa.array([record[name] for record in RECORDS]) for name in RECORDS[0]}
    return pa.table({**usual, **changes})


MOMENTS = [dt.datetime.fromisoformat(record["pickup"]) for record in RECORDS]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vendor": pa.array(["A", None, "Midtown"]).dictionary_encode()},
        {"vendor": pa.array(["A", "", "Midtown"], pa.large_string())},
        {"vendor": pa.array(["A", None, "Midtown"], pa.string_view())},
        {"distance": pa.array([2.5, float("nan"), 0.0], pa.float32())},
        {"distance": pa.array([2.5, None, 0.0], pa.float16())},
        {"zone": pa.array([1, None, -5], pa.int16())},
        {"zone": pa.array([1.0, None, -5.0])},
        {"pickup": pa.array(MOMENTS, pa.timestamp("us"))},
        {"pickup": pa.array(MOMENTS, pa.timestamp("ns", tz="Europe/Paris"))},
        {"pickup": pa.array([1584261000, -1, 1584230400])},
        {"pickup": pa.array([record["pickup"] for record in RECORDS], pa.large_string())},
        {"pickup": pa.array([record["pickup"] for record in RECORDS], pa.string_view())},
        {"pickup": pa.array([record["pickup"] for record in RECORDS]).dictionary_encode()},
        {"pickup": pa.array(["2020-03-15T08:30:00Z", "1970-01-01T01:59:59.123456789+02:00", "2020-03-15"])},
        {"pickup": pa.array(["2020-03-15T08:30:00Z", "1969-12-31T23:59:59.5Z", "2020-03-15"]).dictionary_encode()},
        {"pickup": pa.array([1584261000 * 10**9 + 1, -1, 1584230400 * 10**9], pa.timestamp("ns"))},
        {"pickup": pa.array([1584261000_001, -1, 1584230400_000], pa.timestamp("ms", "UTC"))},
    ],
)
@pytest.mark.parametrize("batch", [None, 2])
def test_the_same_rows_as_json(trips_model, changes, batch):
    expected = decode_predict(orjson.dumps(RECORDS), trips_model).rows
    rows = decode_arrow(stream(columns(**changes), batch), trips_model).rows
    assert rows.count == 3
    assert rows.times.tolist() == expected.times.tolist()
    for name, tensor in expected.tensors.items():
        assert rows.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(rows.tensors[name], tensor)


def test_columns_that_are_not_sent_are_missing_and_null_typed_ones_too(trips_model):
    table = pa.table({"pickup": pa.array([60]), "zone": pa.nulls(1)})
    rows = decode_arrow(stream(table), trips_model).rows
    expected = decode_predict(b'[{"pickup": 60}]', trips_model).rows
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(rows.tensors[name], tensor)


def test_times_beside_the_columns_too(trips_model):
    """The event time's own rules: missing is now, and what is outside the calendar is refused."""
    schema = Schema((Column("x", "number"),), event_time="at", target="y")
    model = replace(trips_model, bundle=replace(trips_model.bundle, schema=schema))
    times = pa.array(["1970-01-01T02:00:01+02:00", None, "1969-12-31T23:59:59.999999999"])
    rows = decode_arrow(stream(pa.table({"at": times, "x": [1.0, 2.0, 3.0]})), model).rows
    assert rows.times[[0, 2]].tolist() == [1_000_000, -1_000_000]
    assert rows.times[1] > 1_600_000_000_000_000
    with pytest.raises(Refusal, match="years 1 to 9999"):
        decode_arrow(stream(pa.table({"at": pa.array([18446745633258], pa.timestamp("s"))})), model)


def test_the_answer_is_a_stream_too(trips_model):
    asked = decode_arrow(stream(columns()), trips_model)
    scores = trips_model.run(asked.rows.tensors)["score"]
    answer = asked.answer(Outcome(trips_model, {"score": scores}, ["a", "b", "c"], ["short", None, "long"]).whole())
    assert (answer.content_type, answer.rows) == (CONTENT_TYPE, 3)
    table = pa.ipc.open_stream(answer.body).read_all()
    assert table.schema.metadata == {b"workload": b"trips", b"version": b"1"}
    assert table.column("prediction").to_pylist() == scores.tolist()
    assert table.select(["id", "action"]).to_pylist() == [
        {"id": "a", "action": "short"},
        {"id": "b", "action": None},
        {"id": "c", "action": "long"},
    ]


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (b"", 400, "empty"),
        (b'{"records": []}', 400, "not an Arrow IPC stream"),
        (stream(columns())[:200], 400, "not an Arrow IPC stream"),
        (stream(columns(), compression="zstd"), 400, "compressed"),
        (stream(columns(vendor=pa.array(["A", "B", "A"]).dictionary_encode()), compression="lz4"), 400, "compressed"),
        (stream(columns().slice(0, 0)), 422, "no rows"),
        (stream(columns(colour=pa.array([1, 2, 3]))), 422, "unknown column 'colour'"),
        (stream(pa.table([pa.array([60])] * 2, ["pickup"] * 2)), 422, "twice"),
        (stream(pa.table([pa.array([60])] * 3, ["pickup", "zone", "zone"])), 422, "'zone' is there twice"),
        (stream(pa.table([pa.array([60])] * 3, ["pickup", "colour", "colour"])), 422, "unknown column 'colour'"),
        (stream(columns(distance=pa.array([1.0, -1.0, 2.0]))), 422, "Row 1: 'distance' is below 0"),
        (stream(columns(distance=pa.array([1.0, float("inf"), 2.0]))), 422, "not finite"),
        (stream(columns(distance=pa.array([1.0, 1e300, 2.0]))), 422, "not finite"),
        (stream(columns(distance=pa.array(["far", "1", "2"]))), 422, "Column 'distance' holds string"),
        (stream(columns(zone=pa.array([1.5, 2.0, 3.0]))), 422, "Column 'zone' holds double"),
        (stream(columns(zone=pa.array([2**63, 2, 3], pa.uint64()))), 422, "Column 'zone' holds uint64"),
        (stream(columns(vendor=pa.array([["A"], ["B"], ["C"]]))), 422, "Column 'vendor' holds list"),
        (stream(columns(pickup=pa.array([60, None, 60]))), 422, "required"),
        (stream(columns(pickup=pa.array([60, 2**60, 60]))), 422, "years 1 to 9999"),
        (stream(columns(pickup=pa.array([60, 18446745633258, 60], pa.timestamp("s")))), 422, "years 1 to 9999"),
        (stream(columns(pickup=pa.array([60, 2**63 - 1, 60], pa.timestamp("ms", "UTC")))), 422, "years 1 to 9999"),
        (stream(columns(pickup=pa.array(["2020-03-15T08:30Z", "soon", None]))), 422, "'soon' is not an ISO 8601 time"),
        (stream(columns(pickup=pa.array(["2020-03-15T08:30Z", "", None]))), 422, "'' is not an ISO 8601 time"),
        (stream(columns(pickup=pa.array(["0001-01-01T00:00+14:00"] * 3))), 422, "years 1 to 9999"),
        (stream(columns(pickup=pa.array(["soon", "now", "then"]))), 422, "Column 'pickup' holds string"),
        (stream(pa.table({"pickup": pa.array([60] * (MOST_ROWS + 1))})), 413, "more than 10000 rows"),
    ],
)
def test_refusals(trips_model, body, status, part):
    with pytest.raises(Refusal, match=part) as caught:
        decode_arrow(body, trips_model)
    assert caught.value.status == status


def test_many_rows_of_few_bytes_are_refused_before_they_are_made(trips_model):
    """Null columns and runs claim any number of rows."""
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2**30], pa.int32()), pa.array([60]))
    for table, status in ((pa.table({"pickup": runs}), 422), (pa.table({"zone": pa.nulls(2**24)}), 413)):
        body = stream(table)
        assert len(body) < 5000 or table.schema.names == ["zone"]
        with pytest.raises(Refusal) as caught:
            decode_arrow(body, trips_model)
        assert caught.value.status == status


TEXT, ROWS, ALL_BYTES = "x" * 1000, 2000, 10**6
"""A string, how many rows name it, and less than they hold together."""


def views(count):
    """String views that all name the same bytes."""
    view = np.array([len(TEXT), int.from_bytes(TEXT[:4].encode(), "little"), 0, 0], np.int32)
    places = pa.py_buffer(np.tile(view, count).tobytes())
    return pa.Array.from_buffers(pa.string_view(), count, [None, places, pa.py_buffer(TEXT.encode())])


def named(values):
    return pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.uint16()), values)


@pytest.mark.parametrize(
    "column",
    [
        named(pa.array([TEXT])),
        named(pa.array([TEXT], pa.large_string())),
        named(pa.array([TEXT.encode()], pa.binary(1000))),
        views(ROWS),
        pa.ExtensionArray.from_storage(pa.opaque(pa.string_view(), "a", "b"), views(ROWS)),
    ],
)
@pytest.mark.parametrize("name", ["vendor", "distance"])
def test_what_expands_is_measured_before_it_does(trips_model, column, name):
    body = stream(pa.table({"pickup": pa.array([60] * ROWS), name: column}))
    assert len(body) < ALL_BYTES / 5
    with pytest.raises(Refusal, match="hold more than 1,000,000 bytes") as caught:
        decode_arrow(body, trips_model, ALL_BYTES)
    assert caught.value.status == 413
    if name == "vendor" and not isinstance(column, pa.ExtensionArray):
        values = decode_arrow(body, trips_model).rows.tensors["vendor"]
        assert values.tolist() == [TEXT] * ROWS


def test_a_dictionary_counts_in_every_batch_and_what_a_delta_made_of_it_too(trips_model):
    """Both are in the memory, or are validated, once a batch."""
    sink = pa.BufferOutputStream()
    schema = pa.schema({"pickup": pa.int64(), "vendor": pa.dictionary(pa.int32(), pa.string())})
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as writer:
        for batch in range(100):
            levels = pa.array(["x" * 50_000, *map(str, range(batch))])
            vendor = pa.DictionaryArray.from_arrays(pa.array([batch], pa.int32()), levels)
            writer.write_batch(pa.record_batch([pa.array([60]), vendor], schema=schema))
    grown = sink.getvalue().to_pybytes()
    levels = pa.array(["x" * 50_000, "a"])
    vendor = pa.DictionaryArray.from_arrays(pa.array([1] * 100, pa.int32()), levels)
    shared = stream(pa.table({"pickup": pa.array([60] * 100), "vendor": vendor}), 1)
    for body in (grown, shared):
        assert len(body) < 200_000
        with pytest.raises(Refusal, match="hold more than 1,000,000 bytes"):
            decode_arrow(body, trips_model, ALL_BYTES)
        assert decode_arrow(body, trips_model).rows.count == 100


def test_columns_that_lie_over_each_other_count_each(trips_model, monkeypatch):
    """The format says for each buffer where in the body it is, and nothing keeps two from being the same."""
    body = stream(pa.table({name: pa.array([60] * 8000) for name in ("pickup", "zone", "distance")}))
    for offset in (64_000, 128_000):
        place, first = (np.array([where, 0, where, 64_000], np.int64).tobytes() for where in (offset, 0))
        assert body.count(place) == 1
        body = body.replace(place, first)
    size, less = (np.int64(size).tobytes() for size in (192_000, 64_000))
    assert body.count(size) == 1
    body = body.replace(size, less)[: -128_000 - 8] + body[-8:]
    assert decode_arrow(body, trips_model).rows.tensors["zone"].tolist() == [60] * 8000
    monkeypatch.setattr("serving.arrow.pa.ipc.open_stream", None)  # refused before anything is read
    with pytest.raises(Refusal, match="hold more than 100,000 bytes"):
        decode_arrow(body, trips_model, 100_000)


def test_a_stream_of_very_many_batches_is_refused(trips_model):
    nothing, sink = pa.record_batch({"zone": pa.nulls(0)}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, nothing.schema) as writer:
        for _ in range(MOST_ROWS + 1):
            writer.write_batch(nothing)
    with pytest.raises(Refusal, match="more than 10000 batches") as caught:
        decode_arrow(sink.getvalue().to_pybytes(), trips_model)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.list_view(pa.string()),
        pa.list_(pa.null(), 2**30),
        pa.struct({"a": pa.null()}),
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.dictionary(pa.int32(), pa.list_(pa.string())),
        pa.dictionary(pa.int32(), pa.string_view()),
        pa.opaque(pa.list_view(pa.string()), "a", "b"),
    ],
)
def test_what_is_no_flat_column_is_refused_by_its_type(trips_model, kind):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"vendor": kind})):
        pass
    with pytest.raises(Refusal, match=r"Column .vendor. holds .*, the schema wants string") as caught:
        decode_arrow(sink.getvalue().to_pybytes(), trips_model)
    assert caught.value.status == 422


def test_a_plain_model_has_no_records(identity_model):
    with pytest.raises(Refusal, match="plain model") as caught:
        decode_arrow(b"x", identity_model("FP32"))
    assert caught.value.status == 404


WHOLE = stream(columns(vendor=pa.array(["A", None, "Midtown"]).dictionary_encode()), 2)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(WHOLE)))
def test_any_damage_is_rows_or_a_refusal(trips_model, changes, end):
    body = bytearray(WHOLE)
    for place, value in changes:
        body[place] = value
    try:
        decode_arrow(bytes(body[:end]), trips_model)
    except Refusal as refusal:
        assert refusal.status in (400, 413, 422)


def test_a_hundred_thousand_names_are_refused_by_the_first_that_is_unknown(trips_model):
    """Each name against all would take minutes here, and whoever sends them would hold up everybody."""
    names = [f"c{number}" for number in range(100_000)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([pa.field(name, pa.null()) for name in [*names, names[-1]]])):
        pass
    with pytest.raises(Refusal, match="unknown column 'c0'") as caught:
        decode_arrow(sink.getvalue().to_pybytes(), trips_model)
    assert caught.value.status == 422
