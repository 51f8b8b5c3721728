"""What is kept of requests and answers of one form changes no answer, and does not grow with what clients send."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from serving.forms import LONGEST_HEAD, MOST_KEPT, VALUE, Kept, form_of
from serving.limits import JSON_LISTS
from serving.outcome import Outcome
from serving.tensors import decode_infer
from serving.wire import Refusal


def request(array, datatype="FP32", **more):
    """A body with one binary tensor, and the length of its JSON."""
    size = {"binary_data_size": array.nbytes}
    entry = {"name": "x", "datatype": datatype, "shape": list(array.shape), "parameters": size}
    head = orjson.dumps({"inputs": [entry], **more})
    return head + array.tobytes(), len(head)


@pytest.fixture
def fresh(identity_model):
    """A plain model y = x that has kept nothing yet."""

    def make(datatype):
        model = identity_model(datatype)
        model.heads.clear()
        model.frames.clear()
        model.forms.clear()
        return model

    return make


def ask(model, body, length):
    asked = decode_infer(body, model, length)
    return asked, asked.answer(Outcome(model, model.run(asked.rows.tensors), ["id"] * asked.rows.count, []).whole())


def test_the_second_request_of_a_form_has_its_own_values(fresh):
    model = fresh("FP32")
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    for seed in range(3):
        array = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
        asked, answer = ask(model, *request(array, outputs=outputs))
        np.testing.assert_array_equal(asked.rows.tensors["x"], array)
        assert answer.body.endswith(array.tobytes())
        assert (asked.rows.count, answer.rows, asked.tells_ids) == (2, 2, False)
    assert len(model.heads) == len(model.forms) == 1


@pytest.mark.parametrize("pad", range(4))
def test_a_tensor_may_begin_anywhere(fresh, pad):
    model, array = fresh("FP64"), np.array([[1.5, 2.5, 3.5]])
    for _ in range(2):
        asked, _ = ask(model, *request(array, "FP64", parameters={"p" * pad: False}))
        assert asked.rows.tensors["x"].flags.aligned
        np.testing.assert_array_equal(asked.rows.tensors["x"], array)
    assert len(model.heads) == 1


def test_a_known_form_with_other_bytes_behind_it_is_refused_as_before(fresh):
    model = fresh("FP32")
    body, length = request(np.ones((1, 3), np.float32))
    refusals = []
    for _ in range(2):
        for wrong in (body[:-1], body + b"\0\0\0\0"):
            with pytest.raises(Refusal) as refused:
                decode_infer(wrong, model, length)
            refusals.append((refused.value.status, str(refused.value)))
        ask(model, body, length)
    assert refusals[:2] == refusals[2:] and {status for status, _ in refusals} == {400}


def test_what_depends_on_values_is_read_each_time(fresh):
    model = fresh("BOOL")
    body, length = request(np.ones((1, 3), np.bool_), "BOOL")
    for _ in range(2):
        ask(model, body, length)
        with pytest.raises(Refusal, match="neither 0 nor 1"):
            decode_infer(body[:-1] + b"\2", model, length)
    assert not model.heads


def as_text(array, before="", after="", space=" "):
    data = orjson.dumps(array.ravel(), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    shape = list(array.shape)
    entry = f'{{"name":"x","datatype":"FP32","shape":{shape},"data":{space}{data}{after}}}'
    return f'{{{before}"inputs":[{entry}]}}'.encode()


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"space": ""},
        {"space": "\n\t "},
        {"before": '"parameters":{"data":[7]},'},
        {"before": '"parameters":{"]":"\\"data\\":["},'},
        {"after": ',"parameters":{"data":[1,[2]]}'},
    ],
)
def test_values_in_json_are_read_alone_where_the_rest_is_known(fresh, form):
    model = fresh("FP32")
    for seed in range(3):
        array = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
        asked, answer = ask(model, as_text(array, **form), None)
        np.testing.assert_array_equal(asked.rows.tensors["x"], array)
        assert orjson.loads(answer.body)["outputs"][0]["shape"] == [2, 3]
    assert len(model.frames) <= 1


def test_most_forms_of_json_are_kept(fresh):
    model, array = fresh("FP32"), np.ones((1, 3), np.float32)
    ask(model, as_text(array), None)
    ask(model, as_text(array, before='"parameters":{"binary_data_output":true},'), None)
    assert len(model.frames) == 2


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (b"[1,2]", "2 values"),
        (b"[1,2,3,4]", "4 values"),
        (b"[1,2,true]", "no FP32"),
        (b'[1,2,"3"]', "no FP32"),
        (b"[1,2,1e39]", "outside FP32"),
        (b"[1,2,3],[4]", "not JSON"),
        (b'[1,2,3],"data":[4,5]', "2 values"),
        (b"[1,2,", "not JSON"),
        (b"[[1],[2],[3]]", "nested otherwise"),
        (b"[" * 2000 + b"]" * 2000, "deeper"),
    ],
)
def test_wrong_values_in_a_known_form_are_refused_as_in_an_unknown_one(fresh, wrong, part):
    model, body = fresh("FP32"), as_text(np.array([[1, 2, 3]], np.float32), space="")
    bad = body.replace(b"[1.0,2.0,3.0]", wrong)
    assert bad != body
    ask(model, body, None)
    assert len(model.frames) == 1
    for _ in range(2):
        with pytest.raises(Refusal, match=part) as refused:
            decode_infer(bad, model)
        assert refused.value.status == 400
        model.frames.clear()


def test_null_and_nested_values_in_a_known_form(fresh):
    model, body = fresh("FP32"), as_text(np.array([[1, 2, 3]], np.float32), space="")
    ask(model, body, None)
    for text, expected in ((b"[null,2,3]", [np.nan, 2, 3]), (b"[[4,5,6]]", [4, 5, 6])):
        asked, _ = ask(model, body.replace(b"[1.0,2.0,3.0]", text), None)
        np.testing.assert_array_equal(asked.rows.tensors["x"], [expected])


def test_strings_are_read_as_a_whole(fresh):
    model = fresh("BYTES")
    for text in (["a", "b", "c"], ["]", "[", ']}],"x":["']):
        entry = {"name": "x", "datatype": "BYTES", "shape": [1, 3], "data": text}
        asked, _ = ask(model, orjson.dumps({"inputs": [entry]}), None)
        assert asked.rows.tensors["x"].tolist() == [text]
    assert not model.frames


def test_ids_differ_in_answers_of_one_form(fresh):
    model, array = fresh("FP32"), np.ones((1, 3), np.float32)
    for name in ('a"b', "%b", "\0", "é"):
        _, answer = ask(model, *request(array, id=name))
        assert orjson.loads(answer.body)["id"] == name
    assert (len(model.heads), len(model.forms)) == (0, 1)


def test_what_clients_choose_is_bounded(fresh):
    model = fresh("FP32")
    for rows in range(1, MOST_KEPT + 10):
        ask(model, *request(np.ones((rows, 3), np.float32)))
    assert 0 < len(model.heads) <= MOST_KEPT and 0 < len(model.forms) <= MOST_KEPT
    before = len(model.heads)
    ask(model, *request(np.ones((1, 3), np.float32), parameters={"p" * LONGEST_HEAD: False}))
    assert len(model.heads) == before


def test_a_form_has_its_values_in_order_and_nothing_else_is_filled():
    form = form_of({"a": VALUE, "100%": "%b\0", "c": [VALUE]})
    assert orjson.loads(form % (b"1", b'"two"')) == {"a": 1, "100%": "%b\0", "c": ["two"]}


def test_a_full_one_begins_anew():
    kept = Kept()
    for number in range(MOST_KEPT + 1):
        assert kept.keep(number, -number) == -number
    assert list(kept.items()) == [(MOST_KEPT, -MOST_KEPT)]


def test_the_values_of_a_known_form_are_counted_before_they_are_read(fresh, monkeypatch):
    model = fresh("FP32")
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[%s]}]}'
    ask(model, body % b"1,2,3", None)
    assert len(model.frames) == 1
    monkeypatch.setattr("serving.forms.orjson.loads", None)
    with pytest.raises(Refusal, match="lists and objects") as refused:
        decode_infer(body % b",".join([b"[]"] * JSON_LISTS), model)
    assert refused.value.status == 413
