"""The client that lives through a stream: what it sends, and that a failure is counted and never hidden."""

import json
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from ferry import FIRST, WORKLOAD

from flows.traffic import Answered, Traffic
from noria.errors import ServiceError


class Server(ThreadingHTTPServer):
    """Answers with the cars on board as the prediction, refuses every third request, and keeps all bodies."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.pending = [], 3


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.pending = max(0, self.server.pending - 1)
        self.answer(200, {"workloads": {"ferry": {"version": 4, "pending": self.server.pending}}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body))
        number = len(self.server.asked)
        if number % 3 == 0:
            return self.answer(503, {"error": "not now"})
        predictions = [
            {"id": f"{number}-{place}", "prediction": record.get("cars", 0.0)}
            for place, record in enumerate(body.get("records", []))
        ]
        return self.answer(200, {"version": "4", "predictions": predictions})

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def traffic(server):
    made = Traffic(f"http://127.0.0.1:{server.server_port}", WORKLOAD, batch=10)
    yield made
    made.close()


@pytest.fixture(scope="module")
def rows():
    return WORKLOAD.records(FIRST).slice(0, 100)


def test_records_are_the_schemas_columns_as_json(rows):
    traffic = Traffic("http://127.0.0.1:1", WORKLOAD)
    records = list(traffic.records(rows))
    traffic.close()
    json.dumps(records)
    assert len(records) == 100
    for record, row in zip(records, rows.to_pylist(), strict=True):
        assert "minutes" not in record, "the truth is never sent along"
        assert set(record) == {name for name in ("departed", "pier", "cars") if row[name] is not None}
        assert datetime.fromisoformat(record["departed"]) == row["departed"]
    assert any("cars" not in record for record in records)


def test_answers_stay_beside_their_truths_when_requests_fail(server, traffic, rows):
    answered, progress = Answered(), []
    traffic.send(rows, answered, between=progress.append)
    assert progress == list(range(10, 101, 10))
    assert traffic.counts()["sent"] == 10 and traffic.failed == 3
    assert "503" in traffic.last_failure
    assert len(answered.ids) == len(answered.scores) == len(answered.labels) == len(answered.versions) == 70
    kept = [row for part in answered.rows for row in part.to_pylist()]
    assert [row["minutes"] for row in kept] == answered.labels
    assert [row["cars"] or 0.0 for row in kept] == answered.scores
    assert answered.errors() == pytest.approx(np.abs(np.array(answered.scores) - answered.labels))


def test_truths_go_back_by_the_id_of_the_answer(server, traffic, rows):
    answered = Answered()
    traffic.send(rows.slice(0, 10), answered)
    traffic.feedback(answered, datetime(2024, 3, 1, tzinfo=UTC))
    path, body = server.asked[-1]
    assert path == "/feedback/ferry"
    assert [one["id"] for one in body["labels"]] == answered.ids
    assert [one["label"] for one in body["labels"]] == answered.labels
    assert {one["time"] for one in body["labels"]} == {"2024-03-01T00:00:00+00:00"}


def test_waiting_ends_when_it_is_so_or_with_a_sentence(traffic):
    traffic.settle()
    traffic.follow(4)
    with pytest.raises(ServiceError, match=r"does not take version 5 \(0 s\)"):
        traffic.follow(5, patience=0.1)


def test_a_server_that_is_away_is_a_failure_and_a_sentence(rows):
    traffic = Traffic("http://127.0.0.1:1", WORKLOAD, batch=50)
    answered = Answered()
    traffic.send(rows, answered)
    assert (traffic.sent, traffic.failed, answered.ids) == (2, 2, [])
    with pytest.raises(ServiceError, match="does not reach the lake"):
        traffic.settle(patience=0.1)
    traffic.close()
