"""The stack as its people meet it: schedules that stay as they were set, runs dropped, failed and cancelled, services
that come back, commands and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from ferry import BEGIN, END, SHIFT, WEEK, WORKLOAD

from flows.site import read_state
from noria.records import Window
from registry.store import Store
from tests.conftest import gone

DEPLOY = """
from pathlib import Path
from flows.schedule import deploy
from flows.services import warm_socket
from flows.site import Site
site = Site.here()
deploy(site.settings.imports, warm_socket(site.settings.root), Path.cwd())
"""
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
AT_THE_END = Window(END - WEEK, END)
"""A week that nobody asked about before."""


class Prefect:
    """Prefect's API, as its UI uses it."""

    def __init__(self, url):
        self.url = url

    def get(self, path):
        return httpx.get(f"{self.url}/{path}", timeout=30, trust_env=False).raise_for_status().json()

    def send(self, path, body, method="POST"):
        """Asked again while the server says 503, as Prefect's own client does: its SQLite is locked for a moment."""
        deadline = time.monotonic() + 60
        while True:
            answer = httpx.request(method, f"{self.url}/{path}", json=body, timeout=30, trust_env=False)
            if answer.status_code != 503 or time.monotonic() > deadline:
                answer.raise_for_status()
                return answer.json() if answer.content else None
            time.sleep(0.5)

    def deployment(self, name):
        return self.get(f"deployments/name/{name}/ferry")

    def runs(self, deployment, *states):
        wanted = {"deployments": {"id": {"any_": [deployment["id"]]}}}
        if states:
            wanted["flow_runs"] = {"state": {"type": {"any_": list(states)}}}
        return self.send("flow_runs/filter", wanted)

    def start(self, name, **parameters):
        made = self.send(f"deployments/{self.deployment(name)['id']}/create_flow_run", {"parameters": parameters})
        return made["id"]

    def state(self, run):
        return self.get(f"flow_runs/{run}")["state"]

    def until(self, run, *states, patience=300):
        return wait(lambda: (state := self.state(run))["type"] in states and state, patience, f"{states} of {run}")


@pytest.fixture(scope="module")
def prefect(site):
    return Prefect(site.settings.prefect_url)


@pytest.fixture(scope="module")
def store(site):
    return Store(site.address("mlflow_uri"))


def wait(condition, seconds=120.0, what=""):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return found


def test_every_flow_is_deployed_and_the_watch_is_planned(prefect):
    watch, retrain, batch = (prefect.deployment(name) for name in ("watch", "retrain", "batch"))
    assert [one["schedule"]["cron"] for one in watch["schedules"]] == [WORKLOAD.schedules.watch]
    assert retrain["schedules"] == batch["schedules"] == []
    planned = wait(lambda: prefect.runs(watch, "SCHEDULED"), what="planned runs")
    moments = [datetime.fromisoformat(run["expected_start_time"]) for run in planned]
    assert min(moments) > datetime.now(UTC)
    assert {(moment.weekday(), moment.hour) for moment in moments} == {(0, 6)}


def test_what_a_person_changed_stays_when_the_stack_starts_again(prefect, stack_environment):
    watch, retrain = prefect.deployment("watch"), prefect.deployment("retrain")
    (schedule,) = watch["schedules"]
    place = f"deployments/{watch['id']}/schedules/{schedule['id']}"
    theirs = {"schedule": {"cron": "30 4 * * 2", "timezone": "Europe/Berlin"}, "active": False}
    prefect.send(place, theirs, "PATCH")
    prefect.send(f"deployments/{retrain['id']}", {"paused": True}, "PATCH")
    try:
        subprocess.run([sys.executable, "-c", DEPLOY], env=stack_environment, check=True, timeout=120)
        (kept,) = prefect.deployment("watch")["schedules"]
        assert (kept["schedule"]["cron"], kept["schedule"]["timezone"]) == ("30 4 * * 2", "Europe/Berlin")
        assert not kept["active"]
        assert prefect.deployment("retrain")["paused"]
        assert prefect.deployment("watch")["id"] == watch["id"]
        named = Counter(one["name"] for one in prefect.send("automations/filter", {}))
        assert named == {"retrain ferry when asked": 1}
    finally:
        prefect.send(place, {"schedule": schedule["schedule"], "active": True}, "PATCH")
        prefect.send(f"deployments/{retrain['id']}", {"paused": False}, "PATCH")


def test_a_retrain_without_data_fails_with_its_sentence(finished_loop, prefect, store):
    run = prefect.start("retrain", now=BEGIN.isoformat(), reason="manual")
    state = prefect.until(run, *FINAL)
    assert state["type"] == "FAILED"
    assert "'ferry' has no usable labelled rows" in state["message"]
    note = store.notes("ferry")["noria.retrain"]
    assert (note["verdict"], note["reason"]) == ("failed", "manual")


def test_one_retrain_at_a_time_and_it_ends_when_cancelled(finished_loop, prefect, site, store):
    first = prefect.start("retrain", now=END.isoformat(), reason="manual")
    prefect.until(first, "RUNNING")
    second = prefect.start("retrain", now=END.isoformat(), reason="manual")
    assert prefect.until(second, *FINAL)["type"] == "CANCELLED"
    assert prefect.state(first)["type"] == "RUNNING", "the one under way goes on"

    # Once it trains: Ray brings a handler of SIGTERM, which must not take the place of Prefect's.
    wait(lambda: trains(site), what="Ray's controller of a training")
    run = driver(site)
    relay = int(str(prefect.get(f"flow_runs/{first}")["infrastructure_pid"]).rsplit(":", 1)[-1])
    family = [psutil.Process(relay), run, *run.children(recursive=True)]
    prefect.send(f"flow_runs/{first}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert prefect.until(first, *FINAL)["type"] == "CANCELLED"
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [one for one in alive if not gone(one)]
    # Failed, or what it had come to before the signal: nothing says any more that one is under way.
    assert store.notes("ferry")["noria.retrain"]["verdict"] is not None


def trains(site):
    """Whether the stack's Ray trains."""
    ray = psutil.Process(read_state(site.settings.root)["services"]["ray"]["pid"])
    return [one for one in ray.children(recursive=True) if "TrainController" in " ".join(arguments(one))]


def arguments(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def driver(site):
    """The process of a flow run, forked by the warm engine, that is connected to Ray."""
    ray = int(site.address("ray_address").rpartition(":")[2])
    engine = psutil.Process(read_state(site.settings.root)["services"]["engine"]["pid"])
    (found,) = [
        one for one in engine.children() if ray in [at.raddr.port for at in one.net_connections("tcp") if at.raddr]
    ]
    return found


def test_a_retrain_that_nobody_disturbs_completes_after_all_that(finished_loop, prefect, store, noria):
    ended = noria("train", "ferry", "--now", END.isoformat())
    assert ended.returncode == 0, ended.stderr
    newest = max(version.number for version in store.versions("ferry"))
    assert f"version {newest}: " in ended.stdout
    note = store.notes("ferry")["noria.retrain"]
    assert note["verdict"] in ("promoted", "refused") and note["version"] == newest


def test_a_batch_is_scored_beside_its_source_and_logged_once(finished_loop, site, noria, tmp_path):
    rows = WORKLOAD.records(AT_THE_END).drop_columns("minutes").slice(0, 200)
    source = tmp_path / "crossings.parquet"
    pq.write_table(rows, source)
    before = logged(site)
    for _ in range(2):
        ended = noria("batch", "ferry", str(source), "--now", END.isoformat())
        assert ended.returncode == 0, ended.stderr
        assert "scored 200 rows" in ended.stdout
    scored = pq.read_table(tmp_path / "crossings-scored.parquet")
    assert scored.select(rows.column_names).equals(rows)
    assert set(scored.column("action").to_pylist()) <= {"late", "on time"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
    new = logged(site) - before
    assert new == Counter(scored.column("prediction_id").to_pylist())
    assert set(new.values()) == {1}


def test_another_file_at_the_same_time_is_another_batch(finished_loop, site, noria, tmp_path):
    before = logged(site)
    source = tmp_path / "crossings.parquet"
    for start in (200, 300):
        pq.write_table(WORKLOAD.records(AT_THE_END).drop_columns("minutes").slice(start, 100), source)
        assert noria("batch", "ferry", str(source), "--now", END.isoformat()).returncode == 0
    new = logged(site) - before
    assert len(new) == 200 and set(new.values()) == {1}


def logged(site):
    """How often each prediction id is in the log, as it lies there."""
    table = DeltaTable(site.lake(site.workload("ferry")).address("predictions")).to_pyarrow_table(
        columns=["prediction_id"]
    )
    return Counter(table.column("prediction_id").to_pylist())


def test_a_killed_service_comes_back_and_it_is_said(site, noria):
    state = read_state(site.settings.root)
    killed, began = state["services"]["evidently"], state["services"]["evidently"]["restarts"]
    os.kill(int(killed["pid"]), signal.SIGKILL)

    def back():
        entry = read_state(site.settings.root)["services"]["evidently"]
        return entry["ready"] and entry["restarts"] > began

    wait(back, what="evidently")
    ended = noria("status", "--json")
    assert ended.returncode == 0
    told = json.loads(ended.stdout)
    assert told["phase"] == "ready"
    assert any("evidently ended with code -9; restarting it" in event for event in told["events"])
    assert httpx.get(f"{killed['url']}/api/version", trust_env=False).is_success
    assert "evidently ended" in noria("status").stdout


def test_a_stack_whose_engine_was_killed_runs_flows_again(finished_loop, site, noria):
    services = read_state(site.settings.root)["services"]
    os.kill(int(services["engine"]["pid"]), signal.SIGKILL)

    def back():
        now = read_state(site.settings.root)
        return now["phase"] == "ready" and all(
            now["services"][name]["restarts"] > services[name]["restarts"] for name in ("engine", "worker")
        )

    wait(back, 240, "engine and worker")
    ended = noria("watch", "ferry", "--now", SHIFT.isoformat())
    assert ended.returncode in (0, 4), ended.stderr
    assert "→" in ended.stdout


def test_up_finds_the_stack_that_runs(site, noria):
    before = read_state(site.settings.root)["pid"]
    ended = noria("up")
    assert ended.returncode == 0, ended.stderr
    assert "ready" in ended.stdout and site.settings.serving_url in ended.stdout
    assert read_state(site.settings.root)["pid"] == before


def test_what_does_not_exist_gets_a_sentence(finished_loop, noria, tmp_path):
    for arguments, sentence in {
        ("train", "bus"): "There is no workload 'bus'; known are ferry.",
        ("watch", "workloads.taxi:WORKLOAD"): "Nothing is deployed as watch/taxi",
        ("batch", "ferry", str(tmp_path / "none.parquet")): "There is no file",
    }.items():
        ended = noria(*arguments)
        assert ended.returncode == 1
        assert sentence in ended.stderr, ended.stderr
        assert "Traceback" not in ended.stderr


def test_the_last_watch_is_on_the_version_where_people_look(finished_loop, store):
    said = json.loads(store.get("ferry", 2).tags["noria.watch"])
    assert said["rows"] > 0 and said["reasons"] and said["verdict"] and said["decision"]
    assert datetime.fromisoformat(said["window_end"]) <= END
