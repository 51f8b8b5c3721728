"""Clients that other people wrote, unmodified, and the conformance suite, against the server's parts on a socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pyarrow as pa
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
import uvicorn

from benchmarks.conformance import about, repository, requests, rpc, suite, values, wire
from serving.app import App
from serving.config import Config
from serving.engine import Engine
from serving.holding import Held
from serving.http import protocol
from serving.messages import MESSAGES, METHODS
from serving.rpc import start
from serving.state import Desired
from serving.worker import build

RECORD = {"pickup": "2020-03-15T00:00:00", "vendor": "A", "distance": 2.0, "zone": 1}


class Running:
    """What a worker runs, in a thread: HTTP and gRPC over one service."""

    def __init__(self, service):
        self.service, self.started = service, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.http = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.thread.start()
        assert self.started.wait(20)

    async def _run(self):
        config = uvicorn.Config(
            App(self.service), http=protocol(self.service), ws="none", lifespan="off", log_config=None, access_log=False
        )
        self.server = uvicorn.Server(config)
        rpc_server = await start(self.service, "127.0.0.1", 0, Held())
        self.grpc = f"127.0.0.1:{rpc_server.port}"
        self.started.set()
        await self.server.serve(sockets=[self.listener])
        await rpc_server.stop(1)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def running(tmp_path_factory, trips_model):
    folder = tmp_path_factory.mktemp("models")
    engine = Engine("cpu")
    for name in repository.write(folder):
        state = engine.take(Desired(name, 1, str(folder / name / "1"), "a", plain=True))
        assert state.status == "serving", state.reason
    engine.models["trips"] = trips_model
    service = build(engine, Config(), tmp_path_factory.mktemp("serving"), "one", 1)
    service.folder = None  # nobody here takes orders
    running = Running(service)
    yield running
    running.stop()
    service.close()


def test_every_case_of_the_conformance_suite_passes(running):
    cases = [*about.cases(), *values.cases(), *requests.cases(), *rpc.cases()]
    with wire.Server(f"http://{running.http}", running.grpc) as server:
        outcomes = suite.run(cases, server)
    assert len(outcomes) > 150
    # Open cases are open for other servers; noria's answers are decided.
    failed = [f"{one.case.group}: {one.case.title}. {one.note}" for one in outcomes if one.result != "pass"]
    assert not failed, "\n".join(failed)


def test_the_suite_fails_a_server_that_answers_something_else(running):
    """The cases look: with another model under the name, every one about its values fails."""
    engine = running.service.engine
    honest = engine.models["same_fp32"]
    engine.models["same_fp32"] = engine.models["same_fp64"]
    try:
        with wire.Server(f"http://{running.http}", running.grpc) as server:
            outcomes = suite.run([*values.cases(), *rpc.cases()], server)
    finally:
        engine.models["same_fp32"] = honest
    failed = {one.case.title for one in outcomes if one.result == "fail"}
    assert {"FP32, flat", "FP32 in and out", "FP32, raw", "FP32, typed"} <= failed


@pytest.mark.parametrize("datatype", list(wire.NUMPY))
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_http(running, datatype, binary):
    if datatype == "FP16" and not binary:
        pytest.skip("this client has no FP16 in JSON")
    array = wire.samples(datatype)
    with triton_http.InferenceServerClient(running.http) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("same_fp32", "1")
        sent = triton_http.InferInput("x", list(array.shape), datatype)
        sent.set_data_from_numpy(_encoded(array, datatype), binary_data=binary)
        wanted = [triton_http.InferRequestedOutput("y", binary_data=binary)]
        result = client.infer(f"same_{datatype.lower()}", [sent], outputs=wanted, request_id="7")
        assert result.get_response()["id"] == "7"
        _same(result.as_numpy("y"), array)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_tritonclient_http_compressed(running, algorithm):
    array = np.zeros((100, 3), np.float32)
    with triton_http.InferenceServerClient(running.http) as client:
        sent = triton_http.InferInput("x", [100, 3], "FP32")
        sent.set_data_from_numpy(array)
        _same(client.infer("same_fp32", [sent], request_compression_algorithm=algorithm).as_numpy("y"), array)
        assert client.get_model_metadata("add_sub")["inputs"][0]["shape"] == [-1, 4]
        assert client.get_server_metadata()["name"] == "noria"
        with pytest.raises(Exception, match="There is no"):
            client.infer("nobody", [sent])


@pytest.mark.parametrize("datatype", list(wire.NUMPY))
def test_tritonclient_grpc(running, datatype):
    array = wire.samples(datatype)
    with triton_grpc.InferenceServerClient(running.grpc) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("same_fp32", "1")
        assert client.get_model_metadata("add_sub").inputs[0].shape == [-1, 4]
        sent = triton_grpc.InferInput("x", list(array.shape), datatype)
        sent.set_data_from_numpy(_encoded(array, datatype))
        result = client.infer(f"same_{datatype.lower()}", [sent], request_id="7")
        assert result.get_response().id == "7"
        _same(result.as_numpy("y"), array)


def test_tritonclient_aio(running):
    array = wire.samples("FP32")

    async def ask(module, address):
        async with module.InferenceServerClient(address) as client:
            assert await client.is_model_ready("same_fp32")
            sent = module.InferInput("x", list(array.shape), "FP32")
            sent.set_data_from_numpy(array)
            return await asyncio.gather(*(client.infer("same_fp32", [sent]) for _ in range(20)))

    # In a thread: the browser's tests leave a loop in this one.
    with ThreadPoolExecutor(1) as thread:
        for module, address in ((triton_http_aio, running.http), (triton_grpc_aio, running.grpc)):
            for result in thread.submit(asyncio.run, ask(module, address)).result():
                _same(result.as_numpy("y"), array)


def test_grpc_codes(running):
    with triton_grpc.InferenceServerClient(running.grpc) as client:
        sent = triton_grpc.InferInput("x", [1, 3], "FP32")
        sent.set_data_from_numpy(np.ones((1, 3), np.float32))
        for model, version, code in (
            ("nobody", "", "NOT_FOUND"),
            ("same_fp32", "9", "NOT_FOUND"),
            ("add_sub", "", "INVALID"),
        ):
            with pytest.raises(triton_grpc.InferenceServerException) as caught:
                client.infer(model, [sent], model_version=version)
            assert code in caught.value.status()
        with pytest.raises(triton_grpc.InferenceServerException, match="There is no workload"):
            client.is_model_ready("nobody")


def test_grpc_answers_in_the_form_of_the_request(running):
    """Typed contents get typed contents, raw ones raw ones; FP16 has no typed form."""
    request, response = (MESSAGES[name] for name in METHODS["ModelInfer"])
    with grpc.insecure_channel(running.grpc) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        typed = request(model_name="same_fp32")
        typed.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend([1, 2, 3])
        answer = infer(typed)
        assert not answer.raw_output_contents
        assert list(answer.outputs[0].contents.fp32_contents) == [1, 2, 3]
        raw = request(model_name="same_fp32", raw_input_contents=[np.arange(3, dtype=np.float32).tobytes()])
        raw.inputs.add(name="x", datatype="FP32", shape=[1, 3])
        answer = infer(raw)
        assert not answer.outputs[0].HasField("contents")
        assert answer.raw_output_contents == raw.raw_input_contents


def test_a_workload_by_every_encoding(running):
    """The same row gets the same score, whatever brought it."""
    records = httpx.post(f"http://{running.http}/predict/trips", json={"records": [RECORD]}).json()
    score = records["predictions"][0]["prediction"]
    table = pa.table({name: [value] for name, value in RECORD.items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    kind = {"content-type": "application/vnd.apache.arrow.stream"}
    answer = httpx.post(f"http://{running.http}/predict/trips", content=sink.getvalue().to_pybytes(), headers=kind)
    assert answer.headers["content-type"] == kind["content-type"]
    found = pa.ipc.open_stream(answer.content).read_all()
    assert found.column("prediction").to_pylist() == [score]
    for module, address in ((triton_http, running.http), (triton_grpc, running.grpc)):
        inputs = []
        for name, datatype, value in (
            ("pickup", "BYTES", b"2020-03-15T00:00:00"), ("vendor", "BYTES", b"A"),
            ("distance", "FP64", 2.0), ("zone", "INT32", 1),
        ):  # fmt: skip
            inputs.append(module.InferInput(name, [1], datatype))
            inputs[-1].set_data_from_numpy(np.array([value], wire.NUMPY[datatype]))
        with module.InferenceServerClient(address) as client:
            result = client.infer("trips", inputs)
            assert result.as_numpy("score").tolist() == [score]
            assert len(result.as_numpy("prediction_id")[0]) == 32


def _encoded(array, datatype):
    return np.vectorize(str.encode, otypes=[object])(array) if datatype == "BYTES" else array


def _same(found, expected):
    if found.dtype == object:
        found = np.vectorize(lambda one: one.decode() if isinstance(one, bytes) else one, otypes=[object])(found)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
