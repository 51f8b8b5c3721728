"""Batching: what one request does wrong, or does not wait for, never reaches the others of its batch."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import onnx
import orjson
import pytest
from onnx import TensorProto, helper

from serving import batch, batcher, binary, recorder
from serving.batch import Call
from serving.batcher import INLINE_SECONDS, Lane
from serving.capture import Log
from serving.commit import GroupCommit
from serving.config import Config
from serving.engine import Engine
from serving.entries import Entry
from serving.ids import Ids, expand
from serving.metrics import Metrics
from serving.model import SHARED_SECONDS, load
from serving.segment import read
from serving.seldom import Seldom
from serving.service import Request, Service
from serving.state import Desired


def save(folder, nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")


def floats(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`double` takes [n, 2]; `picky` fails where its index is not 0 or 1; `wide` takes any width; `fixed` no batch.
    `nonzero` answers where its rows are not 0, `small` those values that are not above 5, `columns` those with a 1."""
    root = tmp_path_factory.mktemp("models")
    save(root / "double", [helper.make_node("Add", ["x", "x"], ["y"])], [floats("x", "n", 2)], [floats("y", "n", 2)])
    index = helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])
    table = helper.make_node("Constant", [], ["t"], value=helper.make_tensor("t", TensorProto.FLOAT, [2], [5, 6]))
    save(root / "picky", [table, helper.make_node("Gather", ["t", "i"], ["y"])], [index], [floats("y", "n")])
    save(root / "wide", [helper.make_node("Neg", ["x"], ["y"])], [floats("x", "n", "w")], [floats("y", "n", "w")])
    save(root / "fixed", [helper.make_node("Neg", ["x"], ["y"])], [floats("x", 3)], [floats("y", 3)])
    found = helper.make_tensor_value_info("y", TensorProto.INT64, ["k", 2])
    nodes = [helper.make_node("NonZero", ["x"], ["t"]), helper.make_node("Transpose", ["t"], ["y"])]
    save(root / "nonzero", nodes, [floats("x", "n", 3)], [found])
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.INT32),
        helper.make_node("Constant", [], ["first"], value_ints=[0]),
        helper.make_node("ReduceMax", ["b", "first"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["kept"], to=TensorProto.BOOL),
        helper.make_node("Compress", ["x", "kept"], ["y"], axis=1),
    ]
    save(root / "columns", nodes, [floats("x", "n", 3)], [floats("y", "n", "k")])
    save(root / "small", keeps(5.0), [floats("x", "n")], [floats("y", "n")])
    return root


def keeps(most):
    """What leaves out the values of x that are above `most`."""
    return [
        helper.make_node("Constant", [], ["most"], value=helper.make_tensor("most", TensorProto.FLOAT, [], [most])),
        helper.make_node("LessOrEqual", ["x", "most"], ["kept"]),
        helper.make_node("Compress", ["x", "kept"], ["y"], axis=0),
    ]


@pytest.fixture
def service(models, tmp_path):
    engine = Engine("cpu")
    for path in models.iterdir():
        assert engine.take(Desired(path.name, 1, str(path), "a", plain=True)).status == "serving"
    return Service(engine, Log(tmp_path / "log", "one"), Metrics(), Ids(b"k" * 32, 1), config=Config())


def body(name, datatype, shape, data):
    return orjson.dumps({"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]})


def at_once(service, model, bodies, before=None):
    """What each of the requests is answered that arrive in one tick of the loop."""

    async def ask():
        found: list = [None] * len(bodies)
        for number, content in enumerate(bodies):

            def reply(answer, number=number):
                assert found[number] is None, "answered twice"
                found[number] = answer

            call = service.accept(Request("infer", model, content), reply)
            if before is not None:
                before(number, call)
        for _ in range(200):
            await asyncio.sleep(0.001)
            if all(one is not None for one in found):
                break
        return [(one.status, orjson.loads(one.body)) if one else None for one in found]

    return asyncio.run(ask())


def outputs(answer):
    assert answer[0] == 200, answer
    return answer[1]["outputs"][0]["data"]


def runs(service, model):
    service.records.flush()
    counted = service.metrics.numbers()["noria_model_run_duration_seconds"][model, "1"]
    return sum(counted[:-1])


def test_requests_of_one_tick_share_a_run_and_get_their_own_rows(service):
    bodies = [body("x", "FP32", [rows, 2], np.arange(rows * 2).tolist()) for rows in (1, 3, 2)]
    answers = at_once(service, "double", bodies)
    assert [outputs(one) for one in answers] == [(np.arange(rows * 2) * 2).tolist() for rows in (1, 3, 2)]
    assert runs(service, "double") == 1


def test_a_cancelled_request_does_not_strand_its_batch_mates(service):
    def leave(number, call):
        call.gone = number == 1

    answers = at_once(service, "double", [body("x", "FP32", [1, 2], [number, 0]) for number in range(3)], leave)
    assert answers[1] is None
    assert [outputs(answers[number]) for number in (0, 2)] == [[0, 0], [4, 0]]
    assert outputs(at_once(service, "double", [body("x", "FP32", [1, 2], [9, 0])])[0]) == [18, 0]


def test_a_malformed_request_fails_alone(service):
    good = body("x", "FP32", [1, 2], [1, 2])
    bad = [b"{", b"", body("x", "FP32", [1, 2], ["a", 1]), body("x", "INT64", [1, 2], [1, 1])]
    answers = at_once(service, "double", [good, *bad, good])
    assert [one[0] for one in answers] == [200, 400, 400, 400, 400, 200]
    assert outputs(answers[0]) == outputs(answers[-1]) == [2, 4]


def test_an_answer_that_cannot_be_encoded_fails_alone(service, caplog):
    class Broken:
        tells_ids = False

        def __init__(self, asked):
            self.rows = asked.rows

        def answer(self, scored):
            raise ZeroDivisionError

    def spoil(number, call):
        if number == 0:
            decode = call.decode
            call.decode = lambda model: Broken(decode(model))

    answers = at_once(service, "double", [body("x", "FP32", [1, 2], [1, 2])] * 3, spoil)
    assert [one[0] for one in answers] == [500, 200, 200]
    assert "ZeroDivisionError" in caplog.text


def test_a_request_that_the_model_cannot_run_fails_alone(service):
    answers = at_once(service, "picky", [body("i", "INT64", [1], [number]) for number in (0, 7, 1)])
    assert [one[0] for one in answers] == [200, 400, 200]
    assert [outputs(answers[number]) for number in (0, 2)] == [[5], [6]]
    assert "does not run on these values" in answers[1][1]["error"]


def test_values_that_a_model_does_not_run_on_fill_no_log(service, caplog, monkeypatch):
    monkeypatch.setattr(batch, "FAILED_RUNS", Seldom())
    answers = at_once(service, "picky", [body("i", "INT64", [1], [7])] * 20)
    assert [one[0] for one in answers] == [400] * 20
    assert caplog.text.count("picky version 1 does not run") == 1


def test_shapes_that_differ_do_not_meet(service):
    answers = at_once(service, "wide", [body("x", "FP32", [1, width], [1] * width) for width in (2, 3, 2)])
    assert [outputs(one) for one in answers] == [[-1] * 2, [-1] * 3, [-1] * 2]
    assert runs(service, "wide") == 2
    answers = at_once(service, "fixed", [body("x", "FP32", [3], [1, 2, 3])] * 2)
    assert [outputs(one) for one in answers] == [[-1, -2, -3]] * 2


def test_where_values_decide_how_many_rows_come_out_each_request_has_its_own(service):
    values = [np.float32(np.arange(rows * 3).reshape(rows, 3) % 4 > 1) for rows in (1, 2, 5, 3, 1100)]
    values += [np.zeros((2, 3), np.float32), np.ones((1, 3), np.float32)]
    bodies = [body("x", "FP32", x.shape, x.ravel().tolist()) for x in values]
    for answers in (at_once(service, "nonzero", bodies), [at_once(service, "nonzero", [one])[0] for one in bodies]):
        for x, answer in zip(values, answers, strict=True):
            assert outputs(answer) == np.argwhere(x).ravel().tolist()
            assert answer[1]["outputs"][0]["shape"] == list(np.argwhere(x).shape)


@pytest.mark.parametrize("most", [0.0, 0.5, -1.0])
def test_where_rows_go_is_seen_before_a_model_answers(tmp_path, most):
    save(tmp_path / "m", keeps(most), [floats("x", "n")], [floats("y", "n")])
    model = load("m", 1, tmp_path / "m", "cpu", plain=True)
    assert (model.batched, model.sizes) == (False, (1,))


def test_where_only_some_values_leave_rows_out_nobody_gets_those_of_others(service):
    assert service.engine.models["small"].batched, "nothing shows it while it is warmed"
    values = [[1, 9], [9], [2, 3], [7, 4, 8], [9, 9, 9], [0]]
    kept = [[one for one in x if one <= 5] for x in values]
    bodies = [body("x", "FP32", [len(x)], x) for x in values]
    answers = at_once(service, "small", bodies)
    assert [outputs(one) for one in answers] == kept
    assert [one[1]["outputs"][0]["shape"] for one in answers] == [[len(x)] for x in kept]
    in_bytes = [orjson.dumps({**orjson.loads(one), "parameters": {"binary_data_output": True}}) for one in bodies]
    found: list = []

    async def ask():
        for one in in_bytes:
            service.accept(Request("infer", "small", one), found.append)
        while len(found) < len(in_bytes):
            await asyncio.sleep(0.001)

    asyncio.run(ask())
    heads = [int(dict(one.headers)[binary.HEADER]) for one in found]
    tails = [np.frombuffer(one.body[head:], "<f4").tolist() for one, head in zip(found, heads, strict=True)]
    assert tails == kept
    long = np.arange(3000) % 7
    (alone,) = at_once(service, "small", [body("x", "FP32", [3000], long.tolist())])
    assert outputs(alone) == long[long <= 5].tolist()


@pytest.mark.parametrize("name", ["small", "nonzero", "columns"])
def test_rows_that_come_out_in_other_shapes_are_logged_as_they_were_answered(service, name, monkeypatch):
    monkeypatch.setattr(recorder, "FLUSH_SECONDS", 1.0)  # so that they would share a line
    monkeypatch.setattr(batcher, "INLINE_SECONDS", 60)
    if name == "small":  # a request that nothing is left out of has a row for each value
        sent, shape = [[1, 9], [2, 3], [9, 3, 4], [0]], lambda x: [len(x)]
        expected = [([0], [0]), ([1, 9], [1]), ([2], [2]), ([3], [3]), ([9, 3, 4], [3, 4])]
    elif name == "columns":
        sent, shape = [[0, 1, 0], [0, 1, 1], [1, 1, 1]], lambda x: [1, 3]
        expected = [(x, [one for one in x if one]) for x in sent]
    else:
        sent, shape = [[0, 1, 0], [1, 1, 1, 0, 1, 1]], lambda x: [len(x) // 3, 3]
        expected = [(x, np.argwhere(np.reshape(x, (-1, 3))).ravel().tolist()) for x in sent]

    async def ask():
        found: list = []
        for x in sent:
            service.accept(Request("infer", name, body("x", "FP32", shape(x), x)), found.append)
            for _ in range(3):  # a tick each
                await asyncio.sleep(0)
        service.records.flush()

    asyncio.run(ask())
    service.log.rotate()
    (path,) = service.log.ready_folder.iterdir()
    rows = read(path.read_bytes())[0]["predictions"].to_pylist()
    assert sorted((row["input_x"], row["output_y"]) for row in rows) == expected


@pytest.mark.parametrize("name", ["double", "wide"], ids=["rows alike", "rows of several widths"])
def test_runs_of_a_few_milliseconds_are_logged_together_and_in_full(service, name, monkeypatch):
    monkeypatch.setattr(recorder, "FLUSH_SECONDS", 1.0)  # a busy machine takes longer than the usual two milliseconds
    monkeypatch.setattr(batcher, "INLINE_SECONDS", 60)  # and would run them in the thread, which logs at once
    widths = (2, 2, 2) if name == "double" else (2, 3, 2)

    async def ask():
        answers = []
        for number, width in enumerate(widths):
            content = body("x", "FP32", [1, width], [number] * width)
            service.accept(Request("infer", name, content), answers.append)
            for _ in range(3):  # a tick each: three runs
                await asyncio.sleep(0)
        assert service.log.pending() == {}
        while not service.log.pending():
            await asyncio.sleep(0.001)
        return answers

    assert [answer.status for answer in asyncio.run(ask())] == [200] * 3
    assert service.log.pending() == {name: (3, 1)}
    service.log.rotate()
    (path,) = service.log.ready_folder.iterdir()
    rows = read(path.read_bytes())[0]["predictions"].to_pylist()
    assert len({row["prediction_id"] for row in rows}) == 3
    assert [row["input_x"] for row in rows] == [[number] * width for number, width in enumerate(widths)]


def test_batches_keep_within_the_proven_rows(service):
    most = service.engine.models["double"].most_rows
    part = body("x", "FP32", [most - 1, 2], [0.5] * (2 * most - 2))
    answers = at_once(service, "double", [part, body("x", "FP32", [2, 2], [1] * 4), part])
    assert [len(outputs(one)) for one in answers] == [2 * most - 2, 4, 2 * most - 2]
    service.records.flush()
    counted = service.metrics.numbers()["noria_batch_rows"]["double",]
    assert counted[-1] == 2 * most  # rows of all runs
    (alone,) = at_once(service, "double", [body("x", "FP32", [5 * most, 2], [1] * (10 * most))])
    assert outputs(alone) == [2] * (10 * most)


def test_a_deadline_that_has_passed_is_said_before_the_run(service):
    def late(number, call):
        call.deadline = time.perf_counter() - 1 if number == 0 else time.perf_counter() + 60

    answers = at_once(service, "double", [body("x", "FP32", [1, 2], [1, 2])] * 2, late)
    assert [one[0] for one in answers] == [504, 200]
    assert "deadline" in answers[0][1]["error"]


def test_requests_share_no_longer_run_than_is_worth_it(service):
    model = replace(service.engine.models["double"], sizes=(1, 1000), seconds=(0.0, SHARED_SECONDS * 500))
    assert model.shared_rows == 2
    service.engine.models["double"] = model
    answers = at_once(service, "double", [body("x", "FP32", [1, 2], [number, 2]) for number in range(6)])
    assert [outputs(answer)[0] for answer in answers] == [0, 2, 4, 6, 8, 10]
    assert runs(service, "double") == 3


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(service):
    service.batcher.most_waiting = 3
    answers = at_once(service, "double", [body("x", "FP32", [1, 2], [1, 2])] * 5)
    assert [one[0] for one in answers] == [200, 200, 200, 503, 503]
    assert "waiting" in answers[-1][1]["error"]


def test_a_version_that_does_not_serve_is_unknown(service):
    async def ask():
        answers = []
        for version in (1, 2):
            request = Request("infer", "double", body("x", "FP32", [1, 2], [1, 2]), version=version)
            service.accept(request, answers.append)
        await asyncio.sleep(0.05)
        return [one.status for one in answers]

    assert asyncio.run(ask()) == [200, 404]


def test_long_batches_leave_the_loop(service):
    """The loop turns while the model runs, and what arrives meanwhile is answered with the next batch."""
    lane = service.batcher.lanes["double"] = Lane("double")
    content = body("x", "FP32", [1, 2], [1, 2])
    lane.seconds[len(content).bit_length()] = 1.0
    answers = at_once(service, "double", [content])
    assert outputs(answers[0]) == [2, 4]
    assert lane.seconds[len(content).bit_length()] < 1.0  # what it really took is what is expected next


def test_one_slow_batch_does_not_decide_the_next(service):
    lane, model = Lane("double"), service.engine.models["double"]
    lane.learn(100, 0.0001, 1)
    lane.learn(100, 5.0, 1)  # the machine was busy
    assert lane.expected(100, model, 1) <= INLINE_SECONDS
    for _ in range(60):
        lane.learn(100, 5.0, 1)
    assert lane.expected(100, model, 1) > INLINE_SECONDS
    assert lane.expected(50_000, model, 1) > model.expected(1)  # nothing is known of this size but the run


def test_a_batch_whose_clients_have_left_teaches_nothing(service):
    content = body("x", "FP32", [1, 2], [1, 2])
    at_once(service, "double", [content])
    lane = service.batcher.lanes["double"]
    lane.learn(len(content), 0.4, 1)
    known = lane.each, lane.longest, dict(lane.seconds)
    assert at_once(service, "double", [content], lambda _, call: setattr(call, "gone", True)) == [None]
    assert (lane.each, lane.longest, lane.seconds) == known


def test_a_request_that_would_wait_too_long_is_refused_at_once():
    lane = Lane("m")
    lane.learn(100, 0.02, 10)
    lane.queue.extend([None] * 150)
    assert not lane.late()  # 0.3 s, and batches of 0.02 s
    lane.queue.extend([None] * 50)
    assert lane.late()
    slow = Lane("slow")
    slow.learn(100, 2.0, 1)
    slow.queue.extend([None] * 10)
    assert not slow.late()  # a model that takes seconds may have some waiting


@pytest.mark.parametrize("ack", ["durable", "fast"])
def test_a_full_disk_answers_and_counts(service, monkeypatch, ack):
    """Where an id is a promise there is none."""
    monkeypatch.setattr(batcher, "INLINE_SECONDS", 60)  # a busy machine would run it in the thread, which logs at once
    service.batcher.recorder.durable = lambda _: ack == "durable"
    service.log.open_folder.rmdir()
    (answer,) = at_once(service, "double", [orjson.dumps({
        **orjson.loads(body("x", "FP32", [1, 2], [1, 2])), "outputs": [{"name": "y"}, {"name": "prediction_id"}],
    })])  # fmt: skip
    assert outputs(answer) == [2, 4]
    assert len(answer[1]["outputs"][1]["data"][0]) == (0 if ack == "durable" else 32)
    service.records.flush()
    assert service.log.lost == 1
    assert "cannot be written" in service.log.failure


def told(answer):
    """The ids of an answer."""
    assert answer[0] == 200
    return next(one["data"] for one in answer[1]["outputs"] if one["name"] == "prediction_id")


@pytest.mark.parametrize("name", ["double", "fixed"], ids=["one run", "a run each"])
def test_durable_answers_that_do_not_reach_the_disk_have_no_ids(service, name, unsyncable):
    """The model ran, so they are answered; but an id is a promise."""
    service.batcher.recorder.durable = lambda _: True
    shape = [1, 2] if name == "double" else [3]
    values = [[number] * max(shape) for number in range(2)]
    wanted = {"outputs": [{"name": "y"}, {"name": "prediction_id"}]}
    bodies = [orjson.dumps({**orjson.loads(body("x", "FP32", shape, each)), **wanted}) for each in values]
    before = at_once(service, name, bodies)
    unsyncable(service.log._segments[name])
    lost = at_once(service, name, bodies)
    assert [outputs(answer) for answer in lost] == [outputs(answer) for answer in before]
    assert [told(answer) for answer in lost] == [[""], [""]]
    assert service.log.lost == 2
    assert "does not reach the disk" in service.log.failure
    service.log.rotate()
    after = at_once(service, name, bodies)
    assert len({identity for answer in (*before, *after) for identity in told(answer)} - {""}) == 4
    assert (service.log.lost, service.log.failure) == (2, "")


def test_refusals_do_not_wait_for_the_disk(service, monkeypatch):
    syncs, sync = [], service.log.sync
    service.batcher.recorder.durable = lambda _: True
    monkeypatch.setattr(service.log, "sync", lambda: (syncs.append(1), sync())[1])
    wrong = body("x", "FP32", [1, 2], [1, 2, 3])
    assert [answer[0] for answer in at_once(service, "double", [wrong] * 2)] == [400, 400]
    assert not syncs
    assert at_once(service, "double", [body("x", "FP32", [1, 2], [1, 2])])[0][0] == 200
    assert syncs


def test_who_waits_for_the_disk_hears_how_it_went_whoever_synced_and_whatever_the_others_do(
    tmp_path, caplog, unsyncable
):
    log = Log(tmp_path / "log", "one")
    commit = GroupCommit(log, lambda _: None)
    heard: list = []

    def label():
        before = log.failures
        assert log.labels("trips", ["a"], [1.0], np.array([1]))
        return before

    async def wait():
        heard.clear()
        commit.after(lambda safe: heard.append(safe) or 1 / 0, label())
        commit.after(heard.append, label())
        while len(heard) < 2:
            await asyncio.sleep(0.001)
        return list(heard)

    async def handed_over():
        before = label()
        unsyncable(log._segments["trips"])
        log.rotate()  # which is where the failure is met
        commit.after(heard.append, before)
        return await wait()

    assert asyncio.run(wait()) == [True, True]
    assert "ZeroDivisionError" in caplog.text
    assert asyncio.run(handed_over()) == [False, True, True]
    assert asyncio.run(wait()) == [True, True]
    commit.synced = lambda _: 1 / 0  # a fault of any other kind
    assert asyncio.run(wait()) == [False, False]


def test_a_fault_in_what_becomes_of_answers_strands_nobody(service, monkeypatch, caplog):
    def leave(number, call):
        if number == 0:
            call.reply = lambda answer: 1 / 0

    answers = at_once(service, "double", [body("x", "FP32", [1, 2], [1, 2])] * 3, leave)
    assert [answer and answer[0] for answer in answers] == [None, 200, 200]
    with monkeypatch.context() as broken:
        broken.setattr(service.metrics, "batch", lambda *_, **__: 1 / 0)
        assert outputs(at_once(service, "double", [body("x", "FP32", [1, 2], [1, 2])])[0]) == [2, 4]
    assert outputs(at_once(service, "double", [body("x", "FP32", [1, 2], [3, 4])])[0]) == [6, 8]
    assert caplog.text.count("ZeroDivisionError") == 2


def test_durable_answers_wait_for_the_disk_together(models, tmp_path):
    class Slow(Log):
        synced = 0

        def sync(self):
            time.sleep(0.05)
            super().sync()
            self.synced += 1

    engine = Engine("cpu")
    engine.take(Desired("double", 1, str(models / "double"), "a", plain=True))
    log = Slow(tmp_path / "log", "one")
    service = Service(engine, log, Metrics(), Ids(b"k" * 32, 1), config=Config(acks={"double": "durable"}))
    at: list[int] = []

    async def ask():
        def reply(_):
            at.append(log.synced)

        for _ in range(3):
            service.accept(Request("infer", "double", body("x", "FP32", [1, 2], [1, 2])), reply)
        await asyncio.sleep(0.02)  # the first sync runs
        for _ in range(3):
            service.accept(Request("infer", "double", body("x", "FP32", [1, 2], [1, 2])), reply)
        await asyncio.sleep(0.3)

    asyncio.run(ask())
    assert at == [1, 1, 1, 2, 2, 2]
    *counts, seconds = service.metrics.numbers()["noria_request_duration_seconds"]["infer", "double"]
    assert sum(counts) == 6 and seconds > 6 * 0.05, "who waits for the disk is counted with that"


def test_ask_gives_an_answer_and_can_be_cancelled(service):
    async def ask():
        def call():
            content = body("x", "FP32", [1, 2], [1, 2])
            made = service._call(Request("infer", "double", content), lambda _: None)
            assert isinstance(made, Call)
            return made

        dropped = call()
        task = asyncio.create_task(service.batcher.ask(dropped))
        await asyncio.sleep(0)
        task.cancel()
        answer = await service.batcher.ask(call())
        return answer.status, dropped.gone

    assert asyncio.run(ask()) == (200, True)


def test_ids_that_nobody_hears_are_as_good_as_the_others(service):
    entries = [Entry(0, rows, {}, {}, 0, [], 0.0) for rows in (10_000, 3, *[10_000] * 8, 1)]
    service.records._name(service.engine.models["double"], entries)
    names = [name for entry in entries for name in expand(entry.first, entry.rows)]
    assert len(set(names)) == len(names) == 90_004
    assert all(service.ids.genuine(name, "double") for name in names)
    assert len({name[:21] for name in names}) == 2  # batches


def test_answers_without_ids_are_logged_with_ids(service):
    at_once(service, "double", [body("x", "FP32", [2, 2], [1, 2, 3, 4]), body("x", "FP32", [1, 2], [5, 6])])
    service.records.flush()
    service.log.rotate()
    (path,) = service.log.ready_folder.iterdir()
    rows = read(path.read_bytes())[0]["predictions"]
    names = rows.column("prediction_id").to_pylist()
    assert len(set(names)) == 3 and all(service.ids.genuine(name, "double") for name in names)
    assert rows.column("input_x").to_pylist() == [[1, 2], [3, 4], [5, 6]]
