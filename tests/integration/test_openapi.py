"""The server does what its OpenAPI document says: schemathesis reads it, asks everything, and checks the answers."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import onnx
import pytest
from onnx import TensorProto, helper

from registry.bundle import write
from serving import state
from serving.state import Desired

MAIN = (
    "import sys; from noria.settings import load_settings; from serving.reload import serve\n"
    "serve(load_settings(home=sys.argv[1]), '127.0.0.1', int(sys.argv[2]), '')"
)

SAME = helper.make_model(
    helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    ),
    opset_imports=[helper.make_opsetid("", 20)],
    ir_version=10,
)
"""y = x."""


@pytest.fixture(scope="module")
def url(tmp_path_factory, make_contents):
    """A server with a workload, and a model repository with a plain model."""
    home, bundle = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("bundle")
    write(bundle, make_contents())
    state.write(home / "serving" / "desired", Desired("trips", 1, str(bundle), "asked"))
    plain = tmp_path_factory.mktemp("models") / "same" / "1"
    plain.mkdir(parents=True)
    onnx.save(SAME, plain / "model.onnx")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}
    clean["NORIA_REPOSITORY"] = str(plain.parents[1])
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(home), str(port)], env=clean, stdout=log, stderr=log
        )
    try:
        found, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while not _ready(found):
            assert process.poll() is None and time.monotonic() < end, (home / "log").read_text()[-3000:]
            time.sleep(0.05)
        yield found
    finally:
        process.terminate()
        assert process.wait(60) == 0


def _ready(url):
    try:
        return all(httpx.get(f"{url}/v2/models/{name}/ready").status_code == 200 for name in ("trips", "same"))
    except httpx.TransportError:
        return False


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method,allow_header_conformance"
)
CONFIGURED = """
[checks.negative_data_rejection]
expected-statuses = ["400", "404", "413", "415", "422"]
"""
"""Its own list lacks 413, the answer to too many rows, and allows 5xx, which nothing that is sent deserves."""


def test_every_operation_is_as_documented(url, tmp_path):
    """About a thousand requests that fit the document or break it, the same ones every time."""
    (tmp_path / "schemathesis.toml").write_text(CONFIGURED)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS,
        "--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--generation-deterministic",
        "--continue-on-failure", "--report", "ndjson", "--report-ndjson-path", "report.ndjson",
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, f"{ran.stdout[-30000:]}{ran.stderr[-2000:]}"
    # It did ask: both models, right and wrong, and through every one of its phases.
    statuses = Counter(re.findall(r'"status_code":\s?(\d+)', (tmp_path / "report.ndjson").read_text()))
    assert statuses.keys() <= {"200", "400", "404", "405", "413", "415", "422"}
    assert min(statuses[status] for status in ("200", "400", "404", "405", "422")) > 20, statuses
