"""A server on a GPU, as people run it; the same on the CPU everywhere, so that this test cannot rot unseen."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from registry.bundle import write
from serving import state
from serving.state import Desired

MAIN = (
    "import logging; logging.basicConfig(level='INFO')\n"
    "from noria.settings import load_settings; from serving.reload import serve\n"
    "import sys; serve(load_settings(), '127.0.0.1', int(sys.argv[1]), '')"
)
RECORD = {"pickup": "2020-03-15T12:00:00", "vendor": "A", "distance": 2.0, "zone": 1}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_worker_answers_from_where_it_is_told_to_run(provider, request, make_contents, tmp_path):
    if provider == "cuda":
        request.getfixturevalue("gpu")
    write(tmp_path / "bundle", make_contents())
    folder = tmp_path / "home" / "serving"
    (folder / "desired").mkdir(parents=True)
    state.write(folder / "desired", Desired("trips", 1, str(tmp_path / "bundle")))
    port, log = free_port(), tmp_path / "log"
    environment = {**os.environ, "NORIA_HOME": str(tmp_path / "home"), "NORIA_PROVIDERS": provider}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(port)], env=environment, stdout=output, stderr=output
        )
    try:
        answer = answered(f"http://127.0.0.1:{port}/predict/trips", server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert f"Version 1 of trips runs on {provider} (" in log.read_text()
    assert answer["predictions"][0]["prediction"] == pytest.approx(3.5, rel=1e-4)


def answered(url, server, log, seconds=60):
    """The first answer that is a prediction."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            found = httpx.post(url, json=RECORD)
            if found.status_code == 200:
                return found.json()
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"no answer within {seconds} s: {log.read_text()[-3000:]}")
