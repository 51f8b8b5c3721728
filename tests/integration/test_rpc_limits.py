"""What the gRPC port holds for clients that do not do their part: half messages, answers not taken, connections."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections import Counter

import grpc
import httpx
import onnx
import orjson
import psutil
import pytest
from onnx import TensorProto, helper

from serving.messages import MESSAGES

MIB = 2**20
SERVICE = "/inference.GRPCInferenceService/"
WIDTH = 1000
QUEUE, CONNECTIONS, HELD, BODY = 16, 40, 16 * MIB, 2 * MIB
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8


def wide():
    """y = x * 1, 1,000 numbers for each: [n, 1] -> [n, 1000]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [1, WIDTH], [1.0] * WIDTH)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "ones"], ["y"])], "wide", [x], [y], [ones])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def server(plain_server, tmp_path_factory):
    notes = tmp_path_factory.mktemp("notes") / "access.jsonl"
    limits = {"QUEUE": QUEUE, "CONNECTIONS": CONNECTIONS, "HELD_BYTES": HELD, "BODY_BYTES": BODY, "BODY_SECONDS": 2,
              "IDLE_SECONDS": 2, "HEADER_SECONDS": 2}  # fmt: skip
    started = plain_server(
        {"wide": wide()}, {"predict": ("predict", None), "operate": ("operate", None)},
        NORIA_ACCESS_LOG=str(notes), **{f"NORIA_LIMIT_{name}": str(value) for name, value in limits.items()},
    )  # fmt: skip
    started.notes = notes
    return started


def request(rows):
    """A serialised ModelInferRequest of so many rows."""
    message = MESSAGES["ModelInferRequest"](model_name="wide", raw_input_contents=[bytes(4 * rows)])
    message.inputs.add(name="x", datatype="FP32", shape=[rows, 1])
    return message.SerializeToString()


def ask(server, method="ServerLive", message=b"", headers=(), timeout=30.0):
    """The name of the code that a call on a connection of its own ends with."""
    with grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            channel.unary_unary(SERVICE + method)(message, metadata=headers, timeout=timeout)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def predict(server, rows=1, **more):
    return ask(server, "ModelInfer", request(rows), tuple(server.headers["predict"].items()), **more)


class Raw:
    """A connection of HTTP/2 that does as it is told, and takes no more of answers than the first window."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.grpc_port))
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.frame(SETTINGS, 0, 0)
        self.windows = Counter()
        """What may still be sent, beyond the 65,535 bytes that a stream and the connection begin with."""
        self.ended, self.last, self.read, self.gone = set(), -1, b"", False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def frame(self, kind, flags, stream, content=b""):
        head = struct.pack(">I", len(content))[1:] + bytes((kind, flags)) + struct.pack(">I", stream)
        self.socket.sendall(head + content)

    def call(self, method, headers=(), ends=False):
        """Begin a call; returns its stream."""
        self.last += 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", SERVICE + method), (":authority", "x"),
                  ("te", "trailers"), ("content-type", "application/grpc"), *headers]  # fmt: skip
        block = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
        )
        self.frame(HEADERS, 4 | ends, self.last, block)
        return self.last

    def send(self, stream, message, part=1.0, seconds=5.0):
        """Send so much of a message as the windows allow; returns how many bytes."""
        content = b"\0" + struct.pack(">I", len(message)) + message
        left, sent, end = int(len(content) * part), 0, time.monotonic() + seconds
        while sent < left and stream not in self.ended and not self.gone and time.monotonic() < end:
            room = 65_535 + min(self.windows[0], self.windows[stream])
            size = min(16_384, left - sent, room)
            if size <= 0:
                self.take(0.02)
                continue
            last = part == 1.0 and sent + size == left
            try:
                self.frame(DATA, int(last), stream, content[sent : sent + size])
            except OSError:
                self.gone = True
                break
            sent += size
            self.windows[0] -= size
            self.windows[stream] -= size
            self.take(0.0)
        return sent

    def take(self, seconds):
        """Read frames that come meanwhile; what is let go of is in `ended`, `gone` where it is the connection."""
        end = time.monotonic() + seconds
        while True:
            self.socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                data = None
            except OSError:
                data = b""
            if data == b"":
                self.gone = True
                return
            self.read += data or b""
            while len(self.read) >= 9 and len(self.read) >= 9 + int.from_bytes(self.read[:3], "big"):
                size = 9 + int.from_bytes(self.read[:3], "big")
                self._frame(self.read[:size])
                self.read = self.read[size:]
            if time.monotonic() >= end:
                return

    def _frame(self, frame):
        kind, flags, stream, content = frame[3], frame[4], int.from_bytes(frame[5:9], "big"), frame[9:]
        if kind == WINDOW:
            self.windows[stream] += int.from_bytes(content, "big")
        elif kind == SETTINGS and not flags & 1:
            self.frame(SETTINGS, 1, 0)
        elif kind == PING and not flags & 1:
            self.frame(PING, 1, 0, content)
        elif kind == RESET or (kind == HEADERS and flags & 1):
            self.ended.add(stream)

    def until(self, condition, seconds=30.0):
        """Read frames until it holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (sorted(self.ended), self.gone)
            self.take(0.05)


def grown(server, before=0):
    """MiB that the worker holds more than before."""
    (worker,) = server.workers()
    return psutil.Process(worker).memory_info().rss / MIB - before


def access(server):
    lines = [orjson.loads(line) for line in server.notes.read_bytes().splitlines()]
    return [line for line in lines if line["path"].startswith(SERVICE)]


def test_a_call_without_a_key_is_refused_before_its_message_is_read(server):
    with Raw(server) as raw:
        stream = raw.call("ModelInfer")
        raw.until(lambda: stream in raw.ended)


def test_messages_that_do_not_become_whole_take_no_more_than_is_held(server):
    """And others are answered meanwhile, and all of it is let go."""
    assert predict(server) == "OK"
    before, headers = grown(server), tuple(server.headers["predict"].items())
    with Raw(server) as raw:
        half = [raw.call("ModelInfer", headers) for _ in range(4 * HELD // BODY)]
        for stream in half:
            raw.send(stream, bytes(BODY - 100), 0.99)
        raw.take(0.5)
        assert grown(server, before) < 2 * HELD / MIB
        assert predict(server) == "OK"
        raw.until(lambda: raw.ended == set(half))


def test_calls_that_bring_nothing_take_no_places(server):
    headers = tuple(server.headers["predict"].items())
    with Raw(server) as raw:
        for number in range(200):
            raw.call("ServerLive" if number % 2 else "ModelInfer", headers)
        assert ask(server) == "OK"
        raw.take(1.0)
        assert predict(server) == "OK"
        raw.until(lambda: len(raw.ended) == 200)


def test_answers_that_are_not_taken_are_bounded_and_let_go(server):
    """Each is 4 MB, and its client never widens a window."""
    assert predict(server, 1000) == "OK"
    before, headers = grown(server), tuple(server.headers["predict"].items())
    with Raw(server) as raw:
        for _ in range(20):
            raw.send(raw.call("ModelInfer", headers), request(1000))
            raw.take(0.1)
        raw.take(1.0)
        assert grown(server, before) < 2 * HELD / MIB
        assert ask(server) == "OK"
        raw.until(lambda: raw.gone)
    server.wait(lambda: predict(server, 1000) == "OK")
    assert "Traceback" not in (server.home / "log").read_text(), "nor is the log filled"


def turned_away(server):
    """Whether the server ends a new connection at once."""
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=0.5) as late:
        try:
            return late.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


def test_connections_are_bounded_and_the_other_port_is_not(server):
    """Those that say nothing are let go, too."""
    raws = [Raw(server) for _ in range(CONNECTIONS)]
    try:
        for raw in raws:
            raw.take(0.01)
        server.wait(lambda: turned_away(server))
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        server.wait(lambda: ask(server) == "OK")
    finally:
        for raw in raws:
            raw.socket.close()


def test_calls_that_end_before_their_answer_have_a_line_and_are_counted(server):
    headers = tuple(server.headers["predict"].items())
    server.wait(lambda: not turned_away(server))
    milliseconds, seen = 50, set()
    with Raw(server) as raw:
        while not {499, 504} <= seen:
            assert milliseconds < 2000, f"{seen}; what is longer on its way is ended by the server"
            # A busy server may hear of the call only after it has ended: the next one lasts longer.
            stream = raw.call("ModelInfer", headers)
            raw.take(milliseconds / 1000)
            raw.frame(RESET, 0, stream, struct.pack(">I", 8))
            raw.call("ModelInfer", (*headers, ("grpc-timeout", f"{milliseconds}m")))
            end = time.monotonic() + 3
            while not {499, 504} <= seen and time.monotonic() < end:
                raw.take(0.05)
                seen = {line["status"] for line in access(server)}
            milliseconds *= 2
    page = httpx.get(f"{server.url}/metrics", headers=server.headers["operate"]).text
    for status in (499, 504):
        assert f'noria_requests_total{{route="grpc_infer",status="{status}",version="",workload=""}}' in page
    (late,) = re.findall(r'noria_refusals_total{reason="deadline",workload=""} (.*)', page)
    assert float(late) > 0
