"""The kserve client, unmodified, against a server. Its pandas, protobuf and psutil are older than those of the tested
set, so it lives in an environment of its own, made once (half a minute) and kept in the cache folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.serving.environments import Unavailable, Unreachable, environment

SCRIPT = Path(__file__).with_name("ask_kserve.py")


def plus():
    """y = x + 1, [n, 3]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy")
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "plus", [x], [y], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_the_kserve_client_works_unmodified(plain_server):
    try:
        python = environment("kserve-client") / "python"
    except Unreachable as reason:
        pytest.skip(f"No package index can be reached, so the kserve client is not installed. {reason}")
    listed = (python.parents[1] / "versions.txt").read_text()
    assert not [name for name in ("torch", "nvidia", "onnxruntime") if name in listed], "it must stay light"
    server = plain_server({"plus": plus()})
    asked = subprocess.run(
        [python, SCRIPT, server.url, server.grpc], capture_output=True, text=True, timeout=120, check=False
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr
    sys.stdout.write(asked.stdout)
    assert len(asked.stdout.splitlines()) == 16


def test_an_environment_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    """Without an index that is the reason, and what is half made is not taken for whole."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Unreachable, match="kserve") as caught:
        environment("kserve-client", tmp_path)
    assert isinstance(caught.value, Unavailable)
    assert not (tmp_path / "kserve-client" / "pins.txt").exists()
