"""HTTP as it is on the wire: raw bytes to a real server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import re
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import replace

import grpc.aio
import httpx
import orjson
import pytest
import uvicorn

from noria.settings import load_settings
from registry.bundle import write
from serving import http, keys, parsing, rpc
from serving.app import App
from serving.batch import Call
from serving.capture import Log
from serving.config import Config
from serving.connections import SWEEP_AT_ONCE, sweep
from serving.engine import Engine
from serving.guard import protection
from serving.holding import Held
from serving.http import protocol
from serving.ids import Ids
from serving.limits import Limits
from serving.messages import MESSAGES
from serving.metrics import Metrics
from serving.seldom import Seldom
from serving.service import Request, Service
from serving.state import Desired
from serving.wire import Refusal

RECORD = {"pickup": "2020-03-15T00:00:00", "vendor": "A", "distance": 2.0, "zone": 1}
BODY = orjson.dumps([RECORD])
LIMITS = replace(
    Limits(), header_seconds=1.0, body_seconds=1.0, idle_seconds=1.5, connections=40, body_bytes=200_000,
    header_bytes=8_000, inflated_bytes=400_000,
)  # fmt: skip


class Running:
    """A worker's server in a thread."""

    def __init__(self, service):
        self.service = service
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(
            App(service), http=protocol(service), ws="none", lifespan="off", access_log=False, log_config=None,
            server_header=False, timeout_graceful_shutdown=5,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def run(self):
        self.loop = asyncio.get_running_loop()
        task = asyncio.create_task(sweep(self.server.server_state.connections))
        await self.server.serve(sockets=[self.listener])
        task.cancel()

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, make_contents):
    folder = tmp_path_factory.mktemp("bundle")
    write(folder, make_contents())
    return folder


@pytest.fixture
def running(bundle, tmp_path):
    engine = Engine("cpu")
    engine.take(Desired("trips", 1, str(bundle), "a"))
    service = Service(engine, Log(tmp_path / "log", "one"), Metrics(), Ids(b"k" * 32, 1))
    service.limits = LIMITS
    made = Running(service)
    yield made
    made.stop()


@pytest.fixture
def noting(bundle, tmp_path):
    """A server that keeps an access log, with a key for each role, and what reads its lines."""
    settings = load_settings(home=tmp_path, access_log=str(tmp_path / "access.jsonl"))
    made = {role: keys.add(settings.keys_file, role, [role], "now") for role in keys.ROLES}
    protected = protection(settings, {}, "here")
    engine = Engine("cpu")
    engine.take(Desired("trips", 1, str(bundle), "a"))
    config = Config(replace(protected, limits=LIMITS))
    service = Service(engine, Log(tmp_path / "log", "one"), Metrics(), Ids(b"k" * 32, 1), config=config)
    found = Running(service)
    found.keys = made

    def lines():
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), found.loop).result(30)  # an answer's line follows its bytes
        service.guard.access_log.flush()
        file = tmp_path / "access.jsonl"
        return [orjson.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []

    found.lines = lines
    yield found
    found.stop()
    service.close()


def test_every_answer_has_one_line_in_the_access_log(noting):
    def key(role):
        return f"authorization: Bearer {noting.keys[role]}\r\n"

    def get(path, role="predict", method="GET"):
        head = f"{method} {path} HTTP/1.1\r\nhost: here\r\nx-request-id: r1\r\n"
        return f"{head}{key(role) if role else ''}\r\n".encode()

    large = post(path="/nowhere", headers=key("operate"), body=b"x" * 10)
    asked = [
        (get("/status"), "GET", "/status", 200, "predict"),
        (get("/docs?secret=1"), "GET", "/docs", 200, "predict"),
        (get("/v2/models/trips"), "GET", "/v2/models/trips", 200, "predict"),
        (get("/v2/models/trips", method="DELETE"), "DELETE", "/v2/models/trips", 405, "predict"),
        (get("/v2/health/ready", ""), "GET", "/v2/health/ready", 200, ""),
        (get("/metrics", "operate"), "GET", "/metrics", 200, "operate"),
        (get("/nothing", "operate"), "GET", "/nothing", 404, "operate"),
        (get("/status", ""), "GET", "/status", 401, ""),
        (get("/metrics"), "GET", "/metrics", 403, ""),
        (post(b"", "/v2/repository/index", headers=key("operate")), "POST", "/v2/repository/index", 200, "operate"),
        (large, "POST", "/nowhere", 404, "operate"),
        (post(headers=key("predict")), "POST", "/predict/trips", 200, "predict"),
        (post(headers=key("feedback")), "POST", "/predict/trips", 403, ""),
        (post(b"x" * (LIMITS.body_bytes + 1), headers=key("predict")), "POST", "/predict/trips", 413, ""),
        (get("/v2", "predict") + b"", "GET", "/v2", 200, "predict"),
        (b"NONSENSE\r\n\r\n", "", "", 400, ""),
        (get("/x" * LIMITS.header_bytes), "", "", 431, ""),
    ]
    for sent, _, _, status, _ in asked:
        assert statuses(talk(noting, sent)) == [status], sent[:60]
    pipelined = [post(headers=key("predict")), get("/status"), post(headers=key("predict"))]
    assert statuses(talk(noting, b"".join(pipelined), until=3)) == [200] * 3
    found = noting.lines()
    expected = [(method, path, status) for _, method, path, status, _ in asked]
    expected += [("POST", "/predict/trips", 200), ("GET", "/status", 200), ("POST", "/predict/trips", 200)]
    assert [(line["method"], line["path"], line["status"]) for line in found] == expected
    assert [line["key"] for line in found[:12]] == [name for *_, name in asked[:12]]
    assert {tuple(line) for line in found} == {tuple(found[11])}, "the same fields"
    status, hot = found[0], found[11]
    assert (status["request"], status["client"], status["version"], status["rows"]) == ("r1", "127.0.0.1", None, 0)
    assert status["sent"] > 100 and 0 < status["ms"] < 5000
    assert (hot["version"], hot["rows"], hot["received"]) == (1, 1, len(BODY))
    assert (found[-1]["version"], found[-1]["rows"], found[-1]["received"]) == (1, 1, len(BODY)), "pipelined"
    assert counted(noting).total() == len(found), "each of them is counted, too"


def test_a_request_that_does_not_arrive_has_its_line_too(noting):
    head = f"POST /predict/trips HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {noting.keys['predict']}\r\n"
    assert statuses(talk(noting, head.encode() + b"content-length: 50\r\n\r\n")) == [408]
    assert statuses(talk(noting, b"POST /predict/trips HT")) == [408]
    lines = [(line["method"], line["path"], line["status"], line["key"]) for line in noting.lines()]
    assert lines == [("POST", "/predict/trips", 408, "predict"), ("", "", 408, "")]


def counted(running):
    """Answers that the metrics tell of, by route, workload and status."""
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), running.loop).result(30)  # some are counted after their bytes
    found = Counter()
    for (route, workload, _, status), (number,) in running.service.metrics.numbers()["noria_requests_total"].items():
        found[route, workload, int(status)] += int(number)
    return found


def test_what_is_turned_away_is_counted_with_its_reason(running):
    running.service.metrics.loaded("trips", 1, "CPUExecutionProvider")
    running.service.engine.known["late"] = Desired("late", 2, "", "a")
    hot, told = ("predict", "trips"), {}

    def expect(key, reason, *sent):
        before = counted(running)
        assert statuses(talk(running, *sent)) == [key[-1]]
        assert counted(running) - before == Counter([key]), (key, reason)
        if reason:
            told[key[1], reason] = told.get((key[1], reason), 0.0) + 1

    expect(("predict", "", 404), "", post(path="/predict/no-such-name"))
    expect(("infer", "", 503), "not_ready", post(path="/v2/models/late/infer"))
    expect(("feedback", "", 503), "not_ready", post(path="/feedback/late"))
    expect((*hot, 413), "body_size", post(b"x" * (LIMITS.body_bytes + 1)))
    expect((*hot, 415), "", post(headers="content-type: text/html\r\n"))
    expect((*hot, 408), "timeout", post()[:-5])
    expect(("other", "", 408), "timeout", b"POST /predict/trips HT")
    expect(("other", "", 431), "header_size", b"GET /%b HTTP/1.1\r\n\r\n" % (b"x" * LIMITS.header_bytes))
    expect(("other", "", 400), "", b"NONSENSE\r\n\r\n")
    running.service.limits = replace(LIMITS, held_bytes=len(BODY) - 1)
    expect((*hot, 503), "shedding", post())
    running.service.limits = replace(LIMITS, connections=0)
    expect(("other", "", 503), "connections", b"")
    found = running.service.metrics.numbers()
    refusals = {labels: number for labels, (number,) in found["noria_refusals_total"].items() if number}
    assert refusals == told
    assert not sum(map(sum, found["noria_request_duration_seconds"].values())), "none of them took a request's time"


def test_what_is_no_http_fills_no_log(running, caplog, monkeypatch):
    monkeypatch.setattr(parsing, "INVALID_LINES", Seldom())
    for _ in range(20):
        assert statuses(talk(running, b"NONSENSE\r\n\r\n")) == [400]
    assert caplog.text.count(parsing.INVALID) == 1
    parsing.INVALID_LINES._next.clear()  # a while later
    talk(running, b"NONSENSE\r\n\r\n")
    assert f"{parsing.INVALID} (19 more since the last such line)" in caplog.text


def test_pipelined_requests_that_are_turned_away_are_counted(running):
    running.service.metrics.loaded("trips", 1, "CPUExecutionProvider")
    large = b"x" * (LIMITS.body_bytes + 1)
    sent = post() + post(path="/predict/nobody") + post(large)
    assert statuses(talk(running, sent, until=3)) == [200, 404, 413]
    assert counted(running) == {("predict", "trips", 200): 1, ("predict", "", 404): 1, ("predict", "trips", 413): 1}


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def connected(running, client):
    """The server's side of a connection, once it is there."""
    found, name = [], client.getsockname()

    def look():
        found.extend(one for one in list(running.server.server_state.connections) if one.client == name)
        return found

    until(look)
    return found[0]


def logged(running):
    """Rows in the log, with those that wait to be written."""

    async def flush():
        running.service.records.flush()

    asyncio.run_coroutine_threadsafe(flush(), running.loop).result(30)
    return running.service.log.pending().get("trips", (0, 0))[0]


def post(body=BODY, path="/predict/trips", *, headers="", length=True):
    size = f"content-length: {len(body)}\r\n" if length else ""
    return f"POST {path} HTTP/1.1\r\nhost: here\r\n{size}{headers}\r\n".encode() + body


def talk(running, *pieces, pause=0.0, until=1, seconds=30.0):
    """Send the pieces on one connection; what came back until so many answers or the end of the connection."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=seconds) as client:
        received = b""
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause)
            received = hear(client, until)
        except (ConnectionResetError, BrokenPipeError):
            pass
    return received


def hear(client, until=1):
    """What comes back until so many answers or the end of the connection."""
    received = b""
    while len(statuses(received)) < until or not whole(received):
        part = client.recv(65536)
        if not part:
            break
        received += part
    return received


def statuses(received):
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+) ", received)]


def whole(received):
    """Whether the last answer has all of its body."""
    head, _, body = received[received.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    size = re.search(rb"content-length: (\d+)", head)
    return size is not None and len(body) >= int(size[1])


def versions(received):
    return [orjson.loads(found)["version"] for found in re.findall(rb'\{"workload".*?\]\}', received)]


def test_one_connection_carries_many_requests(running):
    received = talk(running, post(), post(), post(), pause=0.05, until=3)
    assert statuses(received) == [200] * 3
    assert versions(received) == [1, 1, 1]
    assert b"connection: close" not in received


MANY = orjson.dumps([RECORD] * 400)
DEFLATED = "content-encoding: deflate\r\n"
HOT = {
    "predict": post(),
    "infer": post(b'{"inputs":[]}', "/v2/models/trips/infer"),
    "no JSON": post(b"{"),
    "unknown": post(path="/v2/models/nobody/infer"),
    "not the schema": post(b'[{"zone": "x"}]'),
    "compressed": post(zlib.compress(BODY), headers=DEFLATED),
    "compressed, in a thread": post(zlib.compress(MANY, 0), headers=DEFLATED),
    "a bomb": post(zlib.compress(bytes(500_000)), headers=DEFLATED),
    "a bomb, in a thread": post(zlib.compress(bytes(random.Random(1).choices(b"abcd", k=450_000))), headers=DEFLATED),
    "damaged, in a thread": post(zlib.compress(MANY, 0)[:20_000] + bytes(9_000), headers=DEFLATED),
    "unknown feedback": post(b'[{"id": "a", "label": 1}]', "/feedback/trips"),
}


def alive():
    """How many requests and refusals of ours are in memory; elsewhere in this process there may be others."""
    return sum(type(one) in (Call, Request, Refusal) for one in gc.get_objects())


@pytest.fixture
def no_collector():
    """What only the garbage collector undoes would hold bodies until it comes by."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("kind", HOT)
def test_a_hot_request_leaves_no_circle_behind(running, no_collector, kind):
    assert statuses(talk(running, HOT[kind]))
    before = alive()
    for _ in range(10):
        talk(running, HOT[kind])
    until(lambda: alive() <= before + 2)  # it lets go when it has answered


def test_pipelined_requests_are_answered_in_order(running):
    mixed = [post(), b"GET /v2/health/live HTTP/1.1\r\nhost: here\r\n\r\n", post(b"{"), post(), post(path="/nowhere")]
    received = talk(running, b"".join(mixed), until=5)
    assert statuses(received) == [200, 200, 400, 200, 404]


class Heavy(dict):
    """What a model takes that is always run in the thread."""

    def __setitem__(self, key, value):
        pass


@pytest.fixture
def hold(running):
    """From each call on, what is asked of the model is not run before what it returns is set."""
    talk(running, post())
    batcher, made = running.service.batcher, []
    batcher.lanes["trips"].seconds = Heavy(dict.fromkeys(range(64), 1.0))

    def begin():
        made.append(threading.Event())
        batcher._thread.submit(made[-1].wait, 60)
        return made[-1]

    yield begin
    for go_on in made:
        go_on.set()


LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: here\r\n\r\n"
TWICE = b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"


def test_a_head_that_is_half_there_when_an_earlier_answer_leaves_is_whole(running):
    request = post(headers="x-request-timeout-ms: 0\r\n")
    for cut in range(1, request.index(b"\r\n\r\n") + 3):
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            client.sendall(LIVE + request[:cut])
            assert statuses(hear(client)) == [200]
            client.sendall(request[cut:])
            assert statuses(hear(client)) == [504], cut


def test_a_refused_connection_runs_nothing_more_and_ends(running, monkeypatch):
    monkeypatch.setattr(http, "LAST_WORDS_SECONDS", 0.1)
    assert statuses(talk(running, post())) == [200]
    assert logged(running) == 1
    for more in (post(), LIVE, b"NONSENSE\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", TWICE):
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            client.sendall(TWICE + more)
            received = hear(client, 9)
            assert statuses(received) == [400], more
            assert b"send it once" in received
            until(lambda: not running.server.server_state.connections)  # though this client does not close
    assert logged(running) == 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (TWICE, [200, 400]),
        (b"NONSENSE\r\n\r\n", [200, 400]),
        (b"GET / HT", [200, 408]),
        (b"GET / HTTP/1.1\r\na: %b\r\n\r\n" % (b"b" * LIMITS.header_bytes), [200, 431]),
        (LIVE + post() + TWICE, [200, 200, 200, 400]),
        (post(bytes(1_000), "/v2/repository/index"), [200, 503]),
        (LIVE + post(bytes(1_000), "/v2/repository/index"), [200, 200, 503]),
    ],
)
def test_a_refusal_waits_for_the_answers_before_it(running, hold, more, expected):
    running.service.limits = replace(LIMITS, held_bytes=len(BODY) + 200, header_seconds=0.1)
    go_on = hold()
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
        client.sendall(post() + more)
        connection = connected(running, client)
        until(lambda: connection.reading == "nothing")
        go_on.set()
        assert statuses(hear(client, 9)) == expected


def test_a_request_that_waits_for_an_earlier_one_is_not_late(running, hold):
    first, listed = hold(), post(b"{}", "/v2/repository/index")
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
        client.sendall(post() + post())
        connection = connected(running, client)
        until(lambda: connection.pipeline)
        second = hold()
        first.set()
        assert statuses(hear(client)) == [200]
        running.loop.call_soon_threadsafe(connection.sweep, connection.since + 1000)  # it is no idle connection
        second.set()
        assert statuses(hear(client)) == [200]
        third = hold()
        client.sendall(post() + listed[:-2])
        until(lambda: connection.pipeline)
        running.loop.call_soon_threadsafe(connection.sweep, connection.since + 1000)  # nobody reads its body yet
        third.set()
        assert statuses(hear(client)) == [200]
        client.sendall(listed[-2:])
        assert statuses(hear(client)) == [200]


def test_an_answer_that_precedes_its_requests_body_leaves_the_connection_idle(running):
    for path in ("/nowhere", "/v2/health/live"):
        head, body = post(path=path).split(b"\r\n\r\n")
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            for _ in range(2):
                client.sendall(head + b"\r\n\r\n")
                assert statuses(hear(client)) in ([404], [405])
                client.sendall(body)
            connection = connected(running, client)
            until(lambda connection=connection: connection.reading == "next")
            connection.limits = replace(LIMITS, idle_seconds=0.1)
            assert client.recv(1) == b""


def test_a_request_in_single_bytes(running):
    received = talk(running, *[bytes([one]) for one in post()], pause=0.0005)
    assert statuses(received) == [200]


def test_chunks_and_compression(running):
    chunks = b"".join(b"1\r\n%c\r\n" % one for one in BODY) + b"0\r\n\r\n"
    received = talk(running, post(chunks, length=False, headers="transfer-encoding: chunked\r\n"))
    assert statuses(received) == [200]
    packed = zlib.compress(BODY)
    assert statuses(talk(running, post(packed, headers="content-encoding: deflate\r\n"))) == [200]
    large = orjson.dumps([{**RECORD, "vendor": f"{number:x}" * 9} for number in range(3000)])
    assert 8192 < len(zlib.compress(large, 1)) < len(large) < LIMITS.inflated_bytes
    received = talk(running, post(zlib.compress(large, 1), headers="content-encoding: deflate\r\n"))
    assert statuses(received) == [200]
    bomb = zlib.compress(b"[" + b" " * 2_000_000 + b"]")
    assert statuses(talk(running, post(bomb, headers="content-encoding: deflate\r\n"))) == [413]
    assert statuses(talk(running, post(headers="content-encoding: br\r\n"))) == [415]


def test_expect_continue(running):
    head, body = post(headers="expect: 100-continue\r\n").split(b"\r\n\r\n")
    received = talk(running, head + b"\r\n\r\n", body, pause=0.1, until=2)
    assert statuses(received) == [100, 200]


def test_http_1_0_and_connection_close_end_the_connection(running):
    for request in (post(headers="connection: close\r\n"), post().replace(b"HTTP/1.1", b"HTTP/1.0")):
        received = talk(running, request, until=2)
        assert statuses(received) == [200]
        assert b"connection: close" in received


def test_too_large_is_said_before_it_is_read_and_the_connection_goes_on(running):
    big = b"x" * (LIMITS.body_bytes + 1)
    received = talk(running, post(big), post(), until=2)
    assert statuses(received) == [413, 200]
    chunked = b"".join(b"8000\r\n" + b"x" * 0x8000 + b"\r\n" for _ in range(10)) + b"0\r\n\r\n"
    received = talk(running, post(chunked, length=False, headers="transfer-encoding: chunked\r\n"), post(), until=2)
    assert statuses(received) == [413, 200]


def test_a_busy_server_says_so_before_the_body_has_come_and_the_connection_goes_on(running):
    assert statuses(talk(running, post())) == [200]
    batcher = running.service.batcher
    batcher.most_waiting = 0
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
        request = post()
        for _ in range(2):
            client.sendall(request[:-5])
            received = client.recv(65536)
            assert statuses(received) == [503]
            assert b"retry-after: 1" in received
            client.sendall(request[-5:])
        batcher.most_waiting = 10
        client.sendall(request)
        assert statuses(client.recv(65536)) == [200]


def test_unfinished_bodies_are_bounded_together(running):
    running.service.limits = replace(LIMITS, held_bytes=250_000, body_seconds=60.0)
    half = post(b"x" * 200_000)[:150_000]
    with socket.create_connection(("127.0.0.1", running.port)) as first:
        first.sendall(half)
        until(lambda: held(running) == half.count(b"x"))
        refused = talk(running, half)
        assert statuses(refused) == [503]
        assert b"retry-after" in refused
        assert statuses(talk(running, post())) == [200]  # there is room for a small one
    until(lambda: not running.server.server_state.connections)
    with socket.create_connection(("127.0.0.1", running.port)) as again:
        again.sendall(half)
        connection = connected(running, again)
        until(lambda: connection.exchange is not None and connection.exchange.size == half.count(b"x"))
        assert not connection.exchange.response_complete  # what the first one held is free again


def test_bodies_for_other_routes_are_bounded_too(running):
    running.service.limits = replace(LIMITS, held_bytes=250_000, body_seconds=60.0)
    half = post(b"x" * 200_000, "/v2/repository/index")[:150_000]
    with socket.create_connection(("127.0.0.1", running.port)) as first:
        first.sendall(half)
        until(lambda: held(running) == half.count(b"x") - 1)  # one is in the path
        assert statuses(talk(running, half)) == [503]
        assert statuses(talk(running, post())) == [200]
    small = post(b"{}", "/v2/repository/index")
    assert statuses(talk(running, *[small] * 5, pause=0.05, until=5)) == [200] * 5
    until(lambda: held(running) == 0)


def held(running):
    """Bytes that all connections hold, as the server counts them."""
    return running.server.config.http_protocol_class.held.size


def test_a_body_in_tiny_chunks_takes_no_more_than_its_bytes(running):
    running.service.limits = replace(LIMITS, body_seconds=60.0)
    chunks = b"2\r\n  \r\n" * 50_000
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(post(chunks, length=False, headers="transfer-encoding: chunked\r\n"))
        connection = connected(running, client)
        until(lambda: connection.exchange is not None and connection.exchange.size == 100_000)
        assert sum(map(sys.getsizeof, connection.exchange.pieces)) < 130_000
        client.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert statuses(client.recv(65536)) == [200]


def test_an_answer_that_nobody_reads_is_let_go(running):
    many = orjson.dumps([RECORD] * 2_000)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(100):
                client.sendall(post(many))
        end, most = time.monotonic() + 60, 0
        while running.server.server_state.connections and time.monotonic() < end:
            most = max(most, held(running))
            time.sleep(0.05)
        assert not running.server.server_state.connections
    assert most > 100_000  # answers that are not read count
    assert held(running) == 0


def test_an_answer_that_is_read_slowly_arrives(running):
    many = orjson.dumps([RECORD] * 2_000)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.sendall(post(many) * 3)
        received, began = 0, time.monotonic()
        while time.monotonic() - began < 2 * LIMITS.idle_seconds:
            received += len(client.recv(3000))
            time.sleep(0.05)
        client.settimeout(30)
        while received < 3 * 2_000 * 50:
            received += len(client.recv(1 << 20))


OFFER = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_an_offer_of_another_protocol_is_passed_over(running, pause):
    smuggled = b"POST /v2/repository/models/nosuch/unload HTTP/1.1\r\nhost: here\r\ncontent-length: 0\r\n\r\n"
    requests = {
        post(headers=OFFER): [200],
        post(smuggled, headers=OFFER): [400],  # it is a body, and no JSON
        post(headers=OFFER.replace("h2c", "websocket")): [200],
        post(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), length=False,
             headers=OFFER + "transfer-encoding: chunked\r\n"): [200],
        b"GET /v2 HTTP/1.1\r\nhost: here\r\n" + OFFER.encode() + b"\r\n": [200],
        post(b"{}", "/v2/repository/index", headers=OFFER): [200],
    }  # fmt: skip
    for request, expected in requests.items():
        head, body = request.split(b"\r\n\r\n", 1)
        after = [*expected, 200, 404]
        found = talk(
            running, head[:20], head[20:] + b"\r\n\r\n" + body[:5], body[5:], post(headers=OFFER),
            post(path="/nowhere"), pause=pause, until=len(after),
        )  # fmt: skip
        assert statuses(found) == after, request
        together = request + post(headers=OFFER) + post(path="/nowhere")
        assert statuses(talk(running, together, until=len(after))) == after, request


def test_a_proxy_is_not_what_this_is(running):
    received = talk(running, b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: elsewhere:443\r\n\r\n", until=2)
    assert statuses(received) == [400]


def test_what_stands_behind_a_body_is_no_header(noting):
    key = f"authorization: Bearer {noting.keys['operate']}\r\n"
    for path in ("/v2/repository/index", "/v2/models/trips/infer"):
        head = f"POST {path} HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n"
        assert statuses(talk(noting, f"{head}2\r\n{{}}\r\n0\r\n{key}\r\n".encode())) == [401]
    head = f"POST /v2/repository/index HTTP/1.1\r\nhost: evil\r\n{key}transfer-encoding: chunked\r\n\r\n"
    assert statuses(talk(noting, f"{head}2\r\n{{}}\r\n0\r\nhost: here\r\n\r\n".encode())) == [421]


@pytest.mark.parametrize("path", ["/predict/trips", "/v2/repository/index"])
def test_who_asks_whom_stands_there_once(running, path):
    for twice in ("Host: there\r\n", "authorization: a\r\nAuthorization: b\r\n"):
        received = talk(running, post(path=path, headers=twice), until=2)
        assert statuses(received) == [400]
        assert b"send it once" in received
    assert statuses(talk(running, post(path="/predict/trips", headers="x-a: 1\r\nx-a: 2\r\n"))) == [200]


def test_endless_headers_are_refused(running):
    assert statuses(talk(running, b"POST / HTTP/1.1\r\n", *[b"a: " + b"b" * 3000 + b"\r\n"] * 9, pause=0.02)) == [431]
    many = "".join(f"a{number}: {'b' * 900}\r\n" for number in range(12))
    assert statuses(talk(running, post(headers=many), pause=0.1)) == [431]  # in one read


def test_slow_clients_are_let_go(running):
    began = time.monotonic()
    assert statuses(talk(running, b"POST /predict/trips HTTP/1.1\r\nhost: h")) == [408]
    assert statuses(talk(running, b"")) == [408]
    assert statuses(talk(running, post()[:-5])) == [408]
    received = talk(running, post(), until=2)  # idle after its answer: closed without a word
    assert statuses(received) == [200]
    assert time.monotonic() - began < 60  # with the default limits 140


def test_connections_are_counted(running):
    held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(LIMITS.connections)]
    connections = running.server.server_state.connections
    until(lambda: len(connections) == LIMITS.connections)
    assert statuses(talk(running, b"")) == [503]
    for one in held:
        one.close()
    until(lambda: not connections)
    assert statuses(talk(running, post())) == [200]


def test_a_client_that_left_is_dropped_and_its_mates_are_answered(running):
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(post()[:-1])
    assert statuses(talk(running, post())) == [200]
    assert logged(running) == 1


def test_the_request_of_a_client_that_left_is_let_go(running, hold, no_collector):
    before = alive()
    for _ in range(10):
        go_on = hold()
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(post())
            connection = connected(running, client)
            until(lambda connection=connection: connection.reading == "answer")
        until(lambda connection=connection: connection not in running.server.server_state.connections)
        go_on.set()
    talk(running, post())
    until(lambda: alive() <= before + 2)


def test_a_server_that_ends_answers_what_is_asked_meanwhile(running):
    """An open connection gets its next answer with `connection: close`; no request meets a closed door."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
        client.sendall(post())
        first = client.recv(65536)
        connection = connected(running, client)
        running.server.should_exit = True
        until(lambda: connection.draining)
        client.sendall(post())
        second = client.recv(65536)
        assert statuses(first + second) == [200, 200]
        assert b"connection: close" in second
        assert client.recv(1) == b""
    running.thread.join(60)
    assert not running.thread.is_alive()


def test_clients_of_a_library(running):
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as client:
        [one] = client.post("/predict/trips", json=[RECORD]).json()["predictions"]
        label = {"id": one["id"], "label": 4}
        assert client.post("/feedback/trips", json=[label]).json() == {"workload": "trips", "accepted": 1}
        for wrong in ({**label, "id": "0" * 32}, {**label, "id": one["id"][:-1] + "x"}, {**label, "label": "four"}):
            reply = client.post("/feedback/trips", json=[label, wrong])
            assert reply.status_code == 422
            assert "Row 1" in reply.json()["error"]
        assert client.get("/v2/models/trips/versions/1").json()["name"] == "trips"
        assert client.get("/v2/models/trips/versions/1/ready").status_code == 200
        assert client.get("/v2/models/trips/versions/2/ready").status_code == 404
        assert client.post("/predict/trips", json=[RECORD], headers={"x-request-timeout-ms": "0"}).status_code == 504
        assert client.post("/predict/trips", json=[RECORD], headers={"x-request-timeout-ms": "-1"}).status_code == 400


def test_a_grpc_call_has_its_line_too(noting):
    """In the same log, with the status that HTTP would have."""
    key = ("authorization", f"Bearer {noting.keys['predict']}")
    message = MESSAGES["ModelInferRequest"](model_name="trips")
    sent = {"pickup": ("INT64", bytes(8)), "vendor": ("BYTES", b"\x01\0\0\0A"), "distance": ("FP32", b"\0\0\0\x40"),
            "zone": ("INT64", b"\x01" + bytes(7))}  # fmt: skip
    for column, (kind, value) in sent.items():
        message.inputs.add(name=column, datatype=kind, shape=[1])
        message.raw_input_contents.append(value)
    calls = [("ServerLive", b"", ()), ("ModelInfer", message.SerializeToString(), (key,)), ("ModelInfer", b"", ()),
             ("ModelInfer", b"\xff", (key,)), ("ModelReady", b"\n\x06nobody", (key,))]  # fmt: skip

    async def ask():
        listening = await rpc.start(noting.service, "127.0.0.1", 0, Held())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{listening.port}") as channel:
            for method, body, metadata in calls:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await channel.unary_unary(f"/{rpc.SERVICE}/{method}")(body, metadata=metadata)
        await listening.stop(1)

    asyncio.run_coroutine_threadsafe(ask(), noting.loop).result(60)
    found = noting.lines()
    assert [(line["path"].rpartition("/")[2], line["status"], line["key"]) for line in found] == [
        ("ServerLive", 200, ""), ("ModelInfer", 200, "predict"), ("ModelInfer", 401, ""),
        ("ModelInfer", 400, "predict"), ("ModelReady", 404, "predict"),
    ]  # fmt: skip
    infer = found[1]
    assert (infer["rows"], infer["version"], infer["received"]) == (1, 1, len(calls[1][1]))
    assert (infer["client"], infer["method"]) == ("127.0.0.1", "POST")
    assert infer["sent"] > 20 and infer["ms"] > 0


def test_many_connections_are_looked_at_between_requests():
    class Connection:
        def sweep(self, _):
            swept.append(self)

    connections, swept = {Connection() for _ in range(1000)}, []
    gone = list(connections)[900:]

    async def others():
        sweeping, most, before = asyncio.create_task(sweep(connections)), 0, 0
        while len(swept) < 900:
            await asyncio.sleep(0)
            most, before = max(most, len(swept) - before), len(swept)
            if swept:
                connections.difference_update(gone)  # while the others are looked at
        sweeping.cancel()
        return most

    assert asyncio.run(others()) <= SWEEP_AT_ONCE
    assert not {id(one) for one in gone}.intersection(map(id, swept))
