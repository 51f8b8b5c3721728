"""The parts of the benchmarks that judge: what they would let through must not be wrong."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

import numpy as np
import orjson
import pytest

from benchmarks.serving import bodies, models
from benchmarks.serving.bodies import Answered
from benchmarks.serving.contest import Bench, Results, contend
from benchmarks.serving.environments import PINS, Unavailable
from benchmarks.serving.lifetime import growth
from benchmarks.serving.load import Loaded, parse
from benchmarks.serving.openloop import Tally, drive
from benchmarks.serving.peers import FASTEST, FILES, FLOOR, PEERS
from benchmarks.serving.report import Figure, Section, markdown, write
from benchmarks.soak.kills import Acknowledged, age
from benchmarks.soak.swaps import judge, p99_within
from benchmarks.soak.traffic import Kept, Traffic

ROWS = models.rows_of("small", 3)
SCORES = np.array([[1, 2], [3, 4], [5, 6.5]], np.float32)


def loaded(rate, p99=1.0):
    return Loaded(rate, 0.5, p99, 100, 0, 0)


def v2_answer(scores, **changes):
    output = {"name": "y", "shape": list(scores.shape), "datatype": "FP32", "data": scores.ravel().tolist()}
    return orjson.dumps({"model_name": "small", "outputs": [{**output, **changes}]})


def binary_answer(scores):
    output = {"name": "y", "shape": list(scores.shape), "datatype": "FP32"}
    head = orjson.dumps({"outputs": [output]})
    return Answered(200, {"inference-header-content-length": str(len(head))}, head + scores.tobytes())


@pytest.mark.parametrize(
    ("dialect", "answer"),
    [
        (bodies.V2, lambda scores: Answered(200, {}, v2_answer(scores))),
        (bodies.BINARY, binary_answer),
        (bodies.BENTOML, lambda scores: Answered(200, {}, orjson.dumps(scores.tolist()))),
        (bodies.MLFLOW, lambda scores: Answered(200, {}, orjson.dumps({"predictions": scores.tolist()}))),
        (bodies.MLFLOW, lambda scores: Answered(200, {}, orjson.dumps({"predictions": {"y": scores.tolist()}}))),
    ],
)
def test_a_wrong_answer_is_found_in_every_dialect(dialect, answer):
    assert bodies.wrong(dialect, answer(SCORES), SCORES) == ""
    assert "differ" in bodies.wrong(dialect, answer(SCORES[::-1]), SCORES)
    assert "shape" in bodies.wrong(dialect, answer(SCORES[:2]), SCORES)
    assert "status 500" in bodies.wrong(dialect, Answered(500, {}, b"no"), SCORES)
    assert "while reading" in bodies.wrong(dialect, Answered(200, {}, b"{}"), SCORES)


def test_bodies_hold_the_rows():
    text = orjson.loads(bodies.V2.write(ROWS).content)["inputs"][0]
    assert np.array_equal(np.array(text["data"], np.float32).reshape(text["shape"]), ROWS)
    binary = bodies.BINARY.write(ROWS)
    length = int(binary.headers["inference-header-content-length"])
    assert np.array_equal(np.frombuffer(binary.content[length:], "<f4").reshape(3, 20), ROWS)
    assert orjson.loads(binary.content[:length])["inputs"][0]["parameters"]["binary_data_size"] == ROWS.nbytes


def test_the_models_are_the_same_each_time_and_other_seeds_differ(tmp_path):
    sizes = models.SIZES["small"]
    assert models.perceptron(sizes) == models.perceptron(sizes)
    assert models.perceptron(sizes) != models.perceptron(sizes, seed=1)
    models.repository(tmp_path)
    for name, (first, *_, last) in models.SIZES.items():
        path = models.file_of(tmp_path, name)
        many, rows = models.expected(path, models.rows_of(name, 5)), models.rows_of(name, 5)
        assert rows.shape == (5, first) and many.shape == (5, last)
        assert np.allclose(many[2:3], models.expected(path, rows[2:3]), atol=1e-5)


def test_what_wrk_prints_is_read():
    printed = 'Running 4s test\n\n{"requests":800,"seconds":4.0,"p50":1.5,"p99":9.25,"broken":0,"refused":0}\n'
    found = parse(printed)
    assert (found.rate, found.p50, found.p99, found.clean) == (200.0, 1.5, 9.25, True)
    assert not parse(printed.replace('"refused":0', '"refused":1')).clean
    assert not parse(printed.replace('"requests":800', '"requests":0')).clean


class Scripted:
    """A contestant that does what its script says, a round each."""

    def __init__(self, name, rates, order):
        self.name, self.rates, self.order = name, iter(rates), order

    def measure(self, bench, connections):
        self.order.append(self.name)
        rate = next(self.rates)
        if rate is None:
            raise Unavailable("it is down")
        return [loaded(rate * count) for count in connections]


def test_rounds_are_interleaved_and_ratios_are_taken_within_a_round(tmp_path):
    order = []
    steady, noisy = Scripted("a", [2, 200, 20], order), Scripted("b", [1, 100, 40], order)
    results = contend(Bench(tmp_path, rounds=3), [steady, noisy], (1, 16))
    assert order == ["a", "b"] * 3
    assert results.ratio("a", "b", 16) == 2.0  # of medians it would be 0.5
    assert results.median("a", 16) == 320
    assert results.absent == {}


def test_one_that_fails_is_left_out_with_its_reason_and_the_others_go_on(tmp_path):
    order = []
    broken, fine = Scripted("broken", [5, None], order), Scripted("fine", [10, 10, 10], order)
    results = contend(Bench(tmp_path, rounds=3), [broken, fine], (1,))
    assert order == ["broken", "fine", "broken", "fine", "fine"]
    assert results.absent == {"broken": "it is down"}
    assert len(results.rounds("fine", 1)) == 3 and len(results.rounds("broken", 1)) == 1
    assert results.ratio("broken", "fine", 1) == 0.5
    assert math.isnan(Results().ratio("a", "b", 1))


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (Figure("rate", 2.0, "x", 2.0), "PASS"),
        (Figure("rate", 1.99, "x", 2.0), "short"),
        (Figure("p99", 1.0, "x", 1.0, at_most=True), "PASS"),
        (Figure("p99", 1.01, "x", 1.0, at_most=True), "short"),
        (Figure("failed", 0, "", 0, at_most=True), "PASS"),
        (Figure("rate", float("nan"), "x", 2.0), "not measured"),
        (Figure("rate", 7.0, "x"), ""),
    ],
)
def test_verdicts(figure, verdict):
    assert figure.verdict == verdict


def test_the_files_say_what_was_left_out(tmp_path):
    section = Section(
        "small", "one row", ("server", "rate"), [["floor", "10"]], [Figure("rate", float("nan"), "x", 2.0)]
    )
    section.absent = {"mosec": "pip cannot install it"}
    facts = {"date": "2026-11-22T10:00"}
    text = markdown([section], facts, ["python", "-m", "x"], "serving")
    assert "| floor | 10 |" in text and "Not measured: **mosec**: pip cannot install it" in text
    path = write([section], facts, ["x"], tmp_path)
    stored = orjson.loads(path.with_suffix(".json").read_bytes())
    assert stored["sections"][0]["figures"][0] == {
        "what": "rate", "value": None, "unit": "x", "target": 2.0, "at_most": False, "note": "", "timed": False,
        "verdict": "not measured",
    }  # fmt: skip


def test_every_peer_has_its_file_and_its_environment():
    assert {FLOOR, FASTEST} <= set(PEERS)
    for peer in PEERS.values():
        assert peer.environment in PINS
        assert all("==" in pin for pin in PINS[peer.environment])
        assert all(part.endswith("onnxruntime==1.31.1") for part in PINS[peer.environment] if "onnxruntime" in part)
    scripts = {part for peer in PEERS.values() for part in peer.command if part.endswith(".py")}
    modules = {
        part.split(":")[0] + ".py" for peer in PEERS.values() for part in peer.command if part.startswith("serve_")
    }
    assert {path.name for path in FILES.glob("serve_*.py")} == {part.rsplit("/", 1)[-1] for part in scripts} | modules


def test_growth_is_that_of_a_line():
    grown, error = growth([(second, 100.0 + 2 * second) for second in range(11)])
    assert grown == pytest.approx(20) and error == pytest.approx(0, abs=1e-9)
    draw = np.random.default_rng(0)
    grown, error = growth([(second, 100.0 + draw.normal()) for second in range(200)])
    assert abs(grown) < 3 * error
    with pytest.raises(ValueError, match="three samples"):
        growth([(0, 1), (1, 1)])


def test_an_answer_is_as_old_as_it_was_when_its_server_was_killed():
    answers = {"old": 1.0, "young": 9.5, "on its way": 10.2, "next life": 11.0, "after": 21.0}
    told = Acknowledged(at=answers, kills=[(10.0, 10.5), (20.0, 20.5)])
    ages = {name: age(told, name) for name in answers}
    expected = {"old": 9.0, "young": 0.5, "on its way": -0.2, "next life": 9.0, "after": math.inf}
    assert ages == pytest.approx(expected)


def test_an_answer_must_hold_the_scores_of_the_version_that_it_names():
    expected = {1: SCORES[:1], 2: SCORES[1:2]}

    def kept(version, scores, status=200):
        content = {**orjson.loads(v2_answer(scores)), "model_version": version}
        return Kept(0.0, 0.0, status, orjson.dumps(content))

    assert judge(kept("1", SCORES[:1]), expected) == ""
    assert "differ" in judge(kept("2", SCORES[:1]), expected)
    assert "names version 3" in judge(kept("3", SCORES[:1]), expected)
    assert "status 503" in judge(kept("1", SCORES[:1], 503), expected)
    assert "names version None" in judge(Kept(0.0, 0.0, 200, v2_answer(SCORES[:1])), expected)


def test_p99_counts_what_was_under_way_in_a_window():
    answers = [Kept(1.0, 0.5, 200, b""), Kept(5.0, 3.5, 200, b""), Kept(9.0, 0.1, 200, b"")]
    assert p99_within(answers, [(2.0, 3.0)]) == pytest.approx(3500)
    assert p99_within(answers, [(8.95, 9.5)]) == pytest.approx(100)
    assert math.isnan(p99_within(answers, [(20.0, 21.0)]))


@contextlib.asynccontextmanager
async def answering(statuses, close=False, silent=False):
    """The port of a server that answers with these statuses, one a request, and then with 200."""
    left, writers = iter(statuses), []

    async def serve(reader, writer):
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                if not silent:
                    tail = b"connection: close\r\n" if close else b""
                    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n%s\r\nok" % (next(left, 200), tail))
                if close or silent:
                    break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    for writer in writers:
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"


@pytest.mark.parametrize(("close", "silent"), [(False, False), (True, False), (False, True)])
def test_the_open_loop_accounts_for_every_request(close, silent):
    async def run():
        async with answering([503, 500], close, silent) as port:
            return await drive(port, REQUEST, rate=200, seconds=0.5, connections=4)

    tally = asyncio.run(run())
    assert tally.sent + tally.held == 100
    assert len(tally.fine) + len(tally.refused) + sum(tally.other.values()) + tally.broken == tally.sent
    if silent:
        assert tally.broken == tally.sent > 0
    else:
        assert (len(tally.refused), tally.other, tally.broken) == (1, {500: 1}, 0)


def test_a_tally_without_refusals_has_no_latency_for_them():
    summary = Tally(sent=2, fine=[0.001, 0.003]).summary(2.0)
    assert summary["refused_p99"] is None and summary["goodput"] == 1.0 and summary["fine_p50"] == pytest.approx(2)


@pytest.mark.parametrize("silent", [False, True])
def test_traffic_keeps_every_answer_and_every_failure(silent):
    def ask(port):
        with Traffic(port, "/", b"abc", clients=2, rate=100) as traffic:
            end = time.monotonic() + 30
            while len(traffic.answers) <= 10 and not traffic.failures and time.monotonic() < end:
                time.sleep(0.05)
        return traffic

    async def run():
        async with answering([503], silent=silent) as port:
            return await asyncio.to_thread(ask, port)

    traffic = asyncio.run(run())
    if silent:
        assert traffic.failures and not traffic.answers
    else:
        assert not traffic.failures
        assert [kept.status for kept in traffic.answers].count(503) == 1 and len(traffic.answers) > 10
