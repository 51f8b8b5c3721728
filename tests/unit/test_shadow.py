"""The shadow's parts without servers: what waits is bounded, what is scored comes out once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import orjson
import pytest
from onnx import TensorProto, helper

from noria.lake import Lake
from noria.records import Window
from registry.bundle import write
from registry.proof import Proof
from serving import shadow_state
from serving.capture import Log
from serving.drain import Drain
from serving.entries import Entry
from serving.feed import Feed
from serving.ids import Ids, expand
from serving.metrics import Metrics
from serving.model import load
from serving.protocol import read_records
from serving.segment import read
from serving.shadow import Shadow
from serving.shadow_counts import ShadowCounts
from serving.shadow_scores import Answers, chosen, score
from serving.shadow_state import Ask, Reached, Status

EVER = Window(datetime(1900, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
IDS = Ids(b"k" * 32, 1)
RECORD = {"pickup": "2020-03-15T00:00:00", "vendor": "A", "distance": 2.0, "zone": 1}


class Home:
    """A home whose champion, version 1, has answered; version 2 shadows."""

    def __init__(self, folder, champion, bundle):
        self.folder, self.champion, self.schema = folder, champion, champion.bundle.schema
        self.log, self.feed = Log(folder / "log", "one"), Feed(folder / "shadow", segments=3)
        self.feed.wanted = frozenset({"trips"})
        self.lake = Lake(str(folder / "lake"), "trips", self.schema)
        self.drain = Drain(folder / "log", str(folder / "lake"), self.feed.offer)
        self.ask(bundle)

    def ask(self, bundle, asked="a", share=1.0, version=2):
        asks = {"trips": Ask(version, str(bundle), share, asked)}
        shadow_state.write(self.folder / "shadow" / "asked.json", asks)

    def answer(self, records=(RECORD, RECORD), version=1, latency=0.5):
        """Log a request as the champion does, score 3 a row; returns its ids."""
        rows, base = read_records(orjson.dumps(list(records)), self.schema), IDS.base("trips", len(records))
        scores = {"score": np.full(len(records), 3.0, np.float32)}
        entry = Entry(base, rows.count, rows.tensors, scores, rows.times, ["short"] * len(records), latency)
        self.log.predictions(replace(self.champion, version=version), [entry])
        return list(expand(base, len(records)))

    def move(self):
        """Everything that is logged into the lake."""
        self.log.rotate()
        self.drain.step()

    def rows(self, table="shadow"):
        return self.lake._read(table, None, None, "event_time").to_pylist()

    def waiting(self):
        return sorted(path.name for path in (self.folder / "shadow").rglob("trips.*"))

    def reached(self):
        return shadow_state.read(self.folder / "shadow" / "state.json", Reached)["trips"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, make_contents, trips_graph, trips_schema, trips):
    """Version 2: its scores for the vendor A are 10 higher."""
    other = onnx.load_from_string(trips_graph)
    (levels,) = (node for node in other.graph.node if node.op_type == "LabelEncoder")
    next(entry for entry in levels.attribute if entry.name == "values_floats").floats[1] = 11.0
    model, folder = other.SerializeToString(), tmp_path_factory.mktemp("bundle")
    write(folder, make_contents(model=model, proof=Proof.make(model, trips_schema, trips)))
    return folder


@pytest.fixture(scope="module")
def champion(tmp_path_factory, make_contents):
    folder = tmp_path_factory.mktemp("champion")
    write(folder, make_contents())
    return load("trips", 1, folder, "cpu")


@pytest.fixture
def home(tmp_path, champion, bundle):
    return Home(tmp_path, champion, bundle)


def test_a_challengers_answers_reach_their_own_table_and_no_other(home):
    ids = home.answer()
    home.move()
    assert Shadow(home.folder).step()
    home.move()
    found = home.rows()
    assert [row["prediction_id"] for row in found] == ids
    assert {(row["version"], row["champion"], row["score"], row["action"]) for row in found} == {(2, 1, 13.0, "long")}
    assert {row["event_time"] for row in found} == {datetime(2020, 3, 15, tzinfo=UTC)}
    assert all(row["latency_ms"] > 0 for row in found)
    assert [row["version"] for row in home.rows("predictions")] == [1, 1]
    assert home.waiting() == []
    state = home.reached()
    assert (state.status, state.rows, state.agreed, state.difference, state.errors) == ("shadowing", 2, 0, 20.0, 0)


def test_what_a_shadow_does_is_counted_for_prometheus(home):
    metrics, counts = Metrics(), ShadowCounts(home.folder)

    def told(name, *labels):
        counts.look(metrics)
        return metrics.numbers()[name].get(labels)

    shadow = Shadow(home.folder)
    shadow.step()  # loads
    home.answer()
    home.move()
    time.sleep(0.05)
    assert told("noria_shadow_pending_rows", "trips") == [2]
    assert 0.05 < told("noria_shadow_lag_seconds", "trips")[0] < 60
    assert told("noria_shadow_rows_total", "trips", "2", "scored") == [0], "what is rare begins at zero"
    assert shadow.step()
    assert told("noria_shadow_rows_total", "trips", "2", "scored") == [2]
    *buckets, seconds = told("noria_shadow_run_duration_seconds", "trips", "2")
    assert sum(buckets) == 1 and seconds > 0
    assert told("noria_shadow_pending_rows", "trips") == told("noria_shadow_lag_seconds", "trips") == [0]
    status = Status(2, 1.0, "shadowing", "shadowing", dropped=5, restarts=1)
    for found, dropped in ((status, 5), (replace(status, dropped=7), 7), (replace(status, dropped=1), 8)):
        shadow_state.write(home.folder / "shadow" / "status.json", {"trips": found})
        assert told("noria_shadow_rows_total", "trips", "2", "dropped") == [dropped]
    assert told("noria_shadow_restarts_total", "trips") == [1]
    other = replace(status, asked="b", dropped=3)  # more than at the last look, and all of them its own
    shadow_state.write(home.folder / "shadow" / "status.json", {"trips": other})
    assert told("noria_shadow_rows_total", "trips", "2", "dropped") == [11]
    assert told("noria_shadow_restarts_total", "trips") == [2]
    shadow_state.write(home.folder / "shadow" / "status.json", {"trips": replace(status, status="failed")})
    assert told("noria_shadow_failed", "trips") == [1]
    shadow_state.write(home.folder / "shadow" / "status.json", {})
    assert told("noria_shadow_failed", "trips") == [0]
    later = Metrics()
    counts = ShadowCounts(home.folder)
    counts.look(later)
    assert later.numbers()["noria_shadow_rows_total"]["trips", "2", "scored"] == [0], "counted by the one before"


@contextmanager
def unreadable(path):
    """A folder in the place of a file: whoever runs the tests may read everything else."""
    aside = path.rename(path.with_name("aside"))
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()
        aside.rename(path)


def test_what_cannot_be_read_for_a_moment_is_not_counted_once_more(home):
    metrics, counts, state = Metrics(), ShadowCounts(home.folder), home.folder / "shadow" / "state.json"

    def scored():
        counts.look(metrics)
        return metrics.numbers()["noria_shadow_rows_total"]["trips", "2", "scored"]

    shadow = Shadow(home.folder)
    shadow.step()
    assert scored() == [0]
    home.answer()
    home.move()
    assert shadow.step()
    assert scored() == [2]
    with unreadable(state):
        assert scored() == [2]
    assert scored() == [2]
    with unreadable(state):
        counts = ShadowCounts(home.folder)
        assert scored() == [2]
    assert scored() == [2], "an earlier process has counted it"


def test_a_shadow_that_cannot_read_its_files_for_a_moment_forgets_nothing(home):
    asked, state = (home.folder / "shadow" / name for name in ("asked.json", "state.json"))
    shadow, offered = Shadow(home.folder), {}
    for _ in range(2):
        home.answer()
        home.move()
        (path,) = (home.folder / "shadow" / "waiting" / "trips").iterdir()
        offered[path] = path.read_bytes()
        assert shadow.step()
    before, written = state.read_bytes(), state.stat().st_mtime_ns
    with unreadable(asked), pytest.raises(IsADirectoryError):
        shadow.step()
    assert not shadow.step()
    assert state.stat().st_mtime_ns == written, "the challenger was loaded once more"
    with unreadable(state):
        shadow = Shadow(home.folder)
        with pytest.raises(IsADirectoryError):
            shadow.step()
    for path, content in offered.items():
        path.write_bytes(content)
        shadow.step()
    assert (home.reached().rows, home.reached().since) == (4, orjson.loads(before)["trips"]["since"])


def test_training_and_watching_never_see_shadow_rows(home):
    ids = home.answer()
    home.log.labels("trips", ids, [7.0, 8.0], np.array([1_600_000_000_000_000] * 2))
    home.move()
    late = datetime(2100, 1, 1, tzinfo=UTC)
    before = home.lake.dataset(EVER, late)
    Shadow(home.folder).step()
    home.move()
    assert len(home.lake.shadow(EVER, 2)) == 2
    after = home.lake.dataset(EVER, late)
    assert after[0] == before[0]
    assert "shadow" not in after[0].versions
    assert len(home.lake.predictions(EVER)) == len(home.lake.judged(EVER, late)) == 2


def test_what_waits_is_bounded_and_the_oldest_are_dropped_and_counted(home):
    first = home.answer()
    home.move()
    kept = []
    for _ in range(3):
        kept += home.answer()
        home.move()
    assert home.feed.dropped == {"trips": 2}
    assert home.feed.waiting("trips") == 6
    shadow = Shadow(home.folder)
    while shadow.step():
        pass
    home.move()
    assert sorted(row["prediction_id"] for row in home.rows()) == sorted(kept)
    assert not set(first) & set(kept)
    small = Feed(home.folder / "shadow", size=1)  # bytes count, too
    small.wanted = frozenset({"trips"})
    home.drain.offer = small.offer
    home.answer()
    home.move()
    assert (small.dropped, small.waiting("trips")) == ({"trips": 2}, 0)


def test_the_oldest_of_several_workers_goes_first_and_a_worker_never_overtakes_itself(home):
    for source, number, written in (("b", 2, 10), ("b", 1, 30), ("a", 7, 20)):  # b's clock went back
        path = home.folder / f"trips.{source}.{number:09d}.1"
        path.write_bytes(b"")
        home.feed.offer(path)
        os.utime(path, (written, written))
    taken = []
    while path := home.feed.take("trips"):
        taken.append(path.name.split(".")[1:3])
        path.unlink()
    assert taken == [["a", "000000007"], ["b", "000000001"], ["b", "000000002"]]


def test_nothing_is_kept_for_a_workload_without_a_challenger_and_a_full_disk_is_a_drop(home, monkeypatch):
    home.feed.wanted = frozenset()
    home.answer()
    home.move()
    assert (home.waiting(), home.feed.dropped) == ([], {})
    home.feed.wanted = frozenset({"trips"})
    shutil.rmtree(home.folder / "shadow" / "waiting", ignore_errors=True)
    (home.folder / "shadow" / "waiting").write_text("no folder can be made here")
    ids = home.answer()
    home.move()
    assert home.feed.dropped == {"trips": 2}
    assert set(ids) <= {row["prediction_id"] for row in home.rows("predictions")}


class Killed(BaseException):
    """The parent ends here."""


@pytest.mark.parametrize("moment", ["before the link", "after the link", "after it was scored"])
def test_a_parent_killed_around_the_link_shadows_every_row_once(home, moment):
    def offer(path):
        if moment != "before the link":
            home.feed.offer(path)
        if moment == "after it was scored":
            Shadow(home.folder).step()
        raise Killed

    ids = home.answer()
    home.log.rotate()
    home.drain.offer = offer
    with pytest.raises(Killed):
        home.drain.step()
    home.drain = Drain(home.folder / "log", str(home.folder / "lake"), home.feed.offer)  # the next parent
    home.move()
    shadow = Shadow(home.folder)
    while shadow.step():
        home.move()
    assert sorted(row["prediction_id"] for row in home.rows()) == sorted(ids)
    assert sorted(row["prediction_id"] for row in home.rows("predictions")) == sorted(ids)
    assert home.reached().rows == len(ids), "nor is any counted twice"


@pytest.mark.parametrize("moment", ["before it handed over", "after it handed over", "after it counted"])
def test_a_shadow_killed_in_a_segment_repeats_it_without_effect(home, moment, monkeypatch):
    ids = home.answer()
    home.move()
    shadow = Shadow(home.folder)
    hand_over = shadow._hand_over

    def killed(*given):
        if moment == "after it handed over":
            hand_over(*given)
            home.move()
        raise Killed

    def counted(*given):
        if "shadowing" in (given[1].status, keep(*given)) and given[1].rows:
            raise Killed

    keep = shadow._keep
    monkeypatch.setattr(shadow, *(("_keep", counted) if moment == "after it counted" else ("_hand_over", killed)))
    with pytest.raises(Killed):
        shadow.step()
    assert len(home.feed.taken("trips")) == 1
    assert Shadow(home.folder).step()
    home.move()
    assert sorted(row["prediction_id"] for row in home.rows()) == sorted(ids)
    assert home.waiting() == [] and home.reached().rows == len(ids)


def test_told_to_end_it_stops_between_batches_and_the_next_one_goes_on(home):
    ids = home.answer(latency=0.5) + home.answer(latency=0.6)
    home.move()
    shadow = Shadow(home.folder)
    shadow.step()  # loads; the segment is scored, so put one more there
    more = home.answer()
    home.move()
    beats = iter([lambda: None, shadow.stopping.set])  # told to end while it scores
    shadow.beat = lambda: next(beats)()
    shadow.step()
    assert len(home.feed.taken("trips")) == 1
    next_one = Shadow(home.folder)
    while next_one.step():
        pass
    home.move()
    assert sorted(row["prediction_id"] for row in home.rows()) == sorted(ids + more)


def test_the_share_is_by_prediction_and_always_the_same(home, bundle):
    ids = [name for _ in range(40) for name in home.answer([RECORD] * 50)]
    home.log.rotate()
    (path,) = (home.folder / "log" / "ready").iterdir()
    rows = read(path.read_bytes())[0]["predictions"]
    kept = {share: chosen(rows, share, 2).column("prediction_id").to_pylist() for share in (0.0, 0.25, 0.5, 1.0)}
    assert kept[1.0] == ids
    assert kept[0.0] == []
    assert set(kept[0.25]) < set(kept[0.5])
    assert 420 < len(kept[0.25]) < 580  # 500 expected, standard deviation 19
    assert chosen(rows, 0.25, 2).column("prediction_id").to_pylist() == kept[0.25]
    assert len(chosen(rows, 1.0, 1)) == 0  # its own answers, as champion
    home.ask(bundle, share=0.25)
    home.drain.step()
    Shadow(home.folder).step()
    home.move()
    assert sorted(row["prediction_id"] for row in home.rows()) == sorted(kept[0.25])


def test_rows_that_it_cannot_answer_are_counted_and_hold_up_no_others(home, bundle):
    strict = home.folder / "strict"
    shutil.copytree(bundle, strict)
    model = load("trips", 2, strict, "cpu")
    rows = _predictions(home, [RECORD, {**RECORD, "distance": 60.0}, {"pickup": "2020-03-15T00:00:00"}])
    narrower = orjson.loads((strict / "noria" / "schema.json").read_bytes())
    narrower["columns"][0]["high"] = 50
    schema = type(home.schema).from_json(narrower)
    answers = Answers()
    list(score(_with_schema(model, schema), rows, answers))
    assert (len(answers), answers.errors) == (2, 1)
    assert "above 50" in answers.error
    narrower["columns"].append({**narrower["columns"][0], "name": "tip", "required": True})
    refused = Answers()
    list(score(_with_schema(model, type(schema).from_json(narrower)), rows, refused))
    assert (len(refused), refused.errors) == (0, 3)
    assert "no 'tip', which the challenger requires" in refused.error


def test_a_value_of_another_type_than_the_challengers_is_a_row_that_it_could_not_answer(home, bundle):
    wider = [replace(column, kind="number") if column.name == "zone" else column for column in home.schema.columns]
    home.schema = replace(home.schema, columns=tuple(wider))
    home.champion = _with_schema(home.champion, home.schema)
    rows = _predictions(home, [RECORD, {**RECORD, "zone": 1.5}, RECORD, RECORD, {**RECORD, "zone": 2.5}])
    answers = Answers()
    list(score(load("trips", 2, bundle, "cpu"), rows, answers))
    assert (len(answers), answers.errors) == (3, 2)
    assert answers.parts[0]["id"] == [rows["prediction_id"][row].as_py() for row in (0, 2, 3)]
    assert "2.5" in answers.error


def _with_schema(model, schema):
    changed = type(model.bundle)(**{**vars(model.bundle), "schema": schema})
    return type(model)(**{**vars(model), "bundle": changed})


def _predictions(home, records):
    home.answer(records)
    home.log.rotate()
    (path,) = (home.folder / "log" / "ready").iterdir()
    return read(path.read_bytes())[0]["predictions"]


def test_batches_are_those_of_the_champion(home, bundle):
    for latency in (0.5, 0.5, 0.7):
        home.answer([RECORD] * 3, latency=latency)
    home.answer([RECORD] * 2500, latency=0.9)
    home.log.rotate()
    (path,) = (home.folder / "log" / "ready").iterdir()
    answers = Answers()
    model = load("trips", 2, bundle, "cpu")
    list(score(model, read(path.read_bytes())[0]["predictions"], answers))
    assert [len(part["id"]) for part in answers.parts] == [6, 3, 1024, 1024, 452]


def test_a_bundle_that_is_damaged_is_refused_once_and_another_ask_tries_again(home, bundle, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "model.onnx").write_bytes(b"no model")
    home.ask(broken, asked="b")
    shadow = Shadow(home.folder)
    shadow.step()
    assert (home.reached().status, home.reached().asked) == ("failed", "b")
    assert "changed after" in home.reached().reason
    told = (home.folder / "shadow" / "state.json").stat().st_mtime_ns
    shadow.step()
    Shadow(home.folder).step()
    assert (home.folder / "shadow" / "state.json").stat().st_mtime_ns == told
    home.ask(bundle, asked="c")
    shadow.step()
    assert home.reached().status == "shadowing"


def test_it_has_a_memory_limit_of_its_own_and_comes_last(tmp_path, make_contents, trips_schema, trips):
    """A graph that needs 1.2 MB a row: fine for one request, too much for the largest batch."""
    number = TensorProto.FLOAT
    nodes = [
        helper.make_node("IsNaN", ["distance"], ["absent"]),
        helper.make_node("Where", ["absent", "zero", "distance"], ["miles"]),
        helper.make_node("Unsqueeze", ["miles", "last"], ["column"]),
        helper.make_node("Expand", ["column", "wide"], ["much"]),
        helper.make_node("ReduceMean", ["much", "last"], ["score"], keepdims=0),
    ]
    kinds = {"distance": number, "zone": TensorProto.INT64, "vendor": TensorProto.STRING, "pickup": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "greedy",
        [helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("score", number, ["n"])],
        [
            helper.make_tensor("zero", number, [], [0.0]),
            helper.make_tensor("last", TensorProto.INT64, [1], [1]),
            helper.make_tensor("wide", TensorProto.INT64, [2], [1, 300_000]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    write(tmp_path / "greedy", make_contents(model=model, proof=Proof.make(model, trips_schema, trips.slice(0, 16))))
    code = (
        "import os, sys; from pathlib import Path; from serving import shadow; from serving.model import load\n"
        "shadow.MOST_MEMORY = 2**30; shadow.yield_to_all()\n"
        "print(os.nice(0), Path('/proc/self/oom_score_adj').read_text().strip(), flush=True)\n"
        "load('trips', 2, Path(sys.argv[1]), 'cpu')"
    )
    group = Path("/proc/self/autogroup")
    before = group.read_text() if group.exists() else ""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "greedy")], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout.split() == ["19", "1000"]
    assert "Version 2 of trips cannot be loaded" in ended.stderr
    assert "llocat" in ended.stderr, ended.stderr
    # It led no session of its own here: lowering its group would have lowered whoever started it.
    assert before == (group.read_text() if group.exists() else "")


def test_a_file_that_is_half_there_or_of_another_kind_is_passed_over(tmp_path: Path):
    path = tmp_path / "asked.json"
    assert shadow_state.read(path, Ask) == {}
    path.write_text('{"trips": {"version": 1}, "buses": {"version": 1, "folder": "x", "share": 1, "asked": "a"}}')
    assert shadow_state.read(path, Ask) == {"buses": Ask(1, "x", 1, "a")}
    path.write_text('{"trips"')
    assert shadow_state.read(path, Ask) == {}
