"""Traces, told to a real OTLP/HTTP receiver: what arrives there, decoded, is what is checked."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from noria.errors import SettingsError
from registry.bundle import write
from serving import service as serving_service
from serving import tracing
from serving.capture import Log
from serving.config import Config
from serving.engine import Engine
from serving.ids import Ids
from serving.metrics import Metrics
from serving.service import Service
from serving.state import Desired
from serving.tracing import Request, Run

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER, INTERNAL, ERROR = 2, 1, 2
"""Numbers of the protocol's enumerations."""


class Receiver(ThreadingHTTPServer):
    """A collector that keeps what it is sent."""

    daemon_threads = True

    def __init__(self):
        self.paths, self.resources, self.spans = [], [], []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def named(self, name):
        return [span for span in self.spans if span.name == name]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.append(self.path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resources.append(values(resource.resource))
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def values(held):
    """Attributes as a dict."""
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in held.attributes}


@pytest.fixture
def receiver(monkeypatch):
    """A collector, and an environment that names it."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)


def request(traceparent=b"", status=200, rows=1):
    now = time.perf_counter()
    route = "/v2/models/{workload}/infer"
    return Request("POST", route, "/v2/models/taxi/infer", now - 0.02, now, status, traceparent, "taxi", rows)


def run(rows=3, logged=True):
    now = time.perf_counter()
    return Run(
        "taxi", 7, rows, now - 0.015, (now - 0.012, now - 0.008), (now - 0.006, now - 0.005) if logged else None, now
    )


def test_traces_are_off_unless_a_collector_is_named(monkeypatch):
    assert tracing.start("one") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.start("one") is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "false")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert tracing.start("one") is None


def test_a_worker_without_traces_imports_none_of_it():
    check = "import sys, serving.worker; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    ended = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "value"),
    [("TRACES_SAMPLER_ARG", "2"), ("TRACES_SAMPLER", "jaeger_remote"), ("EXPORTER_OTLP_PROTOCOL", "grpc")],
)
def test_what_cannot_be_done_is_said(monkeypatch, name, value):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(f"OTEL_{name}", value)
    with pytest.raises(SettingsError, match=f"OTEL_{name} is not usable"):
        tracing.start("one")


def test_missing_packages_are_said():
    hidden = "import sys; sys.modules['opentelemetry.exporter.otlp.proto.http.trace_exporter'] = None\n"
    check = (
        "from noria.settings import TracingSettings; from serving import tracing\n"
        "tracing.start('one', TracingSettings(exporter_otlp_endpoint='http://127.0.0.1:9'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", hidden + check], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'noria[tracing]'" in ended.stderr.splitlines()[-1]


def test_a_batch_arrives_whole(receiver):
    tracer = tracing.start("worker-1")
    before = time.time_ns()
    parented = request(f"00-{TRACE}-{PARENT}-01".encode(), rows=2)
    tracer.batch(run(), [parented, request()])
    tracer.close()
    assert receiver.paths == ["/v1/traces"]
    assert receiver.resources[0].items() >= {"service.name": "noria", "service.instance.id": "worker-1"}.items()
    first, second = receiver.named("POST /v2/models/{workload}/infer")
    (batch,), (model,), (log,) = (receiver.named(name) for name in ("batch taxi", "model run", "log write"))
    assert len(receiver.spans) == 5
    assert (first.kind, batch.kind) == (SERVER, INTERNAL)
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert second.parent_span_id == b"" and second.trace_id != first.trace_id
    assert (
        values(first).items()
        >= {
            "http.request.method": "POST",
            "http.route": "/v2/models/{workload}/infer",
            "url.path": "/v2/models/taxi/infer",
            "http.response.status_code": 200,
            "noria.rows": 2,
        }.items()
    )
    links = [(link.trace_id, link.span_id) for link in batch.links]
    assert links == [(first.trace_id, first.span_id), (second.trace_id, second.span_id)]
    assert (batch.trace_id, batch.parent_span_id) == (first.trace_id, first.span_id)
    assert values(batch) == {
        "noria.workload": "taxi", "noria.version": 7, "noria.batch.requests": 2, "noria.batch.rows": 3,
    }  # fmt: skip
    for part, milliseconds in ((model, 4), (log, 1)):
        assert (part.trace_id, part.parent_span_id) == (batch.trace_id, batch.span_id)
        taken = part.end_time_unix_nano - part.start_time_unix_nano
        assert taken == pytest.approx(milliseconds * 1e6, rel=0.01)
        assert (
            batch.start_time_unix_nano < part.start_time_unix_nano < part.end_time_unix_nano < batch.end_time_unix_nano
        )
    assert abs(before - first.end_time_unix_nano) < 1e9


def test_only_faults_of_the_server_are_errors(receiver):
    tracer = tracing.start("one")
    for status in (200, 404, 503):
        tracer.answered(request(status=status))
    tracer.close()
    assert [span.status.code for span in receiver.spans] == [0, 0, ERROR]
    assert [values(span).get("error.type") for span in receiver.spans] == [None, None, "503"]


def test_a_share_is_sampled_and_the_client_decides_first(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.1")
    tracer = tracing.start("one")
    for _ in range(1000):
        tracer.answered(request())
    tracer.close()
    assert 50 < len(receiver.spans) < 160
    receiver.spans.clear()
    tracer = tracing.start("one")
    for flags in ("00", "01", "02", "03"):
        for _ in range(50):
            tracer.answered(request(f"00-{TRACE}-{PARENT}-{flags}".encode()))
    tracer.close()
    assert len(receiver.spans) == 100
    receiver.spans.clear()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    tracer = tracing.start("one")
    tracer.answered(request(f"00-{TRACE}-{PARENT}-01".encode()))
    tracer.batch(run(), [request()])
    tracer.close()
    assert receiver.spans == []


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"nonsense", f"ff-{TRACE}-{PARENT}-01".encode(), f"00-{'0' * 32}-{PARENT}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(), f"00-{TRACE}-{PARENT}-01-more".encode(),
        f"00-{TRACE.upper()}-{PARENT}-01".encode(), b"\xff" * 10_000,
    ],
)  # fmt: skip
def test_a_wrong_traceparent_begins_a_trace_of_its_own(receiver, sent):
    tracer = tracing.start("one")
    tracer.answered(request(sent))
    tracer.answered(request(f"01-{TRACE}-{PARENT}-01-later".encode()))
    tracer.close()
    wrong, later = receiver.spans
    assert wrong.trace_id.hex() != TRACE and wrong.parent_span_id == b""
    assert later.trace_id.hex() == TRACE  # a later version may say more


def test_a_collector_that_is_not_there_costs_the_end_a_few_seconds(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
    tracer = tracing.start("one")
    tracer.answered(request())
    began = time.monotonic()
    tracer.close()
    assert time.monotonic() - began < 5


class Slow(Log):
    def sync(self):
        time.sleep(0.05)
        super().sync()


@pytest.mark.parametrize("ack", ["fast", "durable"])
def test_the_service_tells_of_its_requests_and_their_run(receiver, tmp_path, make_contents, ack):
    write(tmp_path / "bundle", make_contents())
    tracer = tracing.start("one")
    engine = Engine("cpu")
    engine.take(Desired("trips", 1, str(tmp_path / "bundle"), "a"))
    ids, config = Ids(b"k" * 32, 1), Config(acks={"trips": ack})
    service = Service(engine, Slow(tmp_path / "log", "one"), Metrics(), ids, config=config, tracer=tracer)
    good = b'[{"pickup": 1, "vendor": "A", "distance": 2, "zone": 1}]'

    async def ask():
        answers = []
        headers = {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode()}
        for body in (good, good, b"{"):
            service.accept(serving_service.Request("predict", "trips", body, headers), answers.append)
        while len(answers) < 3:
            await asyncio.sleep(0.01)
        name = orjson.loads(answers[1].body)["predictions"][0]["id"]
        labels = orjson.dumps({"labels": [{"id": name, "label": 4.0}]})
        service.accept(serving_service.Request("feedback", "trips", labels, headers), answers.append)
        while len(answers) < 4:
            await asyncio.sleep(0.01)

    asyncio.run(ask())
    service.close()
    asked = [span for span in receiver.spans if span.name == "POST /predict/{workload}"]
    assert sorted(values(span)["http.response.status_code"] for span in asked) == [200, 200, 400]
    assert {span.trace_id.hex() for span in asked} == {TRACE}
    (run,) = [span for span in receiver.spans if len(span.links) == 2]
    assert {link.span_id for link in run.links} <= {span.span_id for span in asked}
    (told,) = [span for span in receiver.spans if span.name == "POST /feedback/{workload}"]
    assert told.trace_id.hex() == TRACE and values(told)["http.response.status_code"] == 200
    synced = [told, *(asked if ack == "durable" else ())]
    assert min(span.end_time_unix_nano - span.start_time_unix_nano for span in synced) >= 0.05e9
