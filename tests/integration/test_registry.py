"""The registry on a real MLflow server: runs, versions, aliases; whole bundles; promotion that survives a kill."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from noria.errors import BundleError, RegistryError
from noria.runtime import open_session, score
from noria.schema import SchemaError
from registry.bundle import Bundle, write
from registry.promote import promote, rollback
from registry.store import Store

NOW = datetime(2020, 4, 6, 6, tzinfo=UTC)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(mlflow_url: str) -> Store:
    return Store(mlflow_url)


@pytest.fixture(scope="module")
def register(store: Store, make_contents):
    """A new version of the workload with that name."""

    def make(name: str):
        contents = make_contents()
        contents = replace(contents, facts=replace(contents.facts, name=name))
        with store.run(name, "test") as run:
            return store.register(run, contents)

    return make


def test_a_run_keeps_what_is_logged(store: Store, make_contents) -> None:
    contents = make_contents()
    with store.run("runs", "first", {"noria.trigger": "manual"}) as run:
        run.params({"epochs": 3, **{f"option_{index}": index for index in range(150)}})
        for step in range(3):
            run.metrics({"loss": 1.0 / (step + 1), "diverged": float("nan")}, step=step)
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        run.figure("curves.png", figure)
        plt.close(figure)
        run.text("gate.md", "**Promoted.**")
        run.data("quarantine.json", {"fare": np.int64(3)})
        run.tags({"noria.window": "13 weeks"})
        run.dataset(contents.dataset)
    found = store.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert len(found.data.params) == 151
    assert [point.value for point in store.client.get_metric_history(run.id, "loss")] == [1.0, 0.5, 1 / 3]
    assert {"noria.trigger", "noria.window"} <= found.data.tags.keys()
    assert {entry.path for entry in store.client.list_artifacts(run.id)} == {"curves.png", "gate.md", "quarantine.json"}
    assert found.inputs.dataset_inputs[0].dataset.name == "trips 2018-01-01 to 2018-07-01"


def test_a_run_whose_block_raises_has_failed(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.run("runs", "broken") as run:
        _ = 1 / 0
    assert store.client.get_run(run.id).info.status == "FAILED"


def test_registration_is_quiet_and_readable(store: Store, register, capfd) -> None:
    register("readable")
    capfd.readouterr()
    version = register("readable")
    assert capfd.readouterr() == ("", "")
    assert (version.workload, version.number, version.aliases) == ("readable", 2, ())
    assert version.tags["noria.error"].endswith(" min")
    assert store.versions("readable")[0] == version
    assert [entry.number for entry in store.versions("readable")] == [2, 1]
    shown = store.client.get_model_version("readable", "2").description
    assert " min mean absolute error on its test rows; " in shown.splitlines()[0]
    assert "better" in shown and "| naive baseline" in shown and "Trained on 2,000 labelled rows" in shown
    model = store.client.get_registered_model("readable").description
    assert "Predicts **minutes** (min)" in model and "| distance" in model and "champion" in model
    store.describe("readable", "Mine.")
    register("readable")
    assert store.client.get_registered_model("readable").description == "Mine.", "what a person wrote stays"


def test_aliases(store: Store, register) -> None:
    assert store.version("aliases", "champion") is None
    assert store.versions("aliases") == []
    store.drop("aliases", "champion")
    first, second = register("aliases"), register("aliases")
    assert store.version("aliases", "champion") is None
    store.move("aliases", "champion", first.number)
    store.move("aliases", "candidate", first.number)
    found = store.version("aliases", "champion")
    assert found is not None and found.number == 1 and found.aliases == ("candidate", "champion")
    store.move("aliases", "champion", second.number)
    assert [entry.aliases for entry in store.versions("aliases")] == [("champion",), ("candidate",)]
    store.drop("aliases", "champion")
    store.drop("aliases", "champion")
    assert store.version("aliases", "champion") is None
    with pytest.raises(RegistryError, match="no version 99 of 'aliases'"):
        store.move("aliases", "champion", 99)
    with pytest.raises(RegistryError, match="no version 1 of 'nobody'"):
        store.get("nobody", 1)


def test_tags_and_notes(store: Store, register) -> None:
    version = register("notes")
    store.tag(version, {"noria.serving": "loaded in 0.2 s"})
    assert store.get("notes", 1).tags["noria.serving"] == "loaded in 0.2 s"
    assert store.notes("unheard_of") == {}
    store.note("notes", {"noria.retrain": {"version": 1, "reasons": ["drift"]}, "noria.cooldown": None})
    assert store.notes("notes") == {"noria.retrain": {"version": 1, "reasons": ["drift"]}, "noria.cooldown": None}
    with pytest.raises(RegistryError, match=r"begin it with 'noria\."):
        store.note("notes", {"retrain": 1})


def test_standard_tools_answer_on_raw_columns(
    store: Store, register, trips, trips_schema, trips_graph, monkeypatch
) -> None:
    register("standard")
    store.move("standard", "champion", 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    model = mlflow.pyfunc.load_model("models:/standard@champion")
    assert [entry.name for entry in model.metadata.signature.inputs] == list(trips_schema.names)
    assert len(model.input_example) == 5
    raw = trips.slice(0, 200)
    expected = score(open_session(trips_graph), trips_schema.tensors(raw)).astype(np.float64)
    frame = raw.to_pandas()
    assert frame["zone"].isna().any() and frame["vendor"].isna().any() and str(frame["vendor"].dtype) == "str"
    seconds = frame["pickup"].astype("int64") // 10**6
    variants = {
        "pandas": frame,
        "naive times": frame.assign(pickup=frame["pickup"].dt.tz_localize(None)),
        "texts": frame.assign(pickup=frame["pickup"].astype(str)),
        "seconds": frame.assign(pickup=seconds),
        "objects": frame.astype(object).where(frame.notna(), None),
        "nullable": frame.astype({"zone": "Int64"}),
        "arrow": raw.to_pandas(types_mapper=pd.ArrowDtype),
        "other order and more": frame.assign(fare=1.0)[["fare", *reversed(frame.columns)]],
    }
    for name, variant in variants.items():
        answer = model.predict(variant)
        np.testing.assert_array_equal(answer["score"], expected, err_msg=name)
        assert list(answer["action"]) == ["long" if value > 5 else "short" for value in expected]
    without = model.predict(frame.drop(columns="vendor"))["score"]
    np.testing.assert_array_equal(without, model.predict(frame.assign(vendor=None))["score"])
    assert list(model.predict(model.input_example).columns) == ["score", "action"]
    with pytest.raises(MlflowException, match="pickup"):
        model.predict(frame.drop(columns="pickup"))
    with pytest.raises(SchemaError, match="'distance' is below 0"):
        model.predict(frame.assign(distance=-1.0))
    assert mlflow.onnx.load_model("models:/standard@champion").graph.output[0].name == "score"


def test_fetch_keeps_one_whole_copy(store: Store, register, tmp_path: Path) -> None:
    version = register("fetched")
    bundle = store.fetch(version, tmp_path)
    assert bundle.folder == tmp_path / "fetched" / "1"
    assert bundle.facts.name == "fetched"
    bundle.proof.check(open_session(bundle.model), bundle.schema)
    assert len(bundle.reference()) == 2000
    before = bundle.model.stat().st_mtime_ns
    assert store.fetch(version, tmp_path).model.stat().st_mtime_ns == before
    assert Store("http://127.0.0.1:1").fetch(version, tmp_path) == bundle, "what is there needs no server"
    bundle.model.write_bytes(b"damaged")
    store.fetch(version, tmp_path)
    assert _left(tmp_path / "fetched") == ["1"]


def test_a_copy_from_another_registry_is_replaced(store: Store, register, make_contents, tmp_path: Path) -> None:
    version, stranger = register("renewed"), register("renewed")
    old = store.fetch(stranger, tmp_path)
    old.folder.rename(tmp_path / "renewed" / "1")
    assert store.fetch(version, tmp_path).folder.name == "1"
    assert version.run_id in (tmp_path / "renewed" / "1" / "MLmodel").read_text()
    shutil.rmtree(tmp_path / "renewed")
    write(tmp_path / "renewed" / "1", make_contents())
    assert version.run_id in (store.fetch(version, tmp_path).folder / "MLmodel").read_text()


FETCH = """
import sys
from pathlib import Path
from registry.store import Store
store = Store(sys.argv[1])
version = store.get("killed", 1)
print("ready", flush=True)
store.fetch(version, Path(sys.argv[2]))
"""


def test_a_killed_fetch_leaves_no_version_and_the_next_one_works(store: Store, register, tmp_path: Path) -> None:
    version = register("killed")
    command = [sys.executable, "-c", FETCH, store.uri, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while not list(tmp_path.glob("killed/.fetch-*")):
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    left = [tmp_path / "killed" / name for name in _left(tmp_path / "killed")]
    assert [path.name.startswith(".fetch-") for path in left] == [True], "aside, and nothing that looks like a version"
    assert store.fetch(version, tmp_path).folder.name == "1"
    assert left[0].exists(), "it may belong to somebody who is still fetching"
    os.utime(left[0], (0, 0))
    (tmp_path / "killed" / "1" / "model.onnx").unlink()
    store.fetch(version, tmp_path)
    assert not left[0].exists(), "an hour later it is abandoned"


def test_what_was_changed_in_the_registry_is_refused(store: Store, register, tmp_path: Path) -> None:
    version = register("tampered")
    model_id = store.client.get_model_version("tampered", "1").source.removeprefix("models:/")
    other = tmp_path / "model.onnx"
    other.write_bytes(b"evil")
    store.client.log_model_artifacts(model_id, str(_only(tmp_path, other)))
    with pytest.raises(BundleError, match=r"model\.onnx was changed"):
        store.fetch(version, tmp_path / "bundles")
    assert _left(tmp_path / "bundles" / "tampered") == []


def test_a_version_under_another_name_is_refused(store: Store, register, tmp_path: Path) -> None:
    register("original")
    store.client.create_registered_model("copied")
    store.client.copy_model_version("models:/original/1", "copied")
    with pytest.raises(BundleError, match="is a bundle of 'original'"):
        store.fetch(store.get("copied", 1), tmp_path)


def test_promote_and_rollback(store: Store, register) -> None:
    first, second, third = register("promoted"), register("promoted"), register("promoted")

    def named() -> tuple[int | None, int | None, int | None]:
        found = (store.version("promoted", alias) for alias in ("champion", "previous", "challenger"))
        return tuple(version.number if version else None for version in found)  # type: ignore[return-value]

    with pytest.raises(RegistryError, match="no champion to roll back"):
        rollback(store, "promoted", now=NOW)
    promote(store, first, reason="first model", now=NOW)
    assert named() == (1, None, None)
    with pytest.raises(RegistryError, match="no previous champion"):
        rollback(store, "promoted", now=NOW)
    store.move("promoted", "challenger", 2)
    promote(store, second, reason="12% better", now=NOW)
    assert named() == (2, 1, None)
    tags = store.get("promoted", 2).tags
    assert (tags["noria.promoted_at"], tags["noria.reason"]) == ("2020-04-06T06:00:00+00:00", "12% better")
    promote(store, second, reason="again", now=NOW + timedelta(days=1))
    assert named() == (2, 1, None)
    assert store.get("promoted", 2).tags == tags, "promoting the champion changes nothing"
    promote(store, third, reason="better still", now=NOW)
    assert rollback(store, "promoted", now=NOW + timedelta(hours=1)).number == 2
    assert named() == (2, 3, None)
    assert store.get("promoted", 2).tags["noria.reason"] == "Rolled back from version 3."
    assert rollback(store, "promoted", now=NOW).number == 3
    assert named() == (3, 2, None)


def test_what_is_no_whole_bundle_is_not_promoted(store: Store, register, tmp_path: Path) -> None:
    version = register("partial")
    with pytest.raises(RegistryError, match="no version 7"):
        promote(store, replace(version, number=7), reason="", now=NOW)
    (tmp_path / "model.txt").write_text("something else")
    with store.run("partial", "by hand") as run:
        store.client.log_artifact(run.id, str(tmp_path / "model.txt"), "model")
    store.client.create_model_version("partial", f"runs:/{run.id}/model", run.id, await_creation_for=0)
    with pytest.raises(RegistryError, match="not registered by noria"):
        promote(store, store.get("partial", 2), reason="", now=NOW)
    assert store.version("partial", "champion") is None


KILLED = """
import os, sys
from datetime import datetime, UTC
from registry.promote import promote, rollback
from registry.store import Store

class Dying(Store):
    moves = 0
    def move(self, *arguments):
        super().move(*arguments)
        Dying.moves += 1
        if Dying.moves == 1:
            os._exit(9)

store = Dying(sys.argv[1])
if sys.argv[2] == "promote":
    promote(store, store.get("dying", 3), reason="x", now=datetime.now(UTC))
else:
    rollback(store, "dying", now=datetime.now(UTC))
"""


def test_killed_between_two_moves(store: Store, register) -> None:
    versions = [register("dying") for _ in range(3)]
    for version in versions[:2]:
        promote(store, version, reason="", now=NOW)

    def die(action: str) -> None:
        done = subprocess.run([sys.executable, "-c", KILLED, store.uri, action], cwd=ROOT, timeout=60, check=False)
        assert done.returncode == 9

    def named(alias: str) -> int:
        found = store.version("dying", alias)
        assert found is not None
        return found.number

    die("promote")
    assert named("champion") == 2, "the old champion serves"
    promote(store, versions[2], reason="", now=NOW)
    assert (named("champion"), named("previous")) == (3, 2), "a repeat completes it"
    die("rollback")
    assert named("champion") == 2, "the rollback has taken effect"
    promote(store, versions[2], reason="", now=NOW)
    assert (named("champion"), named("previous")) == (3, 2)


def test_two_that_register_at_once(store: Store, make_contents) -> None:
    contents = make_contents()
    contents = replace(contents, facts=replace(contents.facts, name="crowded"))

    def work(_: int) -> int:
        mine = Store(store.uri)
        with mine.run("crowded", "both") as run:
            return mine.register(run, contents).number

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(work, range(3))) == [1, 2, 3]


def test_an_unsound_model_leaves_no_version(store: Store, make_contents) -> None:
    contents = make_contents()
    contents = replace(
        contents, facts=replace(contents.facts, name="unsound"), reference=contents.reference.drop("split")
    )
    with pytest.raises(BundleError), store.run("unsound", "bad") as run:
        store.register(run, contents)
    assert store.versions("unsound") == []
    assert store.client.get_run(run.id).info.status == "FAILED"


def test_a_server_that_is_not_there_is_a_sentence_soon() -> None:
    store = Store("http://127.0.0.1:1")
    for ask in (
        lambda: store.version("trips", "champion"),
        lambda: store.versions("trips"),
        lambda: store.run("trips", "x").__enter__(),
        lambda: store.notes("trips"),
    ):
        began = time.monotonic()
        with pytest.raises(RegistryError, match=r"at http://127\.0\.0\.1:1 does not answer .* `noria up`"):
            ask()
        assert time.monotonic() - began < 60, "by MLflow's own patience it takes minutes"


def test_errors_and_bundles_cross_processes(store: Store, register, tmp_path: Path) -> None:
    bundle = store.fetch(register("pickled"), tmp_path)
    assert pickle.loads(pickle.dumps(bundle)) == bundle
    assert isinstance(bundle, Bundle)


def _only(parent: Path, path: Path) -> Path:
    folder = parent / "only"
    folder.mkdir()
    path.rename(folder / path.name)
    return folder


def _left(folder: Path) -> list[str]:
    """What lies in a folder, but for locks."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]
