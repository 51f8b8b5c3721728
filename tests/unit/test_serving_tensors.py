"""v2 requests for plain models and their answers: every datatype, as JSON and as bytes, right and wrong."""

from __future__ import annotations

import math

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serving import binary, rpc_infer
from serving.datatypes import NUMPY, to_bytes
from serving.messages import MESSAGES
from serving.openapi import plain_example
from serving.outcome import Outcome
from serving.tensors import decode_infer, elements
from serving.wire import Refusal

FLOATS = ("FP16", "FP32", "FP64")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


def tensors(datatype):
    """Arrays [n, 3] of a datatype."""
    shape = st.tuples(st.integers(1, 4), st.just(3))
    if datatype == "BYTES":
        return shape.flatmap(
            lambda size: st.lists(TEXT, min_size=3 * size[0], max_size=3 * size[0]).map(
                lambda values: np.array(values, np.object_).reshape(size)
            )
        )
    return arrays.arrays(NUMPY[datatype], shape)


def as_json(name, datatype, array, nested=False, **more):
    flat = array if nested else array.ravel()
    data = [None if isinstance(one, float) and math.isnan(one) else one for one in flat.tolist()]
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data, **more}


def as_bytes(inputs, **more):
    """A body, and the length of its JSON."""
    entries, chunks = [], []
    for name, datatype, shape, chunk in inputs:
        entries.append(
            {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(chunk)}}
        )
        chunks.append(chunk)
    head = orjson.dumps({"inputs": entries, **more})
    return head + b"".join(chunks), len(head)


def run(model, asked):
    """The answer as the server makes it."""
    ids = [f"{row:032x}" for row in range(asked.rows.count)]
    return asked.answer(Outcome(model, model.run(asked.rows.tensors), ids, []).whole())


def outputs_of(answer):
    """Outputs of an answer by name, read as a client reads them."""
    headers = dict(answer.headers)
    length = int(headers.get(binary.HEADER, len(answer.body)))
    tail = answer.body[length:]
    found = {}
    for output in orjson.loads(answer.body[:length])["outputs"]:
        if "data" in output:
            found[output["name"]] = np.array(output["data"], NUMPY[output["datatype"]]).reshape(output["shape"])
        else:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = binary.read("", output["datatype"], output["shape"], tail[:size])
            tail = tail[size:]
    assert not tail
    return found


@pytest.mark.parametrize("datatype", list(NUMPY))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])  # of FP16's own strategy
@given(data=st.data())
def test_every_datatype_comes_back_as_it_was_sent(identity_model, datatype, data):
    model = identity_model(datatype)
    array = data.draw(tensors(datatype))
    every_way = data.draw(st.booleans(), "bytes out")
    shape, more = list(array.shape), {"parameters": {"binary_data_output": every_way}}

    asked = decode_infer(*_swap(model, as_bytes([("x", datatype, shape, to_bytes(datatype, array))], **more)))
    np.testing.assert_array_equal(asked.rows.tensors["x"], array)
    assert asked.rows.tensors["x"].dtype == NUMPY[datatype]
    answer = run(model, asked)
    assert (answer.content_type == binary.CONTENT_TYPE) == every_way
    expected = array if every_way or datatype not in FLOATS else np.where(np.isinf(array), np.nan, array)
    np.testing.assert_array_equal(outputs_of(answer)["y"], expected)

    finite = array if datatype not in FLOATS else np.where(np.isinf(array), np.nan, array)
    nested = data.draw(st.booleans(), "nested")
    body = orjson.dumps({"inputs": [as_json("x", datatype, finite, nested)], **more})
    asked = decode_infer(body, model)
    np.testing.assert_array_equal(asked.rows.tensors["x"], finite)
    np.testing.assert_array_equal(outputs_of(run(model, asked))["y"], finite)


def _swap(model, sent):
    return sent[0], model, sent[1]


def test_ids_outputs_and_what_is_answered_by_default(identity_model):
    model = identity_model("FP32")
    tensor = as_json("x", "FP32", np.ones((2, 3), np.float32))
    answer = orjson.loads(run(model, decode_infer(orjson.dumps({"id": "q", "inputs": [tensor]}), model)).body)
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("q", "same", "1")
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2, 3], "data": [1.0] * 6}]
    asked = [{"name": "prediction_id"}, {"name": "y", "parameters": {"binary_data": True}}]
    body = orjson.dumps({"inputs": [tensor], "outputs": asked})
    answer = run(model, decode_infer(body, model))
    found = outputs_of(answer)
    assert list(found) == ["prediction_id", "y"]
    assert found["prediction_id"].tolist() == [f"{row:032x}" for row in range(2)]


def test_an_output_overrides_the_request(identity_model):
    model = identity_model("INT8")
    asked = {
        "inputs": [as_json("x", "INT8", np.ones((1, 3), np.int8))],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "y", "parameters": {"binary_data": False}}, {"name": "prediction_id"}],
    }
    answer = run(model, decode_infer(orjson.dumps(asked), model))
    length = int(dict(answer.headers)[binary.HEADER])
    outputs = orjson.loads(answer.body[:length])["outputs"]
    assert ["data" in output for output in outputs] == [True, False]
    assert answer.body[length:] == (32).to_bytes(4, "little") + b"0" * 32


def test_a_workload_answers_in_bytes_too(trips_model):
    sent = [
        ("pickup", "INT64", [2], np.array([60, 120]).tobytes()),
        ("vendor", "BYTES", [2, 1], to_bytes("BYTES", ["A", ""])),
        ("distance", "FP64", [2], np.array([1.5, np.nan]).tobytes()),
        ("zone", "UINT8", [2], b"\1\2"),
    ]
    body, length = as_bytes(sent, outputs=[{"name": "score", "parameters": {"binary_data": True}}, {"name": "action"}])
    asked = decode_infer(body, trips_model, length)
    assert asked.rows.tensors["zone"].dtype == np.int64
    assert asked.rows.tensors["distance"].dtype == np.float32
    assert asked.rows.times.tolist() == [60_000_000, 120_000_000]
    scored = Outcome(trips_model, trips_model.run(asked.rows.tensors), ["a", "b"], ["short", None]).whole()
    found = outputs_of(asked.answer(scored))
    np.testing.assert_array_equal(found["score"], scored.scores())
    assert found["action"].tolist() == ["short", ""]
    default = orjson.loads(decode_infer(*_swap(trips_model, as_bytes(sent))).answer(scored).body)
    assert [output["name"] for output in default["outputs"]] == ["score", "action", "prediction_id"]


def one(data, datatype="FP32", shape=(1, 3), **more):
    tensor = {"name": "x", "datatype": datatype, "shape": list(shape), "data": data, **more}
    return {"inputs": [tensor]}


GOOD = one([1, 2, 3])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([], "inference request"),
        ({"inputs": 3}, "inference request"),
        ({"inputs": [3]}, "object with name"),
        ({"inputs": []}, "'x' is missing"),
        ({**GOOD, "id": 3}, "'id' must be a string"),
        ({"inputs": GOOD["inputs"] * 2}, "twice"),
        ({"inputs": [*GOOD["inputs"], {**GOOD["inputs"][0], "name": "z"}]}, "no input 'z'"),
        (one([1, 2, 3], "INT32"), "the model takes FP32"),
        (one([1, 2, 3], "BF16"), "the model takes FP32"),
        (one([1, 2, 3], 7), "object with name"),
        (one([1, 2, 3], shape=(3,)), r"shape \[3\]"),
        (one([1, 2, 3, 4], shape=(1, 4)), r"shape \[1, 4\]"),
        (one([1, 2], shape=(1, 3)), "2 values and the shape says 3"),
        (one([], shape=(0, 3)), "no rows"),
        (one([1, 2, 3], shape=(-1, 3)), "wrong shape"),
        (one([1, 2, 3], shape=(True, 3)), "wrong shape"),
        (one([1, 2, 3], shape=("1", 3)), "wrong shape"),
        (one([1, 2, 3], shape=(1.0, 3)), "wrong shape"),
        (one([], shape=(0, 10**15)), "is empty; the other numbers of its shape"),
        (one([1], shape=[1] * 1000), "1000 dimensions"),
        (one([[1, 2], [3]], shape=(1, 3)), "nested otherwise"),
        (one([[1, 2, 3]], shape=(3,)), "nested otherwise|values|shape"),
        (one([1, "2", 3]), "no FP32"),
        (one([1, True, 3]), "no FP32"),
        (one([1, [2], 3]), "no FP32"),
        (one([1, 2, 1e39]), "outside FP32"),
        (one(None), "no data"),
        (one("123"), "no data"),
        ({**GOOD, "outputs": 3}, "'outputs' must be"),
        ({**GOOD, "outputs": [{"name": "z"}]}, "no output 'z'; there are: y, prediction_id"),
        ({**GOOD, "outputs": [{"name": "y"}, {"name": "y"}]}, "twice"),
        ({**GOOD, "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({**GOOD, "outputs": [{"name": "y", "parameters": {"classification": 2}}]}, "classification"),
        ({**GOOD, "outputs": ["y"]}, "object with a name"),
        ({**GOOD, "parameters": 3}, "'parameters' must be"),
        (one([1, 2, 3], parameters={"binary_data_size": 12}), "both data and binary"),
        (one(None, parameters={"binary_data_size": 12}), "add the header"),
        (one(None, parameters={"shared_memory_region": "a"}), "shared memory"),
        (one([1, 2, 3], parameters=3), "parameters of the input 'x'"),
    ],
)
def test_refusals(identity_model, content, part):
    with pytest.raises(Refusal, match=part) as caught:
        decode_infer(orjson.dumps(content), identity_model("FP32"))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", [1, 0, 1]),
        ("BYTES", ["a", None, "b"]),
        ("BYTES", ["a", 1, "b"]),
        ("INT8", [1, 2, 128]),
        ("UINT8", [1, 2, -1]),
        ("INT64", [1, 2, 2**63]),
        ("UINT64", [1, 2, -1]),
        ("INT32", [1, 2, 2.0]),
        ("INT32", [1, 2, None]),
        ("FP16", [1, 2, 1e5]),
    ],
)
def test_values_that_are_not_of_the_datatype(identity_model, datatype, values):
    with pytest.raises(Refusal, match=f"no {datatype}|outside {datatype}") as caught:
        decode_infer(orjson.dumps(one(values, datatype)), identity_model(datatype))
    assert caught.value.status == 400


def test_too_many_rows(identity_model):
    with pytest.raises(Refusal, match="at most 10000") as caught:
        decode_infer(orjson.dumps(one([0] * 30_003, shape=(10_001, 3))), identity_model("FP32"))
    assert caught.value.status == 413


def test_a_model_that_takes_one_shape_is_one_row(identity_model):
    model = identity_model("FP64", (2, 3))
    asked = decode_infer(orjson.dumps(one([1, 2, 3, 4, 5, 6], "FP64", (2, 3))), model)
    assert asked.rows.count == 1
    assert outputs_of(run(model, asked))["y"].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(Refusal, match="the model takes"):
        decode_infer(orjson.dumps(one([1, 2, 3], "FP64", (1, 3))), model)


def test_scalars_and_empty_tensors(identity_model):
    model = identity_model("INT32", ())
    asked = decode_infer(orjson.dumps(one([7], "INT32", ())), model)
    assert outputs_of(run(model, asked))["y"].tolist() == 7
    model = identity_model("FP32", (-1, -1))
    for body, length in ((orjson.dumps(one([], shape=(2, 0))), None), as_bytes([("x", "FP32", [2, 0], b"")])):
        assert decode_infer(body, model, length).rows.tensors["x"].shape == (2, 0)


@pytest.mark.parametrize("shape", [(1000, 0, 65536), (2, 0, 32769), (0, 2**62, 2**62), (1000, 0, 0, 66)])
def test_what_an_empty_tensor_may_become_is_bounded(identity_model, shape):
    assert elements("x", [2, 0, 32768, 0]) == 0
    model = identity_model("FP32", (-1,) * len(shape))
    bodies = [(orjson.dumps(one([], shape=shape)), None), as_bytes([("x", "FP32", list(shape), b"")])]
    for body, length in bodies:
        with pytest.raises(Refusal, match="is empty; the other numbers of its shape may make 65536 at most") as caught:
            decode_infer(body, model, length)
        assert caught.value.status == 400
    request = rpc_infer.MESSAGES["ModelInferRequest"]()
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    with pytest.raises(Refusal, match="is empty"):
        rpc_infer.decode_infer(request, model)


@pytest.mark.parametrize("datatype", list(NUMPY))
def test_the_documented_example_of_a_plain_model_is_answered(identity_model, datatype):
    for shape in ((-1, 3), (2, 3), (-1, -1), ()):
        model = identity_model(datatype, shape)
        answer = run(model, decode_infer(orjson.dumps(plain_example(model)), model))
        assert "y" in outputs_of(answer)


def columns_of(count, **columns):
    """A request of a workload that requires `pickup`; each column a datatype and its values."""
    sent = {"pickup": ("INT64", [60] * count), **columns}
    inputs = [
        {"name": name, "datatype": datatype, "shape": [count], "data": data} for name, (datatype, data) in sent.items()
    ]
    return orjson.dumps({"inputs": inputs})


@pytest.mark.parametrize("many", [1, 20])
@pytest.mark.parametrize(
    ("name", "datatype", "value"),
    [
        ("distance", "INT8", 128), ("distance", "UINT8", -1), ("distance", "INT64", 2.5), ("distance", "INT64", 2.0),
        ("distance", "INT64", 2**63), ("distance", "UINT64", -1), ("distance", "FP16", 65520),
        ("zone", "INT64", 2.0), ("zone", "INT16", 2**15), ("zone", "UINT8", 256), ("zone", "INT32", "1"),
        ("pickup", "INT64", "2020-03-15T08:30:00"), ("pickup", "BYTES", 1584261000), ("pickup", "BYTES", 0),
        ("pickup", "BYTES", False),
    ],
)  # fmt: skip
def test_a_workload_too_takes_values_of_the_stated_datatype_only(trips_model, name, datatype, value, many):
    good = {"INT": 1, "UIN": 1, "FP1": 0.5, "BYT": "2020-03-15"}[datatype[:3]]
    data = [good] * many + [None] * (name != "pickup") + [value]
    sentence = f"Row {len(data) - 1}: '{name}' is .*, which is no {datatype}"
    with pytest.raises(Refusal, match=sentence) as caught:
        decode_infer(columns_of(len(data), **{name: (datatype, data)}), trips_model)
    assert caught.value.status == 400


@pytest.mark.parametrize("many", [1, 20])
def test_a_workload_gets_the_same_from_values_as_from_bytes(trips_model, many):
    for datatype, values in (
        ("INT8", [100, None, 0]), ("UINT8", [0, 100, 7]), ("INT64", [1, None, 2]), ("UINT64", [5, 6, None]),
        ("FP16", [0.1, None, 1]), ("FP32", [0.1, None, 7]), ("FP64", [0.1, None, 1e-300]),
    ):  # fmt: skip
        data = values * many
        rows = decode_infer(columns_of(len(data), distance=(datatype, data)), trips_model).rows
        expected = [math.nan if value is None else float(NUMPY[datatype](value)) for value in data]
        np.testing.assert_array_equal(rows.tensors["distance"], np.array(expected, np.float32), datatype)
    times = ["1970-01-01T00:01:00", "1970-01-01T00:01:00Z"] * many
    assert set(decode_infer(columns_of(len(times), pickup=("BYTES", times)), trips_model).rows.times) == {60_000_000}
    with pytest.raises(Refusal, match=r"Row 0 has no 'pickup'|Row 0: 'pickup' is missing"):
        decode_infer(columns_of(many, pickup=("BYTES", [""] * many)), trips_model)


def test_typed_contents_of_a_workload_are_within_their_type(trips_model):
    inputs = [
        {"name": "pickup", "datatype": "INT64", "shape": [1], "contents": {"int64_contents": [60]}},
        {"name": "distance", "datatype": "INT8", "shape": [1], "contents": {"int_contents": [128]}},
    ]
    with pytest.raises(Refusal, match="'distance' is 128, which is no INT8"):
        rpc_infer.decode_infer(MESSAGES["ModelInferRequest"](inputs=inputs), trips_model)
    inputs[1]["contents"] = {"int_contents": [100]}
    rows = rpc_infer.decode_infer(MESSAGES["ModelInferRequest"](inputs=inputs), trips_model).rows
    assert rows.tensors["distance"].tolist() == [100.0]
