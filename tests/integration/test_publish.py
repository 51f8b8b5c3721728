"""Watching a small stream with real tables and a real Evidently workspace, read back through its real UI server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from monitoring.drift import calibrate
from monitoring.publish import ensure_project, publish
from monitoring.window import Observation, observe
from noria.lake import Lake
from noria.metrics import evaluate
from noria.records import Version, Window, moment
from noria.schema import Column, Schema
from noria.workload import Workload
from registry.bundle import Bundle, Contents, write

WEEK = timedelta(weeks=1)
START = moment("2018-07-02")


class Trips(Workload):
    name = "trips"
    task = "regression"
    unit = "minutes"
    schema = Schema(
        (
            Column("distance", "number", low=0, high=100, example=2.5),
            Column("zone", "integer", example=132),
            Column("vendor", "string", example="A"),
            Column("pickup", "timestamp", required=True, example="2018-03-01T08:30:00"),
        ),
        event_time="pickup",
        target="minutes",
    )


WORKLOAD = Trips()


def rows(start: datetime, count: int, seed: int, *, longer: float = 1.0) -> pa.Table:
    """A week of calm raw rows with their truth and a score that is right up to noise."""
    one = np.random.default_rng(seed)
    seconds = np.sort(one.integers(0, 7 * 86_400, count)) + int(start.timestamp())
    distance = one.exponential(3, count) * longer
    return pa.table(
        {
            "distance": distance,
            "zone": one.integers(1, 20, count),
            "vendor": one.choice(["A", "B"], count),
            "pickup": pa.array(seconds * 1_000_000, pa.timestamp("us", tz="UTC")),
            "score": 4 * distance + 2,
            "minutes": 4 * distance + 2 + one.normal(0, 1, count),
        }
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Bundle:
    weeks = [rows(START - (26 - week) * WEEK, 400, week) for week in range(26)]
    reference = pa.concat_tables(weeks).append_column("split", pa.array(["train"] * 26 * 400))
    labels, scores = (reference.column(name).to_numpy()[-1000:] for name in ("minutes", "score"))
    contents = make_contents(
        reference=reference,
        thresholds=calibrate(reference, WORKLOAD.schema, WORKLOAD.drift),
        evaluations={"candidate": evaluate(labels, scores, task="regression", loss="absolute_error")},
    )
    folder = tmp_path_factory.mktemp("bundle")
    write(folder, contents)
    return Bundle.open(folder)


class Stream:
    """Writes predictions and late labels of week after week, and watches at each week's end."""

    def __init__(self, root: Path, bundle: Bundle) -> None:
        self.lake = Lake(str(root), "trips", WORKLOAD.schema)
        self.bundle = bundle
        self.week = 0
        self.late: pa.Table | None = None

    def live(self, table: pa.Table, version: int = 1) -> Window:
        """Log a week's predictions; the labels of the week before arrive."""
        window = Window(START + self.week * WEEK, START + (self.week + 1) * WEEK)
        self.week += 1
        count = len(table)
        ids = pa.array([f"{self.week}-{row}" for row in range(count)])
        logged = {
            "prediction_id": ids,
            "event_time": table.column("pickup"),
            "version": pa.array([version] * count, pa.int64()),
            "action": pa.nulls(count, pa.string()),
            "latency_ms": pa.array([1.0] * count),
        }
        predictions = table.drop_columns(["minutes"])
        for name, values in logged.items():
            predictions = predictions.append_column(name, values)
        self.lake.append("predictions", predictions)
        if self.late is not None:
            self.lake.append("labels", self.late)
        arrived = pa.array([window.end + WEEK] * count, pa.timestamp("us", tz="UTC"))
        self.late = pa.table({"prediction_id": ids, "label": table.column("minutes"), "arrived": arrived})
        return window

    def watch(self, window: Window, version: int = 1) -> Observation:
        one = Version("trips", version, "run", START)
        return observe(lake=self.lake, bundle=self.bundle, version=one, window=window, workload=WORKLOAD)

    def next(self, count: int = 400, **changes: Any) -> Observation:
        start = START + self.week * WEEK
        return self.watch(self.live(rows(start, count, 1000 + self.week, **changes)))


@pytest.fixture
def stream(tmp_path: Path, bundle: Bundle) -> Stream:
    return Stream(tmp_path / "lake", bundle)


def test_a_stream_is_judged_week_by_week(stream: Stream) -> None:
    first = stream.next().report
    assert first.verdict == "ok" and first.quality is None
    assert first.serving_since is not None and first.serving_since >= START
    second = stream.next().report
    assert second.verdict == "ok" and second.quality is not None and second.quality.rows == 400
    assert second.quality.newest is not None and second.quality.newest < START + WEEK
    third = stream.next(longer=3).report
    assert third.verdict == "drift" and third.prediction is not None and third.prediction.drifted
    assert {one.column for one in third.columns if one.drifted} == {"distance"}
    worse = rows(START + stream.week * WEEK, 400, 7)
    minutes = pa.array(worse.column("minutes").to_numpy() + 5)
    stream.watch(stream.live(worse.set_column(worse.column_names.index("minutes"), "minutes", minutes)))
    fifth = stream.next().report
    assert fifth.verdict == "quality" and "error" in fifth.reasons[0]


def test_few_or_no_rows_are_unknown(stream: Stream) -> None:
    nothing = stream.watch(Window(START, START + WEEK)).report
    assert (nothing.verdict, nothing.rows, nothing.quality, nothing.prediction) == ("unknown", 0, None, None)
    few = stream.next(50).report
    assert few.verdict == "unknown" and "50 rows" in few.reasons[0]


def test_schema_faults_ask_for_a_person(stream: Stream) -> None:
    table = rows(START, 400, 1)
    nulls = pa.nulls(400, pa.string())
    gone = stream.watch(stream.live(table.set_column(table.column_names.index("vendor"), "vendor", nulls))).report
    assert gone.verdict == "schema" and "'vendor' is missing" in gone.reasons[0]
    table = rows(START + WEEK, 400, 2)
    far = pa.array(table.column("distance").to_numpy() + 200)
    broken = stream.watch(stream.live(table.set_column(0, "distance", far))).report
    assert broken.verdict == "schema" and broken.violations == {"distance: above 100": 400}


def test_only_the_serving_versions_answers_count_for_its_quality(stream: Stream) -> None:
    stream.next()
    window = stream.live(rows(START + WEEK, 400, 3), version=2)
    seen = stream.watch(window, version=2).report
    assert seen.quality is None and seen.rows == 400 and seen.verdict == "ok"
    assert stream.watch(window, version=1).report.quality is not None


def test_runs_and_dashboard_are_in_the_workspace(stream: Stream, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    pages = [publish(stream.next(longer=longer), workspace) for longer in (1.0, 1.0, 3.0)]
    pages.append(publish(stream.watch(Window(START + 9 * WEEK, START + 10 * WEEK)), workspace))
    assert len(set(pages)) == 4
    project = workspace / pages[0].split("/")[1]
    snapshots = [json.loads(path.read_text()) for path in (project / "snapshots").iterdir()]
    shown = sorted(snapshots, key=lambda one: str(one["timestamp"]))
    assert [one["metadata"]["verdict"] for one in shown] == ["ok", "ok", "drift", "unknown"]
    assert [one["metadata"]["model version"] for one in shown] == ["1"] * 4
    assert shown[0]["timestamp"].startswith("2018-07-09")
    drift = {
        result["metric_value_location"]["metric"]["params"]["column"]: result["value"]
        for result in shown[2]["metric_results"].values()
        if result["metric_value_location"]["metric"]["params"]["type"].endswith(":CalibratedDrift")
    }
    assert drift["distance"] > 1 and drift["prediction"] > 1 and drift["vendor"] < 1
    panels = json.loads((project / "dashboard.json").read_text())["panels"]
    titles = {panel["title"] for panel in panels}
    assert {"Error (minutes)", "Drifted columns", "Prediction drift", "Rows", "Missing values by column"} <= titles


def test_publishing_a_window_again_replaces_it(stream: Stream, tmp_path: Path) -> None:
    seen = stream.next()
    assert publish(seen, tmp_path / "workspace") == publish(seen, tmp_path / "workspace")
    assert len(list((tmp_path / "workspace").glob("*/snapshots/*.json"))) == 1


def test_what_a_person_changed_in_the_project_stays(stream: Stream, tmp_path: Path) -> None:
    project = tmp_path / str(ensure_project(WORKLOAD, tmp_path))
    metadata = json.loads((project / "metadata.json").read_text())
    (project / "metadata.json").write_text(json.dumps({**metadata, "name": "Our trips"}))
    (project / "dashboard.json").write_text('{"tabs": [], "panels": []}')
    publish(stream.next(), tmp_path)
    assert json.loads((project / "metadata.json").read_text())["name"] == "Our trips"
    assert json.loads((project / "dashboard.json").read_text())["panels"] == []


def test_the_first_publishers_meet_and_make_one_project(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        projects = list(pool.map(ensure_project, [WORKLOAD] * 8, [tmp_path] * 8))
    assert len(set(projects)) == 1
    assert len(json.loads((tmp_path / str(projects[0]) / "dashboard.json").read_text())["panels"]) > 5


def test_two_publishers_at_once_lose_no_run(stream: Stream, tmp_path: Path) -> None:
    seen = [stream.next(), stream.next()]
    with ThreadPoolExecutor(2) as pool:
        pages = list(pool.map(publish, seen, [tmp_path / "workspace"] * 2))
    assert len({page.split("/")[1] for page in pages}) == 1
    found = [json.loads(path.read_text()) for path in (tmp_path / "workspace").glob("*/snapshots/*.json")]
    assert sorted(one["timestamp"][:10] for one in found) == ["2018-07-09", "2018-07-16"]


def test_reports_of_other_versions_do_not_collide(stream: Stream, tmp_path: Path) -> None:
    seen = stream.next()
    assert publish(seen, tmp_path) != publish(stream.watch(seen.report.window, version=2), tmp_path)


@pytest.fixture
def evidently_ui(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "evidently"), "ui", "--workspace", str(workspace)]
    with (tmp_path / "ui.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "DO_NOT_TRACK": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/api/projects", 120)
        yield f"http://127.0.0.1:{port}", workspace
    finally:
        server.terminate()
        server.wait(20)


def wait_for(url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(f"{url} did not answer in {seconds} s")


def test_a_running_ui_shows_new_runs_and_their_series(stream: Stream, evidently_ui: tuple[str, Path]) -> None:
    address, workspace = evidently_ui
    pages = [publish(stream.next(longer=longer), workspace) for longer in (1.0, 1.0, 3.0)]
    project = pages[0].split("/")[1]
    end = time.monotonic() + 30
    while len(httpx.get(f"{address}/api/projects/{project}/reports").json()) < 3:
        assert time.monotonic() < end, "the UI did not notice the new runs"
        time.sleep(0.3)
    wanted = [{"metric": "evidently:metric_v2:Figure", "metric_labels": {"name": "rows"}, "tags": [], "metadata": {}}]
    series = httpx.post(f"{address}/api/v2/snapshots/{project}/data_series_batch", json={"series_filter": wanted})
    values = [one["values"] for one in series.raise_for_status().json()["series"]]
    assert values == [[400.0, 400.0, 400.0]]
