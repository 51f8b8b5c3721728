"""Metrics of real worker processes that share a socket: one page for all, and no counter that ever goes down."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from registry.bundle import write
from serving import generation
from serving.config import Config
from serving.families import FAMILIES
from serving.generation import Generation, path_of
from serving.state import Desired
from serving.tally import retire

RECORD = {"pickup": "2020-03-15T00:00:00", "vendor": "A", "distance": 2.0, "zone": 1}


class Workers:
    """Worker processes on one listening socket."""

    def __init__(self, folder):
        self.reports = []
        self.folder, self.running, self.numbers = folder, {}, itertools.count(1)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def start(self, source):
        """As the server's parent does, but with a name of ours; it may accept connections as soon as it has loaded."""
        number, (reports, theirs) = self.listener.fileno(), os.pipe()
        command = [
            sys.executable, "-m", "serving.worker", "--socket", str(number), "--folder", str(self.folder),
            "--report", str(theirs), "--source", source,
            "--number", str(next(self.numbers)), "--config", Config().to_json(), "--providers", "cpu",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number, theirs])
        os.close(theirs)
        process.stdin.write(f"{path_of(self.folder, 1)}\ngo\n".encode())
        process.stdin.flush()
        self.running[source] = process
        self.reports.append(reports)

    def end(self, source, number=signal.SIGTERM):
        process = self.running.pop(source)
        process.send_signal(number)
        process.wait(30)
        process.stdin.close()

    def predict(self, requests):
        """Each on a connection of its own, so that every worker gets some; returns how many were answered."""
        return sum(
            httpx.post(f"{self.url}/predict/trips", json=[RECORD] * 3).status_code == 200 for _ in range(requests)
        )

    def page(self):
        """Samples, and the names of the families."""
        families = list(parse_text(httpx.get(f"{self.url}/metrics").text))
        samples = {(one.name, *sorted(one.labels.items())): one.value for each in families for one in each.samples}
        return samples, {family.name for family in families}

    def shown(self, condition, seconds=60.0):
        """The page, once its samples fulfil the condition: each worker writes its numbers once a second."""
        end = time.monotonic() + seconds
        while not condition((page := self.page())[0]):
            assert time.monotonic() < end, page[0]
            time.sleep(0.1)
        return page


@pytest.fixture
def workers(tmp_path, make_contents):
    write(tmp_path / "bundle", make_contents())
    generation.write(tmp_path / "serving", Generation(1, {"trips": Desired("trips", 1, str(tmp_path / "bundle"), "a")}))
    found = Workers(tmp_path / "serving")
    try:
        yield found
    finally:
        for source in list(found.running):
            found.end(source, signal.SIGKILL)
        found.listener.close()
        for descriptor in found.reports:
            os.close(descriptor)


def total(samples, name="noria_requests_total", **labels):
    return sum(
        value for (this, *held), value in samples.items() if this == name and labels.items() <= dict(held).items()
    )


def writers(samples):
    """The workers whose numbers are there."""
    return {dict(key[1:])["worker"] for key in samples if key[0] == "process_open_fds"}


def lasting(samples):
    return {
        key: value
        for key, value in samples.items()
        if key[0].startswith("noria_") and key[0].endswith(("_total", "_bucket"))
    }


def test_one_page_for_all_workers(workers):
    workers.start("w1")
    workers.start("w2")
    answered = workers.predict(60)
    assert answered == 60
    seen, names = workers.shown(
        lambda seen: total(seen, route="predict", status="200") == 60 and len(writers(seen)) == 2
    )
    assert total(seen, route="predict", workload="trips", version="1", status="200") == 60
    assert total(seen, "noria_rows_total") == 180
    assert writers(seen) == {"w1", "w2"}
    assert total(seen, "noria_model_info", workload="trips", version="1", provider="cpu") == 1
    counters = {family.name.removesuffix("_total") for family in FAMILIES}
    assert {name.removesuffix("_total") for name in names} == counters

    for source, number, answers in (("w1", signal.SIGKILL, 60), ("w2", signal.SIGTERM, 80)):
        workers.start(f"after-{source}")
        before, _ = workers.page()
        workers.end(source, number)
        retire(workers.folder / "metrics", set(workers.running))
        assert workers.predict(20) == 20
        for _ in range(3):
            now, _ = workers.page()
            fallen = {key for key, value in lasting(before).items() if now.get(key, 0) < value}
            assert not fallen
            before = now
        workers.shown(lambda seen, all=answers + 20: total(seen, route="predict", status="200") == all)
    files = sorted(path.name for path in (workers.folder / "metrics").iterdir() if path.suffix == ".json")
    assert files == ["after-w1.json", "after-w2.json", "retired.json"]


def test_strangers_do_not_grow_the_page(workers):
    workers.start("w1")
    workers.predict(1)
    with httpx.Client(base_url=workers.url) as client:
        client.get("/nowhere")
        client.post("/predict/nobody", json=[])
        client.post("/v2/models/nobody/infer", json={})
        before = len(client.get("/metrics").text.splitlines())
        for number in range(300):
            client.get(f"/{number:x}")
            client.post(f"/predict/w{number}", json=[])
            client.post(f"/v2/models/m{number}/infer", json={})
        assert len(client.get("/metrics").text.splitlines()) <= before + 1  # /metrics itself counts among the pages
        assert client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}).text.endswith(
            "# EOF\n"
        )


def test_spans_of_a_worker_end_with_it(workers, monkeypatch):
    """A collector that is not there neither stops a worker from answering nor from ending."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
    workers.start("w1")
    assert workers.predict(5) == 5
    began = time.monotonic()
    workers.end("w1")
    assert time.monotonic() - began < 8
