"""The application on a real bundle: right answers, and nothing that a client sends makes a fault of the server."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import sys

import numpy as np
import onnx
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from registry.bundle import write
from registry.manifest import seal
from registry.proof import Proof
from serving.app import App
from serving.capture import Log
from serving.engine import Engine
from serving.everywhere import Everywhere
from serving.generation import Generation
from serving.ids import Ids
from serving.metrics import Metrics
from serving.service import INLINE_BYTES, Service
from serving.state import Desired
from serving.wire import RETRY, Refusal

RECORD = {"pickup": "2020-03-15T00:00:00", "vendor": "A", "distance": 2.0, "zone": 1}
JSON = ((b"content-type", b"application/json"),)


def ask(app, method, path, body=b"", headers=JSON, pieces=1):
    """One request through the ASGI interface; returns status, decoded body and headers."""
    size = max(1, -(-len(body) // pieces))
    parts = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    sent = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def post(app, path, content, **more):
    status, body, _ = ask(app, "POST", path, orjson.dumps(content), **more)
    return status, orjson.loads(body)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, make_contents, trips_graph, trips_schema, trips):
    """Version 1 and 2 of the tiny workload on disk."""
    folder = tmp_path_factory.mktemp("bundles")
    write(folder / "1", make_contents())
    other = onnx.load_from_string(trips_graph)
    (levels,) = (node for node in other.graph.node if node.op_type == "LabelEncoder")
    next(entry for entry in levels.attribute if entry.name == "values_floats").floats[1] = 11.0
    model = other.SerializeToString()
    write(folder / "2", make_contents(model=model, proof=Proof.make(model, trips_schema, trips)))
    return folder


@pytest.fixture(scope="module")
def app(bundles, tmp_path_factory):
    engine = Engine("cpu")
    engine.known["trips"] = Desired("trips", 1, str(bundles / "1"), "a")
    assert engine.take(engine.known["trips"]).status == "serving"
    engine.known["buses"] = Desired("buses", None)
    return App(Service(engine, Log(tmp_path_factory.mktemp("log"), "one"), Metrics(), Ids(b"k" * 32, 1)))


def test_predict(app):
    status, answer = post(app, "/predict/trips", {"records": [RECORD, {**RECORD, "distance": 20, "vendor": "Moon"}]})
    assert status == 200
    assert (answer["workload"], answer["version"]) == ("trips", 1)
    first, second = answer["predictions"]
    assert (first["prediction"], first["action"]) == (3.0, "short")  # 2 miles, 1 for the vendor
    assert (second["prediction"], second["action"]) == (23.0, "long")
    assert len(first["id"]) == 32


def test_predict_and_infer_agree(app):
    records = [{**RECORD, "distance": distance} for distance in (0.0, 1.5, 99.0)]
    _, people = post(app, "/predict/trips", records)
    inputs = [
        {"name": "pickup", "datatype": "BYTES", "shape": [3], "data": [RECORD["pickup"]] * 3},
        {"name": "vendor", "datatype": "BYTES", "shape": [3], "data": ["A"] * 3},
        {"name": "distance", "datatype": "FP64", "shape": [3], "data": [0.0, 1.5, 99.0]},
        {"name": "zone", "datatype": "INT32", "shape": [3, 1], "data": [1, 1, 1]},
    ]
    status, machines = post(app, "/v2/models/trips/infer", {"id": "mine", "inputs": inputs})
    assert status == 200
    outputs = {output["name"]: output["data"] for output in machines["outputs"]}
    assert outputs["score"] == [one["prediction"] for one in people["predictions"]]
    assert outputs["action"] == [one["action"] for one in people["predictions"]]
    assert (machines["id"], machines["model_version"]) == ("mine", "1")


def test_what_is_answered_is_in_the_log(app):
    app.service.records.flush()
    before = app.service.log.pending().get("trips", (0, 0))[0]
    _, answer = post(app, "/predict/trips", [RECORD] * 7)
    post(app, "/predict/trips", [{**RECORD, "distance": -1}])
    post(app, "/feedback/trips", {"labels": [{"id": answer["predictions"][0]["id"], "label": 4}]})
    app.service.records.flush()
    assert app.service.log.pending()["trips"][0] == before + 8


@pytest.mark.parametrize("padding", [0, INLINE_BYTES], ids=["in the loop", "in a thread"])
def test_labels_that_do_not_reach_the_disk_are_not_acknowledged(app, padding, unsyncable):
    _, answer = post(app, "/predict/trips", [RECORD])
    content = orjson.dumps({"labels": [{"id": answer["predictions"][0]["id"], "label": 4}]}) + b" " * padding
    app.service.log.rotate()
    assert ask(app, "POST", "/feedback/trips", content)[0] == 200
    lost = app.service.log.lost
    unsyncable(app.service.log._segments["trips"])
    status, body, headers = ask(app, "POST", "/feedback/trips", content)
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert "send them again" in orjson.loads(body)["error"]
    said = orjson.loads(ask(app, "GET", "/status")[1])["log"]
    assert (said["lost"], "does not reach the disk" in said["failure"]) == (lost + 1, True)
    app.service.log.rotate()
    assert ask(app, "POST", "/feedback/trips", content)[0] == 200
    assert orjson.loads(ask(app, "GET", "/status")[1])["log"] == {"lost": lost + 1, "failure": None}


def test_large_requests_go_beside_the_loop(app):
    status, answer = post(app, "/predict/trips", [RECORD] * 10_000, pieces=50)
    assert status == 200
    assert len({one["id"] for one in answer["predictions"]}) == 10_000


@pytest.mark.parametrize(
    ("method", "path", "status", "part"),
    [
        ("GET", "/nowhere", 404, "/docs"),
        ("GET", "/predict/trips", 405, "use POST"),
        ("POST", "/status", 405, "use GET"),
        ("DELETE", "/v2/models/trips", 405, "use GET"),
        ("TRACE", "/metrics", 405, "use GET"),
        ("POST", "/predict/planes", 404, "there are: buses, trips"),
        ("POST", "/predict/buses", 503, "noria promote buses VERSION"),
        ("GET", "/v2/models/buses/ready", 503, "champion"),
        ("POST", "/predict/trips", 400, "empty"),
        ("POST", "/predict/trips/more", 404, "nothing at"),
    ],
)
def test_wrong_requests_get_sentences(app, method, path, status, part):
    found, body, headers = ask(app, method, path)
    assert found == status
    assert part in orjson.loads(body)["error"]
    assert (headers.get(b"allow") or b"").startswith(part.removeprefix("use ").encode() if status == 405 else b"")


def test_content_type_and_size(app):
    form = ((b"content-type", b"application/x-www-form-urlencoded"),)
    status, answer = post(app, "/predict/trips", [RECORD], headers=form)
    assert (status, "Content-Type: application/json" in answer["error"]) == (415, True)
    utf8 = ((b"content-type", b"application/json; charset=utf-8"),)
    assert post(app, "/predict/trips", [RECORD], headers=utf8)[0] == 200
    assert post(app, "/predict/trips", [RECORD], headers=())[0] == 200
    status, body, _ = ask(app, "POST", "/predict/trips", b" " * (app.service.limits.body_bytes + 1), pieces=20)
    assert (status, "larger than 10,485,760" in orjson.loads(body)["error"]) == (413, True)


def test_a_client_that_leaves_early_is_no_fault(app):
    sent = []

    async def leave():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict/trips", "headers": [], "query_string": b""}
    asyncio.run(app(scope, leave, send))
    assert sent == []


def test_pages_and_health(app, trips_graph):
    for path in ("/", "/docs"):
        status, body, headers = ask(app, "GET", path)
        assert (status, headers[b"content-type"]) == (200, b"text/html; charset=utf-8")
        assert b"trips" in body
        assert b"https://" not in body  # nothing is loaded from elsewhere
    assert b'noria_requests_total{route="predict"' in ask(app, "GET", "/metrics")[1]
    assert orjson.loads(ask(app, "GET", "/v2")[1])["name"] == "noria"
    assert ask(app, "GET", "/v2/health/live")[0] == 200
    assert ask(app, "GET", "/v2/health/ready")[0] == 200
    assert ask(app, "HEAD", "/v2/models/trips/ready")[0] == 200
    assert orjson.loads(ask(app, "GET", "/v2/models/trips")[1])["versions"] == ["1"]
    status = orjson.loads(ask(app, "GET", "/status")[1])
    assert status["workloads"]["trips"]["version"] == 1
    assert status["workloads"]["trips"]["provider"] == "cpu"
    assert status["workloads"]["trips"]["nodes"] == {"cpu": len(onnx.load_from_string(trips_graph).graph.node)}
    buses = status["workloads"]["buses"]
    assert (buses["version"], buses["provider"], buses["nodes"]) == (None, None, {})
    assert b"version 1 on cpu" in ask(app, "GET", "/")[1]


def test_a_model_that_another_worker_does_not_know_is_not_ready(bundles, tmp_path):
    """It answers whom it is asked by; but the next request may come to the other one."""
    engine = Engine("cpu")
    engine.take(Desired("trips", 1, str(bundles / "1"), "a"))
    service = Service(engine, Log(tmp_path / "log", "one"), Metrics(), Ids(b"k" * 32, 1), folder=tmp_path)
    app = App(service)

    def told():
        paths = ("/v2/health/ready", "/v2/models/trips/ready", "/v2/models/trips/versions/1/ready")
        status = orjson.loads(ask(app, "GET", "/status")[1])
        listed = orjson.loads(ask(app, "POST", "/v2/repository/index")[1])
        workload = status["workloads"]["trips"]
        return [ask(app, "GET", path)[0] for path in paths], status["ready"], workload["version"], listed[0]["state"]

    assert told() == ([200, 200, 200], True, 1, "READY"), "there is no other worker"
    fleet = Everywhere(tmp_path)
    old, new = Generation(1), Generation(2, {"trips": Desired("trips", 1)})
    for generation in (old, new):
        fleet.made(generation)
    fleet.say({1, 2})
    assert told() == ([503, 503, 503], False, None, "UNAVAILABLE")
    with pytest.raises(Refusal) as caught:
        service.check_ready("trips")
    assert caught.value.headers == RETRY
    assert post(app, "/predict/trips", {"records": [RECORD]})[0] == 200
    fleet.say({2})
    assert told() == ([200, 200, 200], True, 1, "READY")
    fleet.made(Generation(3, {"trips": Desired("trips", 2)}))
    fleet.say({2, 3})
    assert told() == ([200, 200, 503], True, 1, "READY"), "one of them answers with another version"


def test_an_order_that_takes_longer_than_its_worker_may_is_answered(tmp_path):
    """uvicorn cancels what a worker that ends has not answered, and would say 500."""
    service, sent = Service(Engine("cpu"), Log(tmp_path / "log", "one"), Metrics(), Ids(b"k", 1), folder=tmp_path), []
    scope = {"type": "http", "method": "POST", "path": "/v2/repository/models/one/load", "headers": [], "client": None}

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def end():
        answering = asyncio.create_task(App(service)(scope, receive, send))
        while not list((tmp_path / "orders").glob("*.json")):
            await asyncio.sleep(0.01)
        answering.cancel()
        await answering

    asyncio.run(end())
    assert (sent[0]["status"], b"give it again" in sent[1]["body"]) == (503, True)
    assert not list((tmp_path / "orders").iterdir())


def test_the_examples_of_the_documentation_work(app):
    paths = orjson.loads(ask(app, "GET", "/openapi.json")[1])["paths"]
    tried = 0
    for path, entry in paths.items():
        if "post" in entry:
            example = entry["post"]["requestBody"]["content"]["application/json"]["example"]
            if path.startswith("/feedback"):  # as the page does it: an id that was answered
                example["labels"][0]["id"] = post(app, "/predict/trips", RECORD)[1]["predictions"][0]["id"]
            assert post(app, path.replace("{version}", "1"), example)[0] == 200
            tried += 1
    assert tried == 4


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.sampled_from(["pickup", "vendor", "distance", "zone", "x"]), VALUES, max_size=5)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["pickup", "vendor", "distance", "zone"]) | VALUES,
        "datatype": st.sampled_from(["INT64", "BYTES", "FP32"]) | VALUES,
        "shape": st.just([1]) | st.just([2, 1]) | VALUES,
        "data": st.lists(VALUES, max_size=3) | VALUES,
    },
)
BODIES = (
    VALUES
    | st.fixed_dictionaries({"records": st.lists(FIELDS | VALUES, max_size=3) | VALUES})
    | st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=4)})
    | st.fixed_dictionaries({"labels": st.lists(st.dictionaries(st.sampled_from(["id", "label", "time"]), VALUES))})
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example({"inputs": [{"name": "distance", "datatype": [], "shape": [1], "data": [1]}]}, "/v2/models/trips/infer", 0)
@given(BODIES, st.sampled_from(["/predict/trips", "/feedback/trips", "/v2/models/trips/infer"]), st.integers(0, 200))
def test_no_body_makes_a_fault(app, body, path, cut):
    encoded = orjson.dumps(body)
    for sent in (encoded, encoded[:cut]):
        status, answer, _ = ask(app, "POST", path, sent)
        content = orjson.loads(answer)
        assert status == 200 or (400 <= status < 500 and content["error"].endswith((".", ")")) and len(content) == 1)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 900 + b"]" * 900,
        b'{"records": [{"pickup": ' + b"[" * 990 + b"]" * 990 + b"}]}",
        b'{"records": [{"distance": 1e999, "pickup": 1}]}',
        b'{"records": [{"distance": ' + b"9" * 400 + b', "pickup": 1}]}',
        b'{"records": [{"pickup": 1, "vendor": "\\ud800"}]}',
        b'{"records": [{"pickup": 1, "vendor": "\xff"}]}',
        b'{"records": [{"pickup": 1, "' + b"k" * 100_000 + b'": 1}]}',
        b'{"records": [{"pickup": true}]}',
        b'{"records": [{"pickup": "2020-13-45"}]}',
        b'{"records": [{"pickup": "0001-01-01T00:00:00+23:59"}]}',
        b'{"labels": [{"id": "a", "label": 1e400}]}',
        b"\x00\x01\x02",
    ],
)
@pytest.mark.parametrize("path", ["/predict/trips", "/feedback/trips", "/v2/models/trips/infer"])
def test_hostile_bodies_are_refused(app, body, path):
    status, answer, _ = ask(app, "POST", path, body)
    assert 400 <= status < 500, answer
    assert len(orjson.loads(answer)["error"]) <= 600


def test_a_swap_lets_running_requests_end_with_the_old_version(bundles, tmp_path):
    engine = Engine("cpu")
    engine.take(Desired("trips", 1, str(bundles / "1"), "a"))
    old = engine.models["trips"]
    state = engine.take(Desired("trips", 2, str(bundles / "2"), "b"))
    assert (state.status, state.version, state.replaced) == ("serving", 2, 1)
    tensors = old.bundle.schema.parse([RECORD])
    assert [one.run(tensors)["score"][0] for one in (old, engine.models["trips"])] == [3.0, 13.0]
    again = engine.take(Desired("trips", 2, str(bundles / "2"), "c"))
    assert (again.since, again.asked) == (state.since, "c")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"no"), "changed after"),
        (lambda folder: (folder / "noria" / "manifest.json").unlink(), "manifest"),
        (lambda folder: shutil.rmtree(folder), "manifest"),
        (lambda folder: _reseal(folder, "model.onnx", b"no"), "not an ONNX model"),
        (lambda folder: _promise(folder), "Reference row"),
    ],
)
def test_a_bundle_that_does_not_load_or_prove_leaves_the_old_one(bundles, tmp_path, damage, part):
    shutil.copytree(bundles / "2", tmp_path / "2")
    damage(tmp_path / "2")
    engine = Engine("cpu")
    engine.take(Desired("trips", 1, str(bundles / "1"), "a"))
    state = engine.take(Desired("trips", 2, str(tmp_path / "2"), "b"))
    assert (state.status, state.replaced) == ("failed", 1)
    assert part in state.reason
    assert engine.models["trips"].version == 1
    assert engine.failures["trips"] is state


def _reseal(folder, name, content):
    (folder / name).write_bytes(content)
    seal(folder)


def _promise(folder):
    proof = orjson.loads((folder / "noria" / "proof.json").read_bytes())
    proof["scores"] = (np.array(proof["scores"]) * 1.01).tolist()
    _reseal(folder, "noria/proof.json", orjson.dumps(proof))


def test_a_fault_is_logged_and_answered_as_one(app, caplog, monkeypatch):
    monkeypatch.setitem(app.pages, "/status", lambda _: 1 / 0)
    with caplog.at_level(logging.ERROR):
        status, body, _ = ask(app, "GET", "/status")
    assert (status, "fault" in orjson.loads(body)["error"]) == (500, True)
    assert "ZeroDivisionError" in caplog.text


def test_the_worker_imports_nothing_heavy():
    heavy = "mlflow", "deltalake", "torch", "ray", "prefect", "evidently", "sklearn", "pandas", "pydantic"
    check = f"import sys, serving.worker; print([name for name in {heavy} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"
