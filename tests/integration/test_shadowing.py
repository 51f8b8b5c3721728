"""A challenger beside a champion, as people run it: real MLflow, real server, requests that know nothing of it."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import onnx
import pyarrow as pa
import pytest

from noria.lake import Lake
from registry.proof import Proof
from registry.store import Store
from serving.shadow_scores import chosen
from serving.shadowing import Shadowing

_SPEC = importlib.util.spec_from_file_location("serving_as_run", Path(__file__).with_name("test_serving.py"))
serving = importlib.util.module_from_spec(_SPEC)
sys.modules["serving_as_run"] = serving
_SPEC.loader.exec_module(serving)
PATIENCE = 120
"""Seconds: the shadow runs only when nothing else on the machine does."""
Load, Server, wait = serving.Load, serving.Server, serving.wait


@pytest.fixture(scope="module")
def store(mlflow_url, make_contents, trips_graph, trips_schema, trips):
    """Versions 1 and 2 of `trips`, whose scores differ by 10."""
    other = onnx.load_from_string(trips_graph)
    (levels,) = (node for node in other.graph.node if node.op_type == "LabelEncoder")
    next(entry for entry in levels.attribute if entry.name == "values_floats").floats[1] = 11.0
    model, made = other.SerializeToString(), Store(mlflow_url)
    for contents in (make_contents(), make_contents(model=model, proof=Proof.make(model, trips_schema, trips))):
        with made.run("trips", "by hand") as run:
            made.register(run, contents)
    made.move("trips", "champion", 1)
    yield made
    made.drop("trips", "challenger")


@pytest.fixture
def server(store, mlflow_url, tmp_path):
    """A server of its own home that answers with version 1 and has no challenger yet."""
    store.drop("trips", "challenger")
    store.client.delete_registered_model_tag("trips", "noria.shadow_share")
    made = Server(tmp_path / "home", mlflow_url)
    made.start()
    wait(lambda: made.version() == 1, what=made.log()[-3000:])
    yield made
    made.stop()


def tag(store, number):
    return store.get("trips", number).tags.get("noria.serving", "")


def shadow_rows(server, schema, table="shadow"):
    return Lake(str(server.home / "lake"), "trips", schema)._read(table, None, None, "event_time").to_pylist()


def shadow_process(server):
    return server.running("serving.shadow")


def status(server):
    return serving.orjson.loads((server.home / "serving" / "shadow" / "status.json").read_bytes())["trips"]


def ask_for(server, rows):
    """One request; returns its prediction ids."""
    reply = httpx.post(f"{server.url}/predict/trips", json=[serving.RECORD] * rows)
    assert reply.json()["version"] == 1
    return [one["id"] for one in reply.json()["predictions"]]


WORKLOAD = """
from noria.schema import Column, Schema
from noria.workload import Workload

class Trips(Workload):
    name, task, unit = "trips", "regression", "min"
    schema = Schema(
        (Column("distance", "number"), Column("vendor", "string"), Column("pickup", "timestamp")),
        event_time="pickup", target="minutes",
    )

WORKLOAD = Trips()
"""


def _compare(server, ids, folder):
    """`noria shadow` as a person calls it; the labels are 4 minutes, version 1 said 3 and version 2 says 13."""
    (folder / "shadowed.py").write_text(WORKLOAD)
    given = {
        "NORIA_HOME": str(server.home),
        "NORIA_MLFLOW_URI": server.mlflow_url,
        "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}

    def run(*arguments):
        command = [sys.executable, "-m", "flows.cli", "shadow", "shadowed:WORKLOAD", "--now", "2020-03-16", *arguments]
        return serving.subprocess.run(
            command, env={**clean, **given, "COLUMNS": "200"}, capture_output=True, text=True, timeout=120
        )

    said = run()
    assert (said.returncode, said.stderr) == (0, "")
    assert f"Version 2 shadowed {len(ids):,} answers of version 1, with the same action in 0.0%" in said.stdout
    assert "not known which errs less" in said.stdout
    wrong = [{"id": name, "label": 4, "time": "2020-03-15"} for name in ids[:200]]
    assert httpx.post(f"{server.url}/feedback/trips", json=wrong).status_code == 200
    server.settle()
    said = run("--json")
    assert said.returncode == 7, said.stderr
    found = serving.orjson.loads(said.stdout)
    assert (found["verdict"], found["labelled"], found["rows"]) == ("worse", 200, len(ids))
    assert (found["champion_error"]["value"], found["challenger_error"]["value"]) == (1.0, 9.0)
    assert run("--now", "2020-01-01").returncode == 6


def test_a_challenger_shadows_and_nobody_is_told_but_the_registry(server, store, trips_schema, tmp_path):
    store.move("trips", "challenger", 2)
    wait(lambda: tag(store, 2).startswith("shadowing since"), PATIENCE, server.log()[-3000:])
    assert tag(store, 2).endswith(", share 1")
    assert shadow_process(server).nice() == 19
    with Load(server.url) as load:
        load.wait_for(100)
    assert load.failures == []
    assert {version for _, version, _ in load.answers} == {1}
    assert {score for _, _, found in load.answers for _, score in found} == {3.0}
    wait(lambda: len(shadow_rows(server, trips_schema)) >= len(load.ids()), PATIENCE, server.log()[-3000:])
    rows = shadow_rows(server, trips_schema)
    assert sorted(row["prediction_id"] for row in rows) == sorted(load.ids())
    assert {(row["version"], row["champion"], row["score"]) for row in rows} == {(2, 1, 13.0)}
    assert {row["version"] for row in shadow_rows(server, trips_schema, "predictions")} == {1}
    assert len(shadow_rows(server, trips_schema, "predictions")) == len(load.ids())
    _compare(server, load.ids(), tmp_path)
    store.drop("trips", "challenger")
    wait(lambda: tag(store, 2).startswith("stopped shadowing at"), PATIENCE)
    wait(lambda: shadow_process(server) is None, PATIENCE)
    ask_for(server, 3)
    server.settle()
    assert len(shadow_rows(server, trips_schema)) == len(rows)


def test_a_quarter_is_a_quarter_and_a_share_that_is_none_is_said(server, store, trips_schema):
    store.client.set_registered_model_tag("trips", "noria.shadow_share", "0.25")
    store.move("trips", "challenger", 2)
    wait(lambda: tag(store, 2).endswith("share 0.25"), PATIENCE, server.log()[-3000:])
    ids = [name for _ in range(4) for name in ask_for(server, 500)]
    answered = pa.table({"prediction_id": ids, "version": [1] * len(ids)})
    quarter = chosen(answered, 0.25, 2).column("prediction_id").to_pylist()
    assert 420 < len(quarter) < 580  # 500 expected, standard deviation 19
    wait(lambda: len(shadow_rows(server, trips_schema)) >= len(quarter), PATIENCE, server.log()[-3000:])
    assert sorted(row["prediction_id"] for row in shadow_rows(server, trips_schema)) == sorted(quarter)
    store.client.set_registered_model_tag("trips", "noria.shadow_share", "most")
    wait(lambda: "must be a number from 0 to 1" in tag(store, 2), PATIENCE)
    assert "share 0.25 (the model's tag noria.shadow_share is 'most'" in tag(store, 2)
    time.sleep(5)
    assert server.log().count("Shadowing trips: the model's tag") == 1


def test_a_broken_challenger_is_told_once_and_costs_nothing(server, store, make_contents, mlflow_url):
    with store.run("trips", "wrong proof") as run:
        wrong = make_contents()
        proof = Proof(wrong.proof.records, tuple(value + 1 for value in wrong.proof.scores))
        broken = store.register(run, make_contents(proof=proof)).number
    store.move("trips", "challenger", broken)
    with Load(server.url) as load:
        wait(lambda: tag(store, broken).startswith("failed: "), PATIENCE, server.log()[-3000:])
        load.wait_for(100)
    assert "Reference row" in tag(store, broken)
    assert load.failures == []
    wait(lambda: shadow_process(server) is None, PATIENCE)
    time.sleep(5)
    assert server.log().count(f"trips version {broken} failed") == 1
    store.move("trips", "challenger", 2)
    wait(lambda: tag(store, 2).startswith("shadowing since"), PATIENCE)


class Slow(Store):
    """A registry that takes its time with the next challenger; the drain works meanwhile."""

    def get(self, workload, number):
        """As the real one, after what is done meanwhile."""
        if workload == "other":
            self.meanwhile()
        return super().get(workload, number)


def test_what_is_offered_while_a_challenger_ends_is_left_to_no_other(store, make_contents, mlflow_url, tmp_path):
    slow, folder = Slow(mlflow_url), tmp_path / "serving"
    with store.run("other", "by hand") as run:
        store.register(run, make_contents(facts=replace(make_contents().facts, name="other")))
    store.move("trips", "challenger", 2)
    follows = Shadowing(slow, tmp_path / "bundles", folder)

    def offer():
        path = tmp_path / "trips.one.000000001.2"
        path.write_bytes(b"")
        follows.feed.offer(path)
        offered.append(follows.feed.waiting("trips"))

    slow.meanwhile, offered = offer, []
    try:
        follows.step()
        store.drop("trips", "challenger")
        store.move("other", "challenger", 1)
        follows.step()
        follows.step()  # the process may have taken it in between
        assert offered == [2]
        assert not list((folder / "shadow").rglob("trips.*"))
    finally:
        follows.stop()
        store.client.delete_registered_model("other")


def test_a_process_killed_again_and_again_is_reported_and_given_up(server, store, trips_schema):
    store.move("trips", "challenger", 2)
    wait(lambda: tag(store, 2).startswith("shadowing since"), PATIENCE)
    killed = set()
    with Load(server.url) as load:
        load.wait_for(50)

        def given_up():
            found = shadow_process(server)
            if found is not None and found.pid not in killed:
                killed.add(found.pid)
                os.kill(found.pid, signal.SIGKILL)
            return tag(store, 2).startswith("failed: ")

        wait(given_up, PATIENCE, server.log()[-3000:])
        load.wait_for(50)
    assert load.failures == []
    assert "was ended by SIGKILL" in tag(store, 2)
    assert len(killed) == 3
    assert (status(server)["status"], status(server)["restarts"]) == ("failed", 3)
    server.settle()
    rows = [row["prediction_id"] for row in shadow_rows(server, trips_schema)]
    assert len(rows) == len(set(rows))
    assert sorted(server.logged(trips_schema)) == sorted(load.ids())


def test_a_killed_server_shadows_nothing_twice(server, store, trips_schema):
    store.move("trips", "challenger", 2)
    wait(lambda: tag(store, 2).startswith("shadowing since"), PATIENCE)
    with Load(server.url) as load:
        load.wait_for(100)
        server.kill()
        wait(lambda: not serving._listens(server.port))
        server.start()
        load.wait_for(100)
    server.settle()
    # Not by its status file: that is of the killed one until the next has begun.
    wait(lambda: _shadowed(server, trips_schema).keys() >= set(server.logged(trips_schema)), PATIENCE)
    server.settle()
    wait(lambda: not _on_the_way(server), PATIENCE)
    rows = _shadowed(server, trips_schema)
    assert max(rows.values()) == 1
    assert set(rows) == set(server.logged(trips_schema))


def _on_the_way(server):
    """Segments that wait for the lake, then for the shadow, then for the lake again: looked at as they go."""
    folder = server.home / "serving"
    ready, shadow = folder / "log" / "ready", folder / "shadow"
    return [path for place in (ready, shadow / "waiting", shadow / "taken", ready) for path in place.rglob("trips.*")]


def _shadowed(server, schema):
    """How often each prediction id lies in the shadow's table."""
    return Counter(row["prediction_id"] for row in shadow_rows(server, schema))
