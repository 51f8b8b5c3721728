"""gRPC as it is started, asked by tritonclient: keys, limits, deadlines, the repository, a swap under load.

Not here: tensors of every datatype (test_protocol_clients.py).
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import onnx
import psutil
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from serving import keys
from serving.messages import MESSAGES, METHODS

MIB = 2**20
SERVICE = "/inference.GRPCInferenceService/"
NUMBER, WHOLE = TensorProto.FLOAT, TensorProto.INT64
TURNS = 3000
"""A call of the model `busy` with so many takes half a second and more."""


def say(sentence):
    """For the report of a run (pytest -rP)."""
    sys.stdout.write(sentence + "\n")


def build(nodes, width, constants):
    """A graph x -> y, FP32 [n, width]."""
    x, y = (helper.make_tensor_value_info(name, NUMBER, ["n", width]) for name in "xy")
    graph = helper.make_graph(nodes, "plain", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def plus(number):
    """y = x + number, [n, 3]."""
    return build([helper.make_node("Add", ["x", "add"], ["y"])], 3, [helper.make_tensor("add", NUMBER, [], [number])])


def busy():
    """y = x, [n, 1], after as many turns of a third of a millisecond as the largest x says."""
    size = 256
    square = [helper.make_tensor_value_info(name, NUMBER, [size, size]) for name in ("held", "next")]
    turn = helper.make_tensor_value_info("turn", WHOLE, [])
    go, going = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "going"))
    body = helper.make_graph(
        [helper.make_node("MatMul", ["held", "one"], ["next"]), helper.make_node("Identity", ["go"], ["going"])],
        "turn", [turn, go, square[0]], [going, square[1]],
    )  # fmt: skip
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["turns"], to=WHOLE),
        helper.make_node("Loop", ["turns", "", "one"], ["last"], body=body),
        helper.make_node("ReduceMax", ["last"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    one = np.eye(size, dtype=np.float32)
    constants = [
        helper.make_tensor("one", NUMBER, [size, size], one.ravel()), helper.make_tensor("zero", NUMBER, [], [0.0])
    ]  # fmt: skip
    return build(nodes, 1, constants)


def rows(values, module=triton):
    """An input x of rows."""
    array = np.array(values, np.float32)
    sent = module.InferInput("x", list(array.shape), "FP32")
    sent.set_data_from_numpy(array)
    return [sent]


@pytest.fixture(scope="module")
def server(plain_server):
    """With a key for each role, and one that may ask three times a second."""
    roles = {name: (name, None) for name in keys.ROLES} | {"hasty": ("predict", 3.0)}
    models = {"steady": plus(1), "busy": busy(), "moving": plus(1), "spare": plus(5)}
    return plain_server(models, roles, NORIA_LIMIT_BODY_BYTES=str(MIB))


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture
def good(server):
    """Metadata of a client that may predict."""
    return server.headers["predict"]


def ask(client, model, values, headers, **more):
    """The answer's y, as lists."""
    return client.infer(model, rows(values), headers=headers, **more).as_numpy("y").tolist()


def code(call, *given, **more):
    """The status code that a call of tritonclient ends with."""
    with pytest.raises(triton.InferenceServerException) as caught:
        call(*given, **more)
    return caught.value.status().removeprefix("StatusCode.")


def scored(server):
    """Rows that the model `busy` was run on, as the server counts them."""
    text = httpx.get(f"{server.url}/metrics", headers=server.headers["operate"]).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(r'noria_rows_total{.*"busy"', line))


def aio(call):
    """Run a coroutine function with a client of tritonclient's aio; in a thread, for the browser's tests leave a loop
    in this one."""

    async def run(server):
        async with triton_aio.InferenceServerClient(server.grpc) as client:
            return await call(client)

    def go(server):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, run(server)).result()

    return go


# Keys and limits


def test_every_method_needs_its_role(server):
    """Without a key, with an unknown one, and with one of each role."""
    needed = {"ServerLive": None, "ServerReady": None}
    with grpc.insecure_channel(server.grpc) as channel:

        def ask_as(method, metadata):
            call = channel.unary_unary(SERVICE + method)
            try:
                call(b"", metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

        for method in METHODS:
            role = needed.get(method, "operate" if method.startswith("Repository") else "predict")
            outcomes = {
                "": ask_as(method, ()),
                "unknown": ask_as(method, (("authorization", "Bearer noria_" + "A" * 43),)),
            }
            for name in keys.ROLES:
                outcomes[name] = ask_as(method, tuple(server.headers[name].items()))
            for name, found in outcomes.items():
                if role is None or name == role:
                    assert found not in ("UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL", "UNKNOWN"), (method, name)
                else:
                    wanted = "PERMISSION_DENIED" if name in server.headers else "UNAUTHENTICATED"
                    assert found == wanted, (method, name, found)
        assert ask_as("ModelStreamInfer", tuple(server.headers["operate"].items())) == "UNIMPLEMENTED"
    lines = [json.loads(line) for line in (server.home / "audit.jsonl").read_text().splitlines()]
    refused = {
        (line["status"], line["path"]) for line in lines if line["event"] == "refused"
    }  # the first few of a flood
    assert {(401, f"{SERVICE}ModelReady"), (403, f"{SERVICE}ModelReady")} <= refused


def test_too_many_calls_of_a_key_are_refused_and_probes_never(server, client, good):
    found = []
    for _ in range(8):
        try:
            found.append(ask(client, "steady", [[1, 2, 3]], server.headers["hasty"]))
        except triton.InferenceServerException as error:
            assert "may ask 3 times a second" in error.message()
            found.append(error.status())
    assert found.count([[2, 3, 4]]) in (3, 4) and found.count("StatusCode.RESOURCE_EXHAUSTED") in (4, 5), found
    assert all(client.is_server_live() and client.is_server_ready() for _ in range(8))
    assert ask(client, "steady", [[1, 2, 3]], good) == [[2, 3, 4]]


def test_messages_that_are_too_large(server, client, good):
    """As they come, and as they become; the worker's memory stays."""
    (worker,) = server.workers()
    before = psutil.Process(worker).memory_info().rss
    assert code(ask, client, "steady", np.zeros((MIB // 12 + 1, 3)), good) == "RESOURCE_EXHAUSTED"
    bomb = np.zeros((32 * MIB // 12, 3))
    for algorithm in ("gzip", "deflate"):
        found = code(ask, client, "steady", bomb, good, compression_algorithm=algorithm)
        assert found == "RESOURCE_EXHAUSTED", algorithm
        assert ask(client, "steady", [[1, 2, 3]] * 100, good, compression_algorithm=algorithm) == [[2, 3, 4]] * 100
    assert code(ask, client, "steady", np.zeros((10_001, 3)), good) == "INVALID_ARGUMENT", "rows"
    grown = psutil.Process(worker).memory_info().rss - before
    say(f"grew by {grown / MIB:.1f} MiB")
    assert grown < 16 * MIB


def test_a_message_of_nothing_but_empty_tensors(server, good):
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(SERVICE + "ModelInfer")
        with pytest.raises(grpc.RpcError, match="more than 16,384 fields") as refused:
            call(b"\x2a\x00" * (MIB // 2), metadata=tuple(good.items()))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_refused_call_is_let_go(server, client, good):
    """A hundred messages of a megabyte, one after the other, that do not fit the model."""
    (worker,) = server.workers()
    wrong = np.zeros((1, MIB // 5))
    assert code(ask, client, "steady", wrong, good) == "INVALID_ARGUMENT"
    before = psutil.Process(worker).memory_info().rss
    for _ in range(100):
        assert code(ask, client, "steady", wrong, good) == "INVALID_ARGUMENT"
    grown = psutil.Process(worker).memory_info().rss - before
    say(f"grew by {grown / MIB:.1f} MiB")
    assert grown < 16 * MIB


def test_a_cancelled_call_is_let_go(server):
    """Messages of 120 kB, which their clients leave before and after the model has run."""
    (worker,) = server.workers()
    count = 10_000
    request = MESSAGES["ModelInferRequest"](model_name="steady", raw_input_contents=[bytes(count * 12)])
    request.inputs.add(name="x", datatype="FP32", shape=[count, 3])
    message, headers = request.SerializeToString(), tuple(server.headers["predict"].items())
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(SERVICE + "ModelInfer")

        def leave(times):
            for number in range(times):
                asked = call.future(message, metadata=headers)
                time.sleep(number % 10 / 1000)
                asked.cancel()
            time.sleep(0.5)
            return psutil.Process(worker).memory_info().rss

        before = leave(100)
        grown = leave(500) - before
    say(f"grew by {grown / MIB:.1f} MiB")
    assert grown < 16 * MIB


@pytest.mark.parametrize(
    ("names", "sizes"),
    [("x", [12, 12]), ("xz", [12]), ("x", [11]), ("x", [13]), ("x", [0]), ("xx", [12, 12]), ("", [12])],
)
def test_raw_contents_fit_the_inputs(server, names, sizes):
    request = MESSAGES["ModelInferRequest"](model_name="steady", raw_input_contents=[bytes(size) for size in sizes])
    for name in names:
        request.inputs.add(name=name, datatype="FP32", shape=[1, 3])
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        call = channel.unary_unary(SERVICE + "ModelInfer")
        call(request.SerializeToString(), metadata=tuple(server.headers["predict"].items()))
    assert caught.value.code().name == "INVALID_ARGUMENT"


def mostly(good, *others):
    """A value that is right, or one that is wrong."""
    return st.just(good) | st.just(good) | st.one_of(*others)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_malformed_is_the_clients_fault(server, data):
    """Requests that are right but for some of their shape, datatype, names, version, contents and raw contents; and any
    bytes instead of a message."""
    request = MESSAGES["ModelInferRequest"](
        model_name=data.draw(mostly("steady", st.sampled_from(["busy", "", "nobody"]))),
        model_version=data.draw(mostly("", st.sampled_from(["1", "x", "9" * 30, "-1"]))),
    )
    for name in data.draw(mostly("x", st.sampled_from(["", "xz", "xx", "z", "\u2603"]))):
        tensor = request.inputs.add(
            name=name,
            datatype=data.draw(mostly("FP32", st.sampled_from(["BYTES", "FP16", "INT64", "BOOL", "", "BF16"]))),
            shape=data.draw(mostly([1, 3], st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=3))),
        )
        if data.draw(mostly(False, st.just(True))):
            tensor.contents.fp32_contents.extend(data.draw(st.lists(st.floats(width=32), max_size=4)))
            tensor.contents.bytes_contents.extend(data.draw(st.lists(st.binary(max_size=4), max_size=2)))
    raw = mostly(bytes(12), st.binary(max_size=16))
    request.raw_input_contents.extend(data.draw(st.lists(raw, max_size=3)))
    body = request.SerializeToString() if data.draw(st.integers(0, 3)) else data.draw(st.binary(max_size=64))
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(SERVICE + "ModelInfer")
        try:
            call(body, metadata=tuple(server.headers["predict"].items()), timeout=20)
        except grpc.RpcError as error:
            assert error.code().name in ("INVALID_ARGUMENT", "NOT_FOUND"), (error.code(), error.details())
            assert error.details().endswith((".", "...")), error.details()


# Time


LONG = "slow" * 500
"""The id of the slow calls: the server expects of a batch what batches of its size took, and runs these in a thread."""


@pytest.fixture(scope="module")
def learnt(server):
    """The server has seen that such calls take long."""
    with triton.InferenceServerClient(server.grpc) as client:
        ask(client, "busy", [[TURNS]], server.headers["predict"], request_id=LONG)


def slow_call(server, client, headers, answers):
    """Begin a call that takes its time; returns when the model runs it."""
    (worker,) = map(psutil.Process, server.workers())

    def taken():
        times = worker.cpu_times()
        return times.user + times.system

    before = taken()

    def done(result, error):
        answers.append(error or result.as_numpy("y").tolist())

    client.async_infer("busy", rows([[TURNS]]), done, headers=headers, request_id=LONG)
    server.wait(lambda: taken() > before + 0.1)


def waiting(server):
    """Calls that wait for the model `busy`."""
    text = httpx.get(f"{server.url}/metrics", headers=server.headers["operate"]).text
    return sum(float(found) for found in re.findall(r'noria_queue_requests{.*"busy".*} (.*)', text))


def test_a_call_whose_deadline_passes_while_it_waits_is_never_scored(server, learnt, client, good):
    """By gRPC's deadline, and by the header, which is told why."""
    before, answers = scored(server), []
    slow_call(server, client, good, answers)
    assert code(ask, client, "busy", [[0]], good, client_timeout=0.05) == "DEADLINE_EXCEEDED"
    assert not answers, "who had a deadline does not wait for the slow one"
    with pytest.raises(triton.InferenceServerException, match="passed before the model ran") as caught:
        ask(client, "busy", [[0]], {**good, "x-request-timeout-ms": "50"})
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    server.wait(lambda: bool(answers))
    assert answers == [[[TURNS]]], "the slow one has no deadline"
    assert code(ask, client, "busy", [[0]], {**good, "x-request-timeout-ms": "soon"}) == "INVALID_ARGUMENT"
    assert ask(client, "busy", [[0]], {**good, "x-request-timeout-ms": "20000"}, client_timeout=20) == [[0]]
    assert scored(server) - before == 2


def test_a_cancelled_call_does_not_hurt_its_batch_mates(server, learnt, client, good):
    before, answers, others = scored(server), [], []
    slow_call(server, client, good, answers)
    calls = [
        client.async_infer("busy", rows([[row]]), lambda result, error: others.append((result, error)), headers=good)
        for row in range(8)
    ]
    server.wait(lambda: waiting(server) == 8 or bool(answers))
    assert not answers, "the others must wait behind it"
    for call in calls[::2]:
        call.cancel()
    server.wait(lambda: len(others) == 8 and bool(answers))
    found = sorted(float(result.as_numpy("y")[0, 0]) for result, error in others if error is None)
    assert found == [1, 3, 5, 7]
    assert {error.status() for _, error in others if error is not None} == {"StatusCode.CANCELLED"}
    assert scored(server) - before == 5
    assert ask(client, "busy", [[1]], good) == [[1]]


# The repository


def test_the_repository_as_triton_has_it(server, client):
    """Over gRPC and over REST the same, and every order is in the audit log."""
    operator = server.headers["operate"]

    def states(module, address):
        with module.InferenceServerClient(address) as asking:
            found = asking.get_model_repository_index(
                headers=operator, **({"as_json": True} if module is triton else {})
            )
            found = found["models"] if isinstance(found, dict) else found
            return {(one["name"], one.get("version", ""), one["state"], one.get("reason", "")) for one in found}

    everywhere = ((triton, server.grpc), (triton_http, server.url.removeprefix("http://")))
    listed = [states(*one) for one in everywhere]
    assert listed[0] == listed[1] and ("spare", "1", "READY", "") in listed[0]
    for module, address in everywhere:
        with module.InferenceServerClient(address) as asking:
            asking.unload_model("spare", headers=operator)
            assert not server.ready("spare")
            assert "spare" not in {name for name, _, state, _ in states(module, address) if state == "READY"}
            asking.load_model("spare", headers=operator)
            assert server.ready("spare")
            with pytest.raises(Exception, match="There is no model 'nobody' in the repository"):
                asking.load_model("nobody", headers=operator)
            with pytest.raises(Exception, match="'config' is not served"):
                asking.load_model("spare", headers=operator, config="{}")
    assert code(client.load_model, "nobody", headers=operator) == "INVALID_ARGUMENT"
    assert code(client.unload_model, "spare", headers=server.headers["predict"]) == "PERMISSION_DENIED"
    lines = [json.loads(line) for line in (server.home / "audit.jsonl").read_text().splitlines()]
    orders = [(line["action"], line["outcome"]) for line in lines if line.get("model") == "spare"]
    method, path = SERVICE + "RepositoryModel", "/v2/repository/models/spare/"
    refused = "The parameter 'config' is not served: a model is what lies in the repository."
    done = [(end, "done") for end in ("Unload", "Load")] + [("Load", refused)]
    assert orders == [(method + end, what) for end, what in done] + [(path + end.lower(), what) for end, what in done]
    assert {line["key"] for line in lines if "outcome" in line} == {"operate"}


def test_the_repository_over_aio_and_as_kserve_asks(server):
    operator = server.headers["operate"]

    async def unload(client):
        await client.unload_model("spare", headers=operator)
        return await client.get_model_repository_index(headers=operator)

    gone = aio(unload)(server)
    assert "spare" not in {one.name for one in gone.models if one.state == "READY"}
    with grpc.insecure_channel(server.grpc) as channel:

        def call(method, **fields):
            request, response = (MESSAGES[name] for name in METHODS[method])
            asked = channel.unary_unary(SERVICE + method, request.SerializeToString, response.FromString)
            return asked(request(**fields), metadata=tuple(operator.items()), timeout=60)

        found = call("RepositoryModelLoad", repository_name="spare")  # its proto has the model in this field
        assert (found.model_name, found.isLoaded, server.ready("spare")) == ("spare", True, True)
        for method, fields in (
            ("RepositoryIndex", {"repository_name": "other"}),
            ("RepositoryModelLoad", {"repository_name": "other", "model_name": "spare"}),
        ):
            with pytest.raises(grpc.RpcError, match="There is one repository here"):
                call(method, **fields)
        server.put("broken", 1, b"no model")
        server.wait(lambda: "Version 1 of broken cannot be loaded" in (server.home / "log").read_text())
        every, ready = (call("RepositoryIndex", ready=only).models for only in (False, True))
        assert {one.state for one in ready} == {"READY"} and "broken" not in {one.name for one in ready}
        (broken,) = [one for one in every if one.name == "broken"]
        assert (broken.version, broken.state) == ("1", "UNAVAILABLE") and "not an ONNX model" in broken.reason


def test_a_swap_under_load_fails_no_call(server, good):
    """Clients that stay, busy and idle ones, sync and aio; and clients that come anew for each call."""
    failed, answered, stop = [], [], threading.Event()

    def keep(number):
        with connection() as client:
            while not stop.is_set():
                call(client)
                time.sleep(0.004 * (number % 3))

    def come(number):
        while not stop.is_set():
            with connection() as client:
                call(client)

    def connection():
        own = [("grpc.use_local_subchannel_pool", 1)]  # or all clients of a process share a connection
        return triton.InferenceServerClient(server.grpc, channel_args=own)

    def call(client):
        try:
            took(client.infer("moving", rows([[1, 2, 3]]), headers=good))
        except triton.InferenceServerException as error:
            failed.append(f"{error.status()}: {error.message()} in {threading.current_thread().name}")

    def took(result):
        version = int(result.get_response().model_version)
        answered.append(version)
        if result.as_numpy("y").tolist() != [[1 + version, 2 + version, 3 + version]]:
            failed.append(f"version {version} answered {result.as_numpy('y')}")

    async def many(client):
        async def one():
            while not stop.is_set():
                try:
                    took(await client.infer("moving", rows([[1, 2, 3]], triton_aio), headers=good))
                except triton.InferenceServerException as error:
                    failed.append(f"{error.status()}: {error.message()} in aio")
                await asyncio.sleep(0.01)

        await asyncio.gather(*(one() for _ in range(10)))

    threads = [
        *(threading.Thread(target=keep, args=[number], name="keep") for number in range(4)),
        *(threading.Thread(target=come, args=[number], name="come") for number in range(2)),
        threading.Thread(target=aio(many), args=[server]),
    ]
    for thread in threads:
        thread.start()
    try:
        server.wait(lambda: len(answered) > 100)
        for version in (2, 3):
            (before,) = server.workers()
            server.put("moving", version, plus(version))
            server.wait(lambda now=version: answered[-1:] == [now])
            server.wait(lambda old=before: not psutil.pid_exists(old))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    say(f"{len(answered)} answers, versions {sorted(set(answered))}, {len(failed)} failed")
    assert not failed, Counter(failed)
    assert set(answered) == {1, 2, 3}
