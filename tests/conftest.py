"""What every tier shares: markers by folder, one small bundle that is made by hand (no training), and one stack."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import psutil
import pyarrow as pa
import pytest
from onnx import TensorProto, helper

from flows.site import Site
from flows.stack import down
from noria.decision import Band, Bands
from noria.metrics import evaluate
from noria.options import TrainingOptions
from noria.records import DatasetRef, Window, moment
from noria.runtime import open_session, score
from noria.schema import MISSING_INTEGER, Column, Schema
from noria.settings import Settings
from noria.workload import Workload
from registry.bundle import Contents, Facts, write
from registry.environment import environment
from registry.proof import Proof
from serving.capture import Segment
from serving.datatypes import NUMPY
from serving.model import Model, load
from tests.side_by_side import BESIDE

STREAM = Path(__file__).parent / "stream"
"""Folder of the workload that the stack of the tests runs."""
TIERS = ("unit", "integration", "browser", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The quick ones first; the browser on a stack that no other test has touched yet. Its driver keeps an event loop
    # running in this thread, so whatever runs one of its own must come before.
    items.sort(
        key=lambda item: [tier in Path(str(item.path)).parts for tier in ("unit", "gpu", "browser")], reverse=True
    )
    for item in items:
        for tier in TIERS:
            if tier in Path(str(item.path)).parts:
                item.add_marker(tier)
        shares = "site" in getattr(item, "fixturenames", ())
        for mark, files in BESIDE.items():
            if (item.path.parent.name == "integration" and item.path.name in files) or (shares and mark == "ray"):
                item.add_marker(mark)
        if shares:
            # The first of them starts the stack, and may live through the stream.
            item.add_marker(pytest.mark.timeout(1200))


class Clock:
    """Stands where a module finds `time`."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], Clock]:
    """Gives a module a clock that goes only when it is set."""

    def given(module: ModuleType) -> Clock:
        made = Clock()
        monkeypatch.setattr(module, "time", made)
        return made

    return given


@pytest.fixture(scope="session")
def trips_schema() -> Schema:
    return Schema(
        (
            Column("distance", "number", low=0, high=100, description="metered miles", example=2.5),
            Column("zone", "integer", example=132),
            Column("vendor", "string", example="A"),
            Column("pickup", "timestamp", required=True, example="2018-03-01T08:30:00"),
        ),
        event_time="pickup",
        target="minutes",
    )


@pytest.fixture(scope="session")
def trips_graph() -> bytes:
    """score = distance (missing: 0) + vendor (A 1, B 2, missing 0, unknown 3) + part of the day + 1 without a zone."""
    number, whole = TensorProto.FLOAT, TensorProto.INT64
    nodes = [
        helper.make_node("IsNaN", ["distance"], ["absent"]),
        helper.make_node("Where", ["absent", "zero", "distance"], ["miles"]),
        helper.make_node(
            "LabelEncoder", ["vendor"], ["seller"], domain="ai.onnx.ml",
            keys_strings=["", "A", "B"], values_floats=[0.0, 1.0, 2.0], default_float=3.0,
        ),
        helper.make_node("Mod", ["pickup", "day"], ["second"]),
        helper.make_node("Cast", ["second"], ["second_number"], to=number),
        helper.make_node("Div", ["second_number", "day_number"], ["part"]),
        helper.make_node("Equal", ["zone", "missing"], ["nowhere"]),
        helper.make_node("Cast", ["nowhere"], ["nowhere_number"], to=number),
        helper.make_node("Sum", ["miles", "seller", "part", "nowhere_number"], ["score"]),
    ]  # fmt: skip
    inputs = {"distance": number, "zone": whole, "vendor": TensorProto.STRING, "pickup": whole}
    graph = helper.make_graph(
        nodes,
        "trips",
        [helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("score", number, ["n"])],
        [
            helper.make_tensor("zero", number, [], [0.0]),
            helper.make_tensor("day", whole, [], [86_400]),
            helper.make_tensor("day_number", number, [], [86_400.0]),
            helper.make_tensor("missing", whole, [], [MISSING_INTEGER]),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="session")
def trips() -> pa.Table:
    """2,000 raw rows of the first half of 2018, 5% missing in every optional column."""
    rows, generator = 2000, np.random.default_rng(0)
    seconds = np.sort(generator.integers(0, 86_400 * 180, rows)) * np.timedelta64(1, "s")
    return pa.table(
        {
            "distance": pa.array(generator.exponential(3, rows), mask=generator.random(rows) < 0.05),
            "zone": pa.array(generator.integers(1, 264, rows), mask=generator.random(rows) < 0.05),
            "vendor": pa.array(generator.choice(["A", "B"], rows), mask=generator.random(rows) < 0.05),
            "pickup": pa.array(np.datetime64("2018-01-01", "us") + seconds, pa.timestamp("us", tz="UTC")),
        }
    )


@pytest.fixture(scope="session")
def make_contents(trips_schema: Schema, trips_graph: bytes, trips: pa.Table) -> Callable[..., Contents]:
    """A bundle's contents, with changes."""
    scores = score(open_session(trips_graph), trips_schema.tensors(trips)).astype(np.float64)
    truth = scores + np.random.default_rng(1).normal(0, 1, len(scores))
    subjects = {"candidate": scores, "naive": np.full(len(scores), np.median(truth)), "boosted": scores * 1.05}
    window = Window(moment("2018-01-01"), moment("2018-07-01"))
    contents = {
        "model": trips_graph,
        "facts": Facts("trips", "regression", "absolute_error", unit="min", notes="Distance is the metered one."),
        "schema": trips_schema,
        "bands": Bands((Band("long", 5.0),), "short"),
        "proof": Proof.make(trips_graph, trips_schema, trips),
        "reference": trips.append_column("minutes", pa.array(truth))
        .append_column("score", pa.array(scores))
        .append_column("split", pa.array(["train"] * len(scores))),
        "dataset": DatasetRef("trips", window, window.end, {"records": 0}, len(scores), "ab" * 32),
        "evaluations": {
            name: evaluate(truth, found, task="regression", loss="absolute_error") for name, found in subjects.items()
        },
        "thresholds": {"rows": 100},
        "parity": {"rows": 10_000, "worst": 1e-6},
        "environment": environment(),
    }
    return lambda **changes: Contents(**{**contents, **changes})


class Parcels(Workload):
    """Hours until a parcel arrives, from a column of every kind; small, with a truth that a model can learn."""

    name = "parcels"
    task = "regression"
    log_target = True
    unit = "hours"
    schema = Schema(
        (
            Column("weight", "number", low=0, example=1.5),
            Column("depot", "integer", example=7),
            Column("service", "string", example="express"),
            Column("sent", "timestamp", required=True, example="2020-01-06T09:00:00"),
            Column("remark", "text", example="fragile glass"),
            Column("sender", "string", feature=False, example="shop 1"),
        ),
        event_time="sent",
        target="hours",
    )
    training = TrainingOptions(epochs=6, minimum_rows=200, minimum_steps=100, hidden=(16,), words=8)

    def slices(self, table: pa.Table) -> dict[str, np.ndarray]:
        return {"express": np.array([service == "express" for service in table.column("service").to_pylist()])}


@pytest.fixture(scope="session")
def parcels() -> Parcels:
    return Parcels()


@pytest.fixture(scope="session")
def sent_parcels() -> Callable[..., pa.Table]:
    """Labelled rows, an hour between two; `slower` multiplies the truth, 3% missing in every optional column."""

    def make(rows: int = 2000, seed: int = 0, slower: float = 1.0) -> pa.Table:
        generator = np.random.default_rng(seed)
        weight, depot = generator.exponential(2, rows), generator.integers(1, 9, rows)
        service = generator.choice(["express", "normal", "slow"], rows)
        remark = generator.choice(["fragile glass", "LEAVE at\nthe door", "", "call first please"], rows)
        hours = (2 + weight + depot / 2) * np.select([service == "express", service == "slow"], [0.5, 2.0], 1.0)
        hours *= np.where(remark == "fragile glass", 1.5, 1.0) * generator.lognormal(0, 0.1, rows) * slower
        start = np.datetime64("2020-01-06T00:00", "us")
        return pa.table(
            {
                "weight": pa.array(weight, mask=generator.random(rows) < 0.03),
                "depot": pa.array(depot, mask=generator.random(rows) < 0.03),
                "service": pa.array(service, mask=generator.random(rows) < 0.03),
                "sent": pa.array(start + np.arange(rows) * np.timedelta64(1, "h"), pa.timestamp("us", tz="UTC")),
                "remark": pa.array(remark),
                "sender": pa.array([f"shop {row % 5}" for row in range(rows)]),
                "hours": hours,
            }
        )

    return make


@pytest.fixture(scope="session")
def unsyncable() -> Callable[[Segment], None]:
    """Let writes to a segment of the log succeed from now on, and its syncs fail: there is a device like that."""

    def make(segment: Segment) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, segment.descriptor)
        os.close(null)

    return make


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, or is a zombie that nobody has waited for; it may go while it is looked at."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def processes_of(home: Path) -> list[str]:
    """Commands of the processes that belong to a home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NORIA_HOME") == str(home) and process.pid != os.getpid():
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """One running stack for the whole session, with the workload of tests/stream as its only one. Starts in 30-60 s.

    Tests share it: leave it as you found it (schedules, aliases, processes). Its home is kept when a test failed.
    """
    # Short: Ray and the warm engine keep Unix sockets in it, whose paths are limited.
    home = Path(tempfile.mkdtemp(prefix="noria-test-"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("NORIA_", "PREFECT_", "MLFLOW_", "RAY_"))]:
            patch.delenv(name)
        patch.setenv("PYTHONPATH", str(STREAM))
        asked = Site(Settings(home=home, workloads="ferry:WORKLOAD", ingest=False))
        try:
            # By a process that ends, as `noria up` does: the stack must outlive whoever asked for it.
            start = "from flows.site import Site; from flows.stack import up; up(Site.here(), patience=240)"
            environment = {**os.environ, **asked.forwarded()}
            subprocess.run([sys.executable, "-c", start], env=environment, check=True, timeout=300)
            yield asked.found()
        finally:
            down(asked, patience=120)
            # It returns with the supervisor's lock, moments before that process has ended.
            deadline = time.monotonic() + 15
            while (left := processes_of(home)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not left, f"`down` left processes behind: {left}"
    if not request.session.testsfailed:
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def stack_environment(site: Site) -> dict[str, str]:
    """The environment in which a person would run commands beside the stack."""
    prefect = {
        "PREFECT_API_URL": site.settings.prefect_url,
        "PREFECT_HOME": str(site.settings.root / "prefect"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }
    here = {"NORIA_HOME": str(site.settings.root), "NORIA_WORKLOADS": "ferry:WORKLOAD", "NORIA_INGEST": "False"}
    return {**os.environ, **here, **prefect, "PYTHONPATH": str(STREAM), "DO_NOT_TRACK": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def finished_loop(site: Site, stack_environment: dict[str, str]) -> dict[str, Any]:
    """The ferry's stream, lived through once: the demo's story, and `answers` by week (ids, versions, scores).

    Two versions are there afterwards: the first, and the champion that came of the retrain after the shift.
    """
    command = [sys.executable, str(STREAM / "live.py")]
    lived = subprocess.run(command, env=stack_environment, capture_output=True, text=True, timeout=900, check=False)
    assert lived.returncode == 0, lived.stderr[-5000:]
    story: dict[str, Any] = json.loads(lived.stdout)
    return story


@pytest.fixture(scope="session")
def noria(stack_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a `noria` command beside the stack, as a person would."""
    command = str(Path(sys.executable).with_name("noria"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *arguments], env=stack_environment, capture_output=True, text=True, timeout=600, check=False
        )

    return run


@pytest.fixture(scope="session")
def trips_model(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Model:
    """The tiny workload as the server holds it."""
    folder = tmp_path_factory.mktemp("trips") / "1"
    write(folder, make_contents())
    return load("trips", 1, folder, "cpu")


@pytest.fixture(scope="session")
def identity_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """A plain model `same`: y = x, of a v2 datatype and a shape (-1: free)."""
    folder = tmp_path_factory.mktemp("identity")

    def make(datatype: str, shape: tuple[int, ...] = (-1, 3)) -> Model:
        place = folder / f"{datatype}{shape}"
        if not place.exists():
            place.mkdir()
            onnx.save(identity_graph(datatype, shape), place / "model.onnx")
        return load("same", 1, place, "cpu", plain=True)

    return functools.cache(make)


def identity_graph(datatype: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """y = x."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(NUMPY[datatype]))
    sizes = [size if size >= 0 else f"free{index}" for index, size in enumerate(shape)]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", kind, sizes)],
        [helper.make_tensor_value_info("y", kind, sizes)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
