"""Ready means ready: from the moment that a model is said to be, no request for it fails, whichever way it comes.

A new model is put beside others that answer. Clients with connections that they keep and clients with fresh ones, over
REST and gRPC, ask whether it is ready, and send as soon as any of them is told so.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import onnx
import orjson
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import TensorProto, helper

SOAK = os.environ.get("SOAK") == "1"
ROUNDS = 10 if SOAK else 2
WORKERS = [1, 2] if SOAK else [1]
SECONDS = 1.0
"""How long each client sends once it is ready, and longer where all together have not sent more than MOST by then."""
MOST = 50
MAIN = (
    "import sys, logging; logging.basicConfig(level='INFO')\n"
    "from noria.settings import load_settings; from serving.reload import serve\n"
    "home, port, grpc, workers = sys.argv[1], *map(int, sys.argv[2:5])\n"
    "settings = load_settings(home=home, repository=f'{home}/models', workers=workers)\n"
    "serve(settings, '127.0.0.1', port, '', grpc_port=grpc)"
)
INFER = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}


def model(add):
    """y = x + add."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "add"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor("add", TensorProto.FLOAT, [], [add])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server of a model repository, with gRPC."""

    def __init__(self, home, workers=1):
        self.home, self.models = home, home / "models"
        self.models.mkdir()
        self.port, self.grpc = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", MAIN, str(home), str(self.port), str(self.grpc), str(workers)],
                env=clean, stdout=log, stderr=log,
            )  # fmt: skip

    def put(self, name, version, add):
        aside = self.home / "aside" / f"{name}-{version}"
        aside.mkdir(parents=True)
        (aside / "model.onnx").write_bytes(model(add))
        (self.models / name).mkdir(exist_ok=True)
        aside.rename(self.models / name / str(version))

    def wait(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                if condition():
                    return
            assert self.process.poll() is None and time.monotonic() < end, (self.home / "log").read_text()[-3000:]
            time.sleep(0.02)

    def calm(self, name):
        """It is ready, and a spare worker waits."""
        return httpx.get(f"{self.url}/v2/models/{name}/ready").status_code == 200 and self.spare()

    def spare(self):
        described = orjson.loads((self.home / "serving" / "workers.json").read_bytes())
        children = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        return {one["phase"] for one in described} == {"accepting"} and len(children) > len(described)

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


class Clients:
    """Some of each kind, in threads; what failed after somebody was told that the model is ready."""

    def __init__(self, server, name, add):
        self.server, self.name, self.expected = server, name, [1 + add, 2 + add]
        self.told, self.failed, self.sent = threading.Event(), [], 0
        self.end = 0.0
        kinds = [self.kept, self.kept, self.fresh, self.fresh, self.kept_grpc, self.fresh_grpc]
        self.threads = [threading.Thread(target=self.run, args=(kind,)) for kind in kinds]

    def run(self, kind):
        try:
            kind()
        except Exception as error:  # a thread's own would only be printed
            self.failed.append(f"{kind.__name__}: {error!r}"[:300])

    def sending(self):
        return time.monotonic() < self.end or self.sent <= MOST

    def tell(self):
        if not self.told.is_set():
            self.end = time.monotonic() + SECONDS
            self.told.set()

    def judge(self, kind, values):
        self.sent += 1
        if values != self.expected:
            self.failed.append(f"{kind}: {values}"[:300])

    def rest(self, client):
        found = client.post(f"{self.server.url}/v2/models/{self.name}/infer", json=INFER)
        return found.json()["outputs"][0]["data"] if found.status_code == 200 else f"{found.status_code} {found.text}"

    def kept(self):
        with httpx.Client(verify=False) as client:
            while not self.told.is_set():
                if client.get(f"{self.server.url}/v2/models/{self.name}/ready").status_code == 200:
                    self.tell()
                time.sleep(0.002)
            while self.sending():
                self.judge("kept", self.rest(client))

    def fresh(self):
        while not self.told.is_set():
            with httpx.Client(verify=False) as client:
                if client.get(f"{self.server.url}/v2/models/{self.name}/ready").status_code == 200:
                    self.tell()
        while self.sending():
            with httpx.Client(verify=False) as client:
                self.judge("fresh", self.rest(client))

    def ask_grpc(self, client):
        sent = triton_grpc.InferInput("x", [1, 2], "FP32")
        sent.set_data_from_numpy(np.array([[1, 2]], np.float32))
        try:
            return client.infer(self.name, [sent]).as_numpy("y").ravel().tolist()
        except triton_grpc.InferenceServerException as error:
            return str(error)

    def ready_grpc(self, client):
        try:
            if client.is_model_ready(self.name):
                self.tell()
        except triton_grpc.InferenceServerException:
            time.sleep(0.002)  # not known yet

    def kept_grpc(self):
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{self.server.grpc}") as client:
            while not self.told.is_set():
                self.ready_grpc(client)
                time.sleep(0.002)
            while self.sending():
                self.judge("kept gRPC", self.ask_grpc(client))

    def fresh_grpc(self):
        own = [("grpc.use_local_subchannel_pool", 1)]  # or channels of one process share connections
        address = f"127.0.0.1:{self.server.grpc}"
        while not self.told.is_set():
            with triton_grpc.InferenceServerClient(address, channel_args=own) as client:
                self.ready_grpc(client)
            time.sleep(0.01)
        while self.sending():
            with triton_grpc.InferenceServerClient(address, channel_args=own) as client:
                self.judge("fresh gRPC", self.ask_grpc(client))


@pytest.fixture(scope="module", params=WORKERS, ids="{} workers".format)
def server(request, tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("home"), request.param)
    yield found
    found.stop()


def test_no_request_fails_once_a_first_or_another_model_is_said_to_be_ready(server):
    server.wait(lambda: httpx.get(f"{server.url}/v2/health/live").status_code == 200)
    for number in range(ROUNDS):
        server.wait(server.spare)
        clients = Clients(server, f"m{number}", number)
        for thread in clients.threads:
            thread.start()
        time.sleep(0.2)  # each has its connections
        began = time.monotonic()
        server.put(f"m{number}", 1, number)
        assert clients.told.wait(30), (server.home / "log").read_text()[-3000:]
        seconds = time.monotonic() - began
        for thread in clients.threads:
            thread.join()
        sys.stdout.write(f"ready after {seconds:.2f} s; of {clients.sent} requests {len(clients.failed)} failed\n")
        assert not clients.failed, clients.failed[:5]
        assert clients.sent > MOST


class Traffic:
    """One client that keeps its connection and asks every `pause` seconds."""

    def __init__(self, server, name, pause):
        self.server, self.name, self.pause = server, name, pause
        self.stop, self.answers = threading.Event(), []
        self.thread = threading.Thread(target=self.run)

    def run(self):
        with httpx.Client(verify=False) as client:
            while not self.stop.is_set():
                began = time.monotonic()
                found = client.post(f"{self.server.url}/v2/models/{self.name}/infer", json=INFER)
                self.answers.append((began, found.status_code, found.json().get("model_version")))
                self.stop.wait(self.pause)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def test_who_loads_a_version_is_answered_by_it_on_the_same_connection(server):
    """tritonclient keeps the connection on which it has loaded; the worker at its other end is the one that goes."""
    server.put("loaded", 1, 1)
    server.wait(lambda: server.calm("loaded"))
    array = np.array([[1, 2]], np.float32)
    sent = triton_http.InferInput("x", [1, 2], "FP32")
    sent.set_data_from_numpy(array)
    done = {}
    busy, quiet = Traffic(server, "loaded", 0.005), Traffic(server, "loaded", 0.8)
    with triton_http.InferenceServerClient(server.url[7:], concurrency=1) as client, busy, quiet:
        for version in range(2, 2 + ROUNDS):
            server.put("loaded", version, version)
            client.load_model("loaded")
            done[version] = time.monotonic()
            result = client.infer("loaded", [sent])
            assert result.get_response()["model_version"] == str(version)
            assert result.as_numpy("y").tolist() == (array + version).tolist()
            assert client.is_model_ready("loaded", str(version))
            # The quiet one asks once more on the connection that it has, and the busy one often enough.
            server.wait(lambda since=done[version]: quiet.answers and quiet.answers[-1][0] > since)
            server.wait(lambda: len(busy.answers) > 25 * len(done))
    answers = [*busy.answers, *quiet.answers]
    assert {status for _, status, _ in answers} == {200}
    for version, since in done.items():
        late = {int(answered) for began, _, answered in answers if began > since}
        assert not [one for one in late if one < version], f"version {version} was loaded, and {late} answered"


def test_what_is_unloaded_answers_no_more_and_what_does_not_load_is_said(server):
    server.put("unloaded", 1, 1)
    server.wait(lambda: server.calm("unloaded"))
    sent = triton_http.InferInput("x", [1, 2], "FP32")
    sent.set_data_from_numpy(np.array([[1, 2]], np.float32))
    with triton_http.InferenceServerClient(server.url[7:], concurrency=1) as client:
        client.unload_model("unloaded")
        with pytest.raises(triton_http.InferenceServerException, match="There is no workload 'unloaded'"):
            client.infer("unloaded", [sent])
        client.load_model("unloaded")
        assert client.infer("unloaded", [sent]).get_response()["model_version"] == "1"
        (server.models / "unloaded" / "2").mkdir()
        (server.models / "unloaded" / "2" / "model.onnx").write_bytes(b"no model")
        with pytest.raises(triton_http.InferenceServerException, match="Version 2 of unloaded cannot be loaded"):
            client.load_model("unloaded")
        assert client.infer("unloaded", [sent]).get_response()["model_version"] == "1"
