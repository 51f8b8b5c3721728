"""A model repository: plain models deploy themselves from a folder, without MLflow."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import onnx
import orjson
import psutil
import pytest
from onnx import TensorProto, helper

from serving import orders
from serving.generation import numbers


def plain(add=1.0, width=4):
    """y = x + add, for rows of `width` numbers."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "add"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor("add", TensorProto.FLOAT, [], [add])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def endless():
    """y = x, after more turns than anybody waits for: it hangs while it loads."""
    go, on = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "on"))
    turn = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    held, kept = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in ("held", "kept"))
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Cos", ["held"], ["kept"])],
        "turn", [turn, go, held], [on, kept],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor("turns", TensorProto.INT64, [], [10**12])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def put(repository, name, version, content=None):
    """As a careful person does it: written elsewhere, then renamed."""
    folder = repository / name / str(version)
    aside = repository.parent / f"aside-{name}-{version}"
    aside.mkdir(parents=True)
    (aside / "model.onnx").write_bytes(plain(version) if content is None else content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(folder)
    return time.monotonic()


class Server:
    """`noria serve --repository` in a process, as a person starts it."""

    def __init__(self, folder):
        self.home, self.repository = folder / "home", folder / "models"
        self.repository.mkdir(parents=True)
        self.state = self.home / "serving"

    def start(self, port):
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "flows.cli", "serve", "--port", str(port), "--repository", "models"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}
        self.home.mkdir(exist_ok=True)
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.repository.parent, env={**clean, "NORIA_HOME": str(self.home)}
            )
        self.wait(lambda: httpx.get(f"{self.url}/v2/health/live").status_code == 200, 60)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(60) == 0

    def log(self):
        return (self.home / "log").read_text()

    def ready(self, name):
        return httpx.get(f"{self.url}/v2/models/{name}/ready").status_code == 200

    def version(self, name):
        return httpx.get(f"{self.url}/status").json()["workloads"].get(name, {}).get("version")

    def index(self, name):
        """Version, state and reason of what operators read of a model."""
        listed = httpx.post(f"{self.url}/v2/repository/index").json()
        return [(one["version"], one["state"], one["reason"]) for one in listed if one["name"] == name]

    def wait(self, condition, seconds=60.0):
        began = time.monotonic()
        while True:
            try:
                if condition():
                    return time.monotonic()
            except httpx.HTTPError:
                pass
            assert time.monotonic() - began < seconds, self.log()[-3000:]
            time.sleep(0.05)

    def processes(self):
        workers = orjson.loads((self.state / "workers.json").read_bytes())
        return [psutil.Process(worker["pid"]) for worker in workers if worker["phase"] == "accepting"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("repository"))
    put(found.repository, "first", 1)
    found.start(_free_port())
    yield found
    found.stop()


def ordered(server, name, *, load):
    return asyncio.run(orders.wait(server.state, orders.order(server.state, name, load)))


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_lies_there_at_the_start_is_served(server):
    server.wait(lambda: server.version("first") == 1)
    assert server.ready("first")


def test_a_new_folder_deploys_itself_within_three_seconds_and_a_removed_one_stops(server):
    server.wait(lambda: server.version("first") == 1)

    def begins(number):
        began = put(server.repository, f"second{number}", 3)
        return server.wait(lambda: server.ready(f"second{number}")) - began

    def goes_on(number):
        began = put(server.repository, "second0", 10 + number)
        return server.wait(lambda: server.version("second0") == 10 + number) - began

    assert _least(server, begins) < 3.0
    assert _least(server, goes_on) < 3.0, "10 is higher than 3"
    for folder in (server.repository / "second0").iterdir():
        if folder.name != "3":
            shutil.rmtree(folder)
    server.wait(lambda: server.version("second0") == 3)
    for folder in server.repository.glob("second*"):
        shutil.rmtree(folder)
    server.wait(lambda: httpx.get(f"{server.url}/v2/models/second0/ready").status_code == 404)
    assert server.ready("first")


def _least(server, deploy, tries=5):
    """Seconds of the quickest of some deployments: what else the machine does holds up one of them, seldom all."""
    took = []
    while (not took or took[-1] >= 3.0) and len(took) < tries:
        server.wait(lambda: _spare(server))
        took.append(deploy(len(took)))
    return min(took)


def _spare(server):
    """The one that answers, the spare, and the one that moves the log."""
    return len(psutil.Process(server.process.pid).children()) == 3


def test_a_file_that_does_not_load_is_tried_again(server):
    for version in (1, 2):
        put(server.repository, "slow", version)
        server.wait(lambda version=version: server.version("slow") == version)
    put(server.repository, "slow", 3, b"no model")
    server.wait(lambda: "Version 3 of slow cannot be loaded" in server.log())
    server.wait(lambda: "slow/3/model.onnx is tried again in 2 s." in server.log())
    server.wait(lambda: "slow/3/model.onnx is tried again in 4 s." in server.log())
    assert server.version("slow") == 2
    listed = {version: (state, reason) for version, state, reason in server.index("slow")}
    assert listed["2"] == ("READY", "")
    assert "not an ONNX model" in listed["3"][1]
    (server.repository / "slow" / "3" / "model.onnx").write_bytes(plain(3.0))
    server.wait(lambda: server.version("slow") == 3)


def test_folders_that_come_together_are_one_change_and_what_does_not_load_holds_up_none(server):
    server.wait(lambda: _spare(server))
    before = max(numbers(server.state))
    names = [f"many{number}" for number in range(8)]
    for name in names:
        put(server.repository, name, 1, b"no model" if name == "many3" else None)
    good = [name for name in names if name != "many3"]
    server.wait(lambda: all(map(server.ready, good)))
    server.wait(lambda: "Version 1 of many3 cannot be loaded" in server.log())
    # Two looks may share them, and the fleet may look while they are written down; `many3` takes one, or two.
    assert max(numbers(server.state)) - before < len(good)
    for name in names:
        shutil.rmtree(server.repository / name)
    server.wait(lambda: not any(map(server.ready, names)))
    assert server.ready("first")


def test_operators_unload_and_load(server):
    put(server.repository, "third", 1)
    server.wait(lambda: server.ready("third"))
    assert ordered(server, "third", load=False) == orders.Outcome(True)
    server.wait(lambda: httpx.get(f"{server.url}/v2/models/third/ready").status_code == 404)
    assert not server.index("third")
    assert ordered(server, "third", load=True).done
    server.wait(lambda: server.ready("third"))
    refused = ordered(server, "nothing", load=True)
    assert (refused.done, "no model 'nothing'" in refused.reason) == (False, True)
    put(server.repository, "broken", 1, b"no model")
    server.wait(lambda: "Version 1 of broken cannot be loaded" in server.log())
    refused = ordered(server, "broken", load=True)
    assert (refused.done, "not an ONNX model" in refused.reason) == (False, True)
    assert not list((server.state / "orders").iterdir())
    shutil.rmtree(server.repository / "broken")


def test_an_order_is_answered_while_another_model_loads_for_ever(server):
    put(server.repository, "fourth", 1)
    server.wait(lambda: server.ready("fourth"))
    server.wait(lambda: _spare(server))
    order = f"{server.url}/v2/repository/models/fourth/"
    assert httpx.post(order + "unload", timeout=60).status_code == 200
    put(server.repository, "endless", 1, endless())
    server.wait(lambda: '"endless version 1"' in (server.state / "workers.json").read_text())
    answer = httpx.post(order + "load", timeout=60)
    assert (answer.status_code, answer.text) == (200, "{}")
    assert server.ready("fourth")
    # It begins anew after a change that went before it, and its process says what it loads a moment later.
    server.wait(lambda: '"endless version 1"' in (server.state / "workers.json").read_text())
    assert not list((server.state / "orders").iterdir())
    shutil.rmtree(server.repository / "endless")
    server.wait(lambda: _spare(server))


def test_a_restart_serves_the_same_and_forgets_what_is_gone(server):
    put(server.repository, "gone", 1)
    server.wait(lambda: server.ready("gone"))
    kept = {name: server.version(name) for name in ("first", "slow")}
    server.stop()
    shutil.rmtree(server.repository / "gone")
    (server.repository / "first" / "1" / "model.onnx").write_bytes(b"damaged")
    server.start(int(server.url.rsplit(":", 1)[1]))
    server.wait(lambda: server.version("slow") == kept["slow"])
    assert not server.ready("gone")
    assert not server.ready("first")
    assert not (server.state / "desired" / "gone.json").exists()
    (server.repository / "first" / "1" / "model.onnx").write_bytes(plain())
    server.wait(lambda: server.ready("first"))


def test_nothing_is_ready_before_all_that_was_just_copied_is(tmp_path):
    server, names = Server(tmp_path), [f"model{number}" for number in range(4)]
    for name in names:
        put(server.repository, name, 1)
        soon = time.time() + 60  # written as it were while the server starts, however long the machine takes for that
        os.utime(server.repository / name / "1" / "model.onnx", (soon, soon))
    server.start(_free_port())
    try:
        server.wait(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 200)
        assert all(map(server.ready, names))
        assert numbers(server.state) == [1]
    finally:
        server.stop()


def test_a_server_needs_a_registry_or_a_repository(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}
    command = [str(Path(sys.executable).with_name("noria")), "serve", "--port", str(_free_port())]
    ended = subprocess.run(
        command, env={**clean, "NORIA_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "NORIA_MLFLOW_URI" in ended.stderr
