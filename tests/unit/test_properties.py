"""Properties that hold for any record and any schema, looked for by hypothesis."""

import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noria.decision import Band, Bands
from noria.errors import SchemaError
from noria.records import DatasetRef, Evaluation, Window
from noria.schema import MISSING_INTEGER, Column, Schema

settings.register_profile("house", deadline=None, max_examples=60)
settings.load_profile("house")  # no deadlines: a busy machine is no counterexample
KINDS = ("number", "integer", "string", "text", "timestamp")
NAMES = [f"column_{index}" for index in range(6)]
CALENDAR = st.integers(-62_000_000_000, 253_000_000_000)
"""Epoch seconds from the year 5 to the year 9987."""
VALUES = {
    "number": st.floats(-(2.0**127), 2.0**127, width=32),
    "integer": st.integers(-(2**63) + 1, 2**63 - 1),
    "string": st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
    "text": st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
    "timestamp": CALENDAR,
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TIMES = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=st.just(UTC))

TEXTS = st.datetimes().map(lambda moment: moment.isoformat(timespec="seconds"))
"""Times as clients write them."""


@st.composite
def schemas(draw):
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=len(NAMES)))
    columns = [
        Column(
            name,
            kind,
            required=draw(st.booleans()),
            low=draw(st.none() | st.integers(-9, 0)) if kind in ("number", "integer") else None,
            high=draw(st.none() | st.floats(1, 9)) if kind in ("number", "integer") else None,
            description=draw(st.text(max_size=9)),
            feature=draw(st.booleans()),
        )
        for name, kind in zip(NAMES, kinds, strict=False)
    ]
    return Schema(tuple(columns), event_time="at", target="y")


@st.composite
def filled(draw):
    """A schema without limits, and records of it with values missing here and there."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=len(NAMES)))
    schema = Schema(tuple(map(Column, NAMES, kinds)), event_time="at", target="y")
    record = st.fixed_dictionaries(
        {}, optional={column.name: st.none() | VALUES[column.kind] for column in schema.columns}
    )
    return schema, draw(st.lists(record, min_size=1, max_size=5))


@st.composite
def many(draw):
    """A schema, and as many records as are read a column at a time, all alike but for one field of one of them."""
    schema = draw(schemas())
    good = {column.name: VALUES[column.kind] for column in schema.columns}
    good |= {column.name: TEXTS for column in schema.columns if column.kind == "timestamp"}
    good |= {column.name: st.just(1) for column in schema.columns if column.low is not None or column.high is not None}
    fields = draw(st.sets(st.sampled_from(schema.names)))
    record = st.fixed_dictionaries({name: good[name] for name in schema.names if name in fields})
    records = draw(st.lists(record, min_size=9, max_size=12))
    odd, field = draw(st.sampled_from(records)), draw(st.sampled_from([*schema.names, *schema.names, "at", "other"]))
    kind = draw(st.sampled_from(("same", "dropped", "changed")))
    if kind == "dropped":
        odd.pop(field, None)
    elif kind == "changed":
        odd[field] = draw(st.sampled_from((None, MISSING_INTEGER, -11, 11, 1e300)) | ANYTHING)
    return schema, records


@given(filled())
def test_records_tensors_table_and_back(case):
    schema, records = case
    tensors = schema.parse(records)
    schema.check(tensors)
    table = schema.table(tensors)
    again = schema.tensors(table)
    for name in schema.names:
        assert tensors[name].dtype == again[name].dtype
        np.testing.assert_array_equal(tensors[name], again[name])
    assert schema.conform(table.append_column("at", [[0] * len(records)])).num_rows == len(records)


@given(many())
@settings(max_examples=300)
def test_many_records_are_what_each_is_alone(case):
    schema, records = case
    try:
        alone = [schema.parse([record]) for record in records]
    except SchemaError:
        with pytest.raises(SchemaError):
            schema.parse(records)
        return
    together = schema.parse(records)
    for name in schema.names:
        np.testing.assert_array_equal(together[name], np.concatenate([tensors[name] for tensors in alone]))


@given(filled())
def test_missing_is_what_was_missing(case):
    schema, records = case
    table = schema.table(schema.parse(records))
    for column in schema.columns:
        given_values = [record.get(column.name) for record in records]
        assert [value is None for value in table.column(column.name).to_pylist()] == [
            value is None for value in given_values
        ]


@given(
    schemas(), st.lists(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), ANYTHING, max_size=4), max_size=3)
)
@settings(max_examples=200)
def test_any_json_gives_tensors_or_a_sentence(schema, records):
    """Never another exception: that would be a 500."""
    try:
        tensors = schema.parse(records)
    except SchemaError as error:
        assert str(error).endswith(".") and len(str(error)) < 1000
        assert error.row is None or 0 <= error.row < len(records)
        return
    schema.check(tensors)
    for column in schema.columns:
        values = tensors[column.name]
        assert values.shape == (len(records),)
        if column.kind == "number":
            assert not np.isinf(values).any()


@given(schemas())
def test_a_schema_survives_json(schema):
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


@given(st.lists(st.tuples(st.text(min_size=1), st.floats(-1e6, 1e6)), max_size=5, unique_by=lambda band: band[1]))
def test_bands_survive_json_and_cover_every_score(limits):
    ordered = sorted(limits, key=lambda band: -band[1])
    bands = Bands(tuple(Band(*band) for band in ordered), otherwise="rest" if limits else None)
    assert Bands.from_json(json.loads(json.dumps(bands.to_json()))) == bands
    scores = np.array([limit for _, limit in limits] + [-math.inf, math.inf, 0.0])
    for score, action in zip(scores, bands.actions(scores), strict=True):
        expected = next((name for name, limit in ordered if score > limit), bands.otherwise)
        assert action == expected


@given(
    TIMES, TIMES, TIMES, st.dictionaries(st.sampled_from(["records", "labels"]), st.integers(-1, 99)), st.integers(0, 9)
)
def test_references_survive_json(one, other, as_of, versions, rows):
    if one == other:
        return
    ref = DatasetRef("trips", Window(min(one, other), max(one, other)), as_of, versions, rows, "ab12")
    assert DatasetRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref


METRICS = st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3)


@given(st.integers(0, 9), METRICS, st.dictionaries(st.text(max_size=5), METRICS, max_size=2))
def test_evaluations_survive_json(rows, metrics, slices):
    found = Evaluation(rows, metrics, slices)
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found


@given(st.lists(CALENDAR, min_size=1, max_size=9))
def test_a_timestamp_tensor_is_never_taken_for_missing(seconds):
    schema = Schema((Column("at", "timestamp"),), event_time="at", target="y")
    assert schema.parse([{"at": second} for second in seconds])["at"].tolist() == seconds
    assert MISSING_INTEGER not in seconds
