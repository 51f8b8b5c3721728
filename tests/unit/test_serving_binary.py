"""The bytes behind the JSON: whatever is cut, claimed or overlaps is a refusal, and takes no memory."""

from __future__ import annotations

import json
import resource

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import binary
from serving.datatypes import NUMPY, to_bytes
from serving.tensors import decode_infer
from serving.wire import Refusal

SIZES = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, 2**64, -(2**63), True, None, 1.5, "12", []]),
)
DIMENSIONS = st.one_of(st.integers(-1, 5), st.sampled_from([2**31, 2**40, 2**62, 10**18, True, "3", None]))
PARAMETERS = st.one_of(st.fixed_dictionaries({"binary_data_size": SIZES}), st.just({}), st.sampled_from([None, 3, []]))
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "distance", "vendor", "pickup", "zone"]),
        "datatype": st.sampled_from([*NUMPY, "BF16"]),
    },
    optional={
        "shape": st.lists(DIMENSIONS, max_size=4),
        "parameters": PARAMETERS,
        "data": st.one_of(st.lists(st.integers(0, 3) | st.none(), max_size=6), st.just(4)),
    },
)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(TENSORS, max_size=3),
    st.binary(max_size=48),
    st.one_of(st.none(), st.integers(-3, 3)),
    st.sampled_from([*NUMPY, "trips"]),
)
def test_any_framing_is_rows_or_a_refusal(identity_model, trips_model, entries, tail, shift, datatype):
    model = trips_model if datatype == "trips" else identity_model(datatype)
    head = json.dumps({"inputs": entries}).encode()  # orjson writes no number above 64 bits
    length = None if shift is None else len(head) + shift
    try:
        asked = decode_infer(head + tail, model, length)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert all(len(tensor) == asked.rows.count for tensor in asked.rows.tensors.values())


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(list(NUMPY)))
def test_a_cut_or_longer_body_is_refused(identity_model, data, datatype):
    model = identity_model(datatype)
    values = ["a", "longer", ""] if datatype == "BYTES" else np.ones((1, 3), NUMPY[datatype])
    chunk = to_bytes(datatype, values)
    entry = {"name": "x", "datatype": datatype, "shape": [1, 3], "parameters": {"binary_data_size": len(chunk)}}
    head = orjson.dumps({"inputs": [entry]})
    whole = head + chunk
    assert decode_infer(whole, model, len(head)).rows.count == 1
    cut = data.draw(st.integers(0, len(whole) - 1))
    for body in (whole[:cut], whole + b"\0" * (cut + 1)):
        with pytest.raises(Refusal) as caught:
            decode_infer(body, model, len(head))
        assert caught.value.status == 400


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 2**40))
def test_any_bytes_as_strings(data, count):
    try:
        found = binary.read("x", "BYTES", [count], data)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert to_bytes("BYTES", found) == data


@pytest.mark.parametrize(
    ("datatype", "shape", "chunk", "part"),
    [
        ("FP32", [1, 3], b"\0" * 11, "has 11 bytes; FP32 of the shape .* takes 12"),
        ("BOOL", [1, 3], b"\1\0\2", "neither 0 nor 1"),
        ("BYTES", [1, 3], b"\0\0\0\0", "too few"),
        ("BYTES", [1, 1], b"\5\0\0\0ab", "ends within string 0"),
        ("BYTES", [1, 1], b"\xff\xff\xff\xffab", "ends within string 0"),
        ("BYTES", [1, 1], b"\1\0\0\0ab", "1 bytes behind"),
        ("BYTES", [1, 1], b"\1\0\0\0\xff", "not UTF-8"),
        ("BF16", [1, 1], b"\0\0", "has the datatype BF16; there are"),
    ],
)
def test_sentences(datatype, shape, chunk, part):
    with pytest.raises(Refusal, match=part):
        binary.read("x", datatype, shape, chunk)


def test_giant_claims_take_no_memory(identity_model):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for datatype in NUMPY:
        shape = [2**40, 2**20]
        for size in (8, 2**60):
            entry = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
            head = orjson.dumps({"inputs": [entry]})
            with pytest.raises(Refusal):
                decode_infer(head + b"\0" * 8, identity_model(datatype, (-1, -1)), len(head))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_tensor_behind_json_of_any_length_is_aligned(identity_model):
    model = identity_model("FP64")
    for length in range(8):
        entry = {"name": "x", "datatype": "FP64", "shape": [1, 3], "parameters": {"binary_data_size": 24}}
        head = orjson.dumps({"id": "a" * length, "inputs": [entry]})
        tensor = decode_infer(head + np.arange(3.0).tobytes(), model, len(head)).rows.tensors["x"]
        assert tensor.flags.aligned
        assert tensor.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("value", [b"", b"-1", b"+5", b"1_0", b" 5", b"5.0", b"a", b"9" * 19, "٣".encode()])
def test_the_header_is_a_number(value):
    with pytest.raises(Refusal, match="must be a number"):
        binary.header_length(value)
    assert binary.header_length(b"120") == 120


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(NUMPY)), st.integers(0, 60), st.integers(1, 4), st.integers(0, 4))
def test_sizes_that_do_not_agree_with_the_shape_are_refused(identity_model, datatype, size, rows, wide):
    """The size is what lies there; whether it is the shape's is another question."""
    model = identity_model(datatype, (-1, -1))
    entry = {"name": "x", "datatype": datatype, "shape": [rows, wide], "parameters": {"binary_data_size": size}}
    head = orjson.dumps({"inputs": [entry]})
    width = 4 if datatype == "BYTES" else np.dtype(NUMPY[datatype]).itemsize  # zeros are empty strings
    if size == rows * wide * width:
        assert decode_infer(head + b"\0" * size, model, len(head)).rows.tensors["x"].shape == (rows, wide)
    else:
        with pytest.raises(Refusal) as caught:
            decode_infer(head + b"\0" * size, model, len(head))
        assert caught.value.status == 400
