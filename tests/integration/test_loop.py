"""The whole loop on real parts: train, promote, serve, shift, alarm, retrain, swap; lived through once, looked at."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import datetime

import httpx
import pytest
from ferry import A_DAY, FIRST, SHIFT, WEEK, WORKLOAD
from mlflow import MlflowClient

from noria.records import Window
from registry.store import Store

RECORD = {"departed": "2024-03-30T12:00:00", "pier": "north", "cars": 30}
CALM, SHIFTED, SWAPPED, AFTER = (0, 1), 2, 3, 4
"""Weeks of the story, by number."""


@pytest.fixture(scope="session")
def store(site):
    return Store(site.address("mlflow_uri"))


@pytest.fixture(scope="session")
def lake(site):
    return site.lake(site.workload("ferry"))


class Requests(threading.Thread):
    """One request after the other, until the block ends; what came back and when."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.answers, self.failures, self.done = f"{url}/predict/ferry", [], [], threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()

    def run(self):
        with httpx.Client(timeout=10, trust_env=False) as client:
            while not self.done.is_set():
                try:
                    answer = client.post(self.url, json={"records": [RECORD]}).raise_for_status().json()
                    self.answers.append((time.monotonic(), int(answer["version"])))
                except httpx.HTTPError as error:
                    self.failures.append(error)
                time.sleep(0.01)

    def first(self, version, since, patience=60.0):
        """Seconds from `since` to the first answer by `version`."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for moment, answered in list(self.answers):
                if moment > since and answered == version:
                    return moment - since
            time.sleep(0.01)
        raise AssertionError(f"no answer by version {version} in {patience} s; newest {self.answers[-3:]}")


def wait(condition, seconds=60.0, what=""):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return found


def test_no_request_failed(finished_loop):
    assert finished_loop["requests"]["failed"] == 0, finished_loop["requests"]["last_failure"]
    assert finished_loop["requests"]["sent"] > 5 * 7 * A_DAY / 64


def test_the_first_model_was_worth_serving(finished_loop, store):
    first = finished_loop["first_model"]
    assert first["error"] < first["naive_error"]
    assert store.get("ferry", 1).tags["noria.verdict"] == "promoted"
    assert store.get("ferry", 1).tags["noria.reason"] == "initial"


def test_calm_weeks_are_held(finished_loop):
    for number in CALM:
        week = finished_loop["weeks"][number]
        assert (week["verdict"], week["decision"], week["version"]) == ("ok", "hold", 1)
        assert week["rows"] == 7 * A_DAY


def test_the_shift_is_noticed_in_its_first_week(finished_loop):
    week = finished_loop["weeks"][SHIFTED]
    assert (week["verdict"], week["decision"]) == ("quality", "retrain")
    assert week["loop_error"] > 3 * finished_loop["weeks"][0]["loop_error"]
    assert any("surely above" in sentence for sentence in week["reasons"])


def test_one_retrain_was_asked_for_and_the_gate_let_it_pass(finished_loop, store):
    (retrain,) = finished_loop["retrains"]
    assert (retrain["verdict"], retrain["version"]) == ("promoted", 2)
    assert datetime.fromisoformat(retrain["requested"]) == SHIFT + WEEK
    tags = store.get("ferry", 2).tags
    assert (tags["noria.verdict"], tags["noria.reason"]) == ("promoted", "quality")
    assert "better" in tags["noria.verdict_because"] or "less error" in tags["noria.verdict_because"], tags


def test_prefect_shows_what_asked_for_the_retrain(finished_loop, site, store):
    run = httpx.get(f"{site.settings.prefect_url}/flow_runs/{run_of(store, 2)}").raise_for_status().json()
    assert run["created_by"]["type"] == "AUTOMATION"
    assert run["created_by"]["display_value"] == "retrain ferry when asked"
    assert run["parameters"]["reason"] == "quality"
    assert "surely above" in run["parameters"]["because"]
    assert f"{SHIFT + WEEK:%Y-%m-%d}" in run["name"] and "quality" in run["name"]


def run_of(store, number):
    """The flow run that made a version, as its MLflow run says."""
    return MlflowClient(store.uri).get_run(store.get("ferry", number).run_id).data.tags["noria.flow_run"]


def test_the_server_swapped_while_requests_went_on(finished_loop):
    versions = finished_loop["answers"][SWAPPED]["versions"]
    assert versions == sorted(versions), "an old version answered after the new one"
    assert set(versions) == {1, 2}
    assert set(finished_loop["answers"][AFTER]["versions"]) == {2}


def test_the_loop_beats_the_model_that_was_never_retrained(finished_loop):
    week = finished_loop["weeks"][AFTER]
    assert week["loop_error"] < 0.5 * week["frozen_error"]
    assert week["decision"] == "hold"


def test_every_answer_is_in_the_lake_once(finished_loop, lake):
    answered = [name for week in finished_loop["answers"] for name in week["ids"]]
    assert len(answered) == len(set(answered)) == 5 * 7 * A_DAY
    logged = lake._read("predictions", None, Window(SHIFT - 2 * WEEK, SHIFT + 3 * WEEK), "event_time")
    counts = Counter(logged.column("prediction_id").to_pylist())
    assert {counts[name] for name in answered} == {1}
    said = {
        name: (version, score)
        for week in finished_loop["answers"]
        for name, version, score in zip(week["ids"], week["versions"], week["scores"], strict=True)
    }
    for row in logged.to_pylist():
        if row["prediction_id"] in said:
            version, score = said[row["prediction_id"]]
            assert row["version"] == version and row["score"] == pytest.approx(score, rel=1e-5)


def test_every_truth_is_joined(finished_loop, lake):
    assert finished_loop["labels_joined"] >= 5 * 7 * A_DAY
    judged = lake.judged(Window(SHIFT - 2 * WEEK, SHIFT - WEEK), SHIFT)
    source = WORKLOAD.records(Window(SHIFT - 2 * WEEK, SHIFT - WEEK))
    assert sorted(judged.column("label").to_pylist()) == sorted(source.column("minutes").to_pylist())


def test_a_version_names_the_rows_that_it_was_trained_on(finished_loop, site, store, lake):
    ref = store.fetch(store.get("ferry", 2), site.settings.bundles).dataset
    rows = lake.read(ref)
    assert len(rows) == ref.rows
    assert ref.window.end == SHIFT + WEEK
    first = lake.read(store.fetch(store.get("ferry", 1), site.settings.bundles).dataset)
    assert len(first) == len(WORKLOAD.records(FIRST))


def test_traffic_follows_the_alias_moved_by_hand(finished_loop, site, store):
    client = MlflowClient(site.settings.mlflow_uri)
    began = store.version("ferry", "champion").number
    other = 1 if began != 1 else 2
    took = []
    with Requests(site.settings.serving_url) as requests:
        requests.first(began, 0.0)
        for target in (other, began, other):
            client.set_registered_model_alias("ferry", "champion", str(target))
            took.append(requests.first(target, time.monotonic()))
    assert not requests.failures
    assert sorted(took)[1] < 3.0, took

    def said(number):
        return store.get("ferry", number).tags["noria.serving"]

    wait(lambda: said(other).startswith("serving since") and f"replaced version {began}" in said(other), what="the tag")
    wait(lambda: said(began).startswith(f"replaced by version {other}"), what="the other tag")
    wait(lambda: store.version("ferry", "previous").number == began, what="the alias previous")


def test_rollback_brings_the_other_back(finished_loop, site, store, noria):
    before, other = (store.version("ferry", alias).number for alias in ("champion", "previous"))
    with Requests(site.settings.serving_url) as requests:
        requests.first(before, 0.0)
        ended = noria("rollback", "ferry")
        assert ended.returncode == 0, ended.stderr
        assert f"version {other} is the champion again" in ended.stdout
        requests.first(other, 0.0)
    assert not requests.failures
    assert store.version("ferry", "champion").number == other
    wait(lambda: store.version("ferry", "previous").number == before, what="the way back")
    assert store.get("ferry", other).tags["noria.reason"] == f"Rolled back from version {before}."


def test_a_version_is_promoted_by_command(finished_loop, store, noria):
    target = store.version("ferry", "previous").number
    ended = noria("promote", "ferry", str(target))
    assert (ended.returncode, ended.stdout.strip()) == (0, f"version {target} is the champion")
    assert store.version("ferry", "champion").number == target
    assert noria("rollback", "ferry").returncode == 0
    refused = noria("promote", "ferry", "99")
    assert refused.returncode == 1
    assert "99" in refused.stderr
