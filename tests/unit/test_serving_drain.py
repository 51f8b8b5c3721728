"""The drain where something goes wrong: a fault stays with its own segments, and nothing is lost or written twice."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from noria import lake as lake_module
from noria.lake import Lake
from noria.records import Window
from serving import drain as drain_module
from serving import shadow_state
from serving.capture import Log
from serving.drain import ANY, Drain
from serving.entries import Entry
from serving.ids import Ids, expand
from serving.lag import handed_over
from serving.metrics import Metrics
from serving.node_drain import NodeDrain
from serving.shadow_counts import ShadowCounts
from serving.shadow_state import Reached

EVER = Window(datetime(1900, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
IDS = Ids(b"k" * 32, 1)
MOMENT = 1_600_000_000_000_000


@pytest.fixture
def place(tmp_path):
    return tmp_path / "log", str(tmp_path / "lake")


@pytest.fixture
def numbers(identity_model):
    """Three numbers in, the same out."""
    return identity_model("FP32")


def put(log, model, values, workload="same"):
    """Log a run of a plain model; returns its ids."""
    base = IDS.base(workload, len(values))
    entry = Entry(base, len(values), {"x": values}, {"y": values}, MOMENT, [], 0.5)
    assert log.predictions(replace(model, workload=workload), [entry])
    return list(expand(base, len(values)))


def end(log):
    """Let go of the open segments, as the kernel does when a process is killed."""
    while log._segments:
        os.close(log._segments.popitem()[1].descriptor)


def floats(rows, width=3):
    return np.full((rows, width), 0.75, np.float32)


def logged(place, workload="same"):
    return Lake(place[1], workload, ANY).predictions(EVER)


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_model_may_have_dots_in_its_name(place, numbers, tmp_path):
    log = Log(place[0], "one")
    ids = put(log, numbers, floats(2), "resnet.v2")
    assert log.pending() == {"resnet.v2": (2, 1)}
    log.rotate()
    assert log.pending() == {"resnet.v2": (2, 1)}
    assert handed_over(place[0])["resnet.v2"][:2] == (2, 1)
    put(log, numbers, floats(1), "zeta")
    log.rotate()
    assert Drain(*place).step() == 3
    assert sorted(logged(place, "resnet.v2").column("prediction_id").to_pylist()) == sorted(ids)
    assert len(logged(place, "zeta")) == 1


def test_what_a_shadow_is_scoring_counts_for_a_name_with_dots(tmp_path):
    (tmp_path / "shadow" / "taken").mkdir(parents=True)
    (tmp_path / "shadow" / "taken" / "trips.v2.one.000000001.5").touch()
    shadow_state.write(tmp_path / "shadow" / "state.json", {"trips.v2": Reached(2, "a", "shadowing")})
    metrics = Metrics()
    ShadowCounts(tmp_path).look(metrics)
    assert metrics.numbers()["noria_shadow_pending_rows"]["trips.v2",] == [5]


def test_an_open_segment_of_a_model_with_dots_is_adopted(place, numbers):
    log = Log(place[0], "one")
    ids = put(log, numbers, floats(2), "resnet.v2")
    drain = Drain(*place)
    assert drain.step() == 0  # its writer lives
    end(log)
    assert drain.step() == 2
    assert sorted(logged(place, "resnet.v2").column("prediction_id").to_pylist()) == sorted(ids)


def test_a_fault_holds_up_its_own_segments_only_and_is_logged_once(place, numbers, tmp_path, caplog):
    log, drain = Log(place[0], "one"), Drain(*place)
    ids = []
    for workload in ("same", "zeta"):
        for _ in range(2):
            ids += put(log, numbers, floats(2), workload)
            log.rotate()
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "same").write_text("no table can be made here")
    assert drain.step() == 4
    assert sorted(logged(place, "zeta").column("prediction_id").to_pylist()) == sorted(ids[4:])
    assert list(drain.failing) == ["same.one"]
    assert [path.rsplit(".", 3)[0] for path in names(place[0] / "ready")] == ["same", "same"], (
        "tried again, not set aside"
    )
    assert not names(place[0] / "broken")
    drain.step()
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "same.one" in record.message
    (tmp_path / "lake" / "same").unlink()
    assert drain.step() == 4
    assert not drain.failing
    assert sorted(logged(place).column("prediction_id").to_pylist()) == sorted(ids[:4])


@pytest.mark.parametrize("late", [1, 2], ids=["the first listing", "the second listing"])
def test_a_listing_that_lacks_a_segment_and_has_the_next_loses_nothing(place, numbers, monkeypatch, late):
    """As one does that takes several calls of the system while a writer hands segments over."""
    log, drain, ids, listings = Log(place[0], "one"), Drain(*place), [], []
    listed = Path.iterdir

    def hand_over():
        ids.extend(put(log, numbers, floats(2)))
        log.rotate()

    def passing(folder):
        found = list(listed(folder))
        if folder == drain.ready_folder:
            listings.append(folder)
            if len(listings) == late:
                hand_over()  # behind what was passed already
                here = set(listed(folder))
                hand_over()
                found += set(listed(folder)) - here
        return iter(found)

    hand_over()
    monkeypatch.setattr(Path, "iterdir", passing)
    drain.step()
    drain.step()
    drain.step()
    assert sorted(logged(place).column("prediction_id").to_pylist()) == sorted(ids)
    assert len(ids) == 6


def test_two_drains_of_one_log_write_its_rows_once(place, numbers):
    log, one, other = Log(place[0], "one"), Drain(*place), Drain(*place)
    ids, kept = [], {}
    for drain in (one, other):
        ids += put(log, numbers, floats(2))
        log.rotate()
        kept |= {path.name: path.read_bytes() for path in one.ready_folder.iterdir()}
        drain.step()
    ids += put(log, numbers, floats(2))
    log.rotate()
    for name, content in kept.items():  # listed and read by the first before the second removed it
        (one.ready_folder / name).write_bytes(content)
    one.step()
    rows = Lake(place[1], "same", ANY)._read("predictions", None, None, "event_time")
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(ids)


def test_a_node_is_drained_by_one_thread_at_a_time(place, numbers):
    """What a replica does at its end, while the thread of a cancelled step goes on."""
    log, node, ids = Log(place[0], "one"), NodeDrain(place[0].parent, place[1]), []
    for _ in range(5):
        for _ in range(3):
            ids += put(log, numbers, floats(2))
            log.rotate()
        threads = [threading.Thread(target=node.step) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    ids += put(log, numbers, floats(2))
    log.rotate()
    late = threading.Thread(target=node.step)
    late.start()
    node.finish(20)
    late.join()
    assert not names(place[0] / "ready")
    rows = Lake(place[1], "same", ANY)._read("predictions", None, None, "event_time")
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(ids)


@pytest.fixture
def synced(place, monkeypatch):
    """What was synced while segments were still there, by path below the lake; how many they were."""
    found: dict[str, int] = {}
    sync = os.fsync

    def noted(descriptor):
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        found[os.path.relpath(path, place[1])] = len(names(place[0] / "ready"))

    monkeypatch.setattr(os, "fsync", noted)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_rows_are_on_the_disk_before_their_segment_is_removed(place, numbers, synced):
    log, drain = Log(place[0], "one"), Drain(*place)
    table = Path(place[1]) / "same" / "predictions"
    known = set()
    for number in range(12):
        put(log, numbers, floats(1))
        log.rotate()
        synced.clear()
        drain.step()
        new = {str(path.relative_to(place[1])) for path in table.rglob("*") if path.is_file()} - known
        assert new <= synced.keys(), "the rows, the commit, the checkpoint"
        assert {"same/predictions", "same/predictions/_delta_log"} <= synced.keys()
        assert ({"..", ".", "same"} <= synced.keys()) == (number == 0), "folders that are new are in their folders"
        assert set(synced.values()) == {1}
        assert len(synced) < 10
        known |= new
    assert not names(place[0] / "ready")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_rows_that_a_killed_drain_appended_are_synced_by_the_next_one(place, numbers, synced):
    log = Log(place[0], "one")
    put(log, numbers, floats(1))
    log.rotate()
    kept = {path: path.read_bytes() for path in (place[0] / "ready").iterdir()}
    Drain(*place).step()
    for path, content in kept.items():  # as if it had been killed behind the commit
        path.write_bytes(content)
    synced.clear()
    Drain(*place).step()
    rows = [path for path in synced if path.endswith(".parquet")]
    assert len(rows) == 1
    assert "same/predictions/_delta_log/00000000000000000000.json" in synced
    assert not names(place[0] / "ready")


def test_each_table_is_compacted_after_so_many_appends_of_its_own(place, numbers, monkeypatch):
    monkeypatch.setattr(drain_module, "COMPACT_AFTER", 4)
    monkeypatch.setattr(lake_module, "COMPACT_EVERY", 4)
    log, drain = Log(place[0], "one"), Drain(*place)
    for _ in range(4):
        put(log, numbers, floats(1))
        put(log, numbers, floats(1), "zeta")
        log.rotate()
        drain.step()
    for workload in ("same", "zeta"):
        versions = Lake(place[1], workload, ANY).versions()
        assert versions["predictions"] == 4, "four appends and a compaction"


def test_a_file_that_is_no_segment_holds_up_nothing(place, numbers):
    log, drain = Log(place[0], "one"), Drain(*place)
    put(log, numbers, floats(2))
    log.rotate()
    (place[0] / "ready" / "notes.txt").write_text("what is this")
    assert drain.step() == 2
    assert names(place[0] / "broken") == ["notes.txt"]


@pytest.mark.parametrize(
    "tail",
    [b"abc\n7\nxyz", b"abc\n[1]\nxyz", b'a\n{"t":7}\nb', b'a\n{"raw":-9}\nb', b'a\n{"raw":1}\nb', b'a\n{"n":[1]}\nb',
     b'a\n{"v":1,"t":[1],"raw":"x"}\nb'],
    ids=str,
)  # fmt: skip
def test_an_open_segment_whose_first_page_did_not_reach_the_disk_is_kept_for_a_person(
    place, numbers, identity_model, tail
):
    pixels = identity_model("UINT8", (-1, 8192))
    log, drain = Log(place[0], "one"), Drain(*place)
    put(log, pixels, np.frombuffer((tail * 8192)[:8192], np.uint8).reshape(1, 8192))
    path = log._segments["same"].path
    path.write_bytes(bytes(4096) + path.read_bytes()[4096:])
    end(log)
    other = Log(place[0], "two")
    put(other, numbers, floats(3), "zeta")
    other.rotate()
    drain.step()
    assert len(logged(place, "zeta")) == 3
    assert not drain.failing
    assert not names(place[0] / "open")
    assert not names(place[0] / "ready")
    (kept,) = (place[0] / "broken").iterdir()
    assert kept.stat().st_size > 8192


@pytest.mark.parametrize(
    "header",
    [b'{"h":1,"schema":[]}', b'{"h":1,"schema":{"columns":[],"event_time":"t","target":"y"}}',
     b'{"h":1,"plain":{"inputs":[["x","FP32"]],"outputs":[]}}', b'{"h":1,"plain":{"inputs":7}}'],
    ids=str,
)  # fmt: skip
def test_a_damaged_header_sets_its_segment_aside(place, numbers, header):
    log, drain = Log(place[0], "one"), Drain(*place)
    put(log, numbers, floats(2))
    log.rotate()
    path = place[0] / "ready" / "same.a.000000001.1"
    path.write_bytes(header + b'\n{"v":1,"i":["a"],"n":[1],"ms":[1],"t":[1],"in":[],"out":[]}\n')
    drain.step()
    assert len(logged(place)) == 2
    assert names(place[0] / "broken") == [path.name]
    assert not names(place[0] / "ready")


@pytest.mark.parametrize("widths", [(1, 3), (3, 1), (1, 1)])
def test_rows_that_may_have_any_number_of_values_are_lists_from_the_first_on(place, identity_model, widths):
    log, drain, ragged = Log(place[0], "one"), Drain(*place), identity_model("FP32", (-1, -1))
    for width in widths:
        put(log, ragged, floats(2, width))
        log.rotate()
        assert drain.step() == 2
    rows = logged(place)
    for name in ("input_x", "output_y"):
        assert sorted(rows.column(name).to_pylist()) == sorted([0.75] * width for width in widths for _ in range(2))


@pytest.mark.parametrize(
    ("shape", "value"),
    [((-1, 1), 0.75), ((-1,), 0.75), ((-1, 1, 1), 0.75), ((-1, 2), [0.75] * 2), ((1, 1), 0.75), ((5,), [0.75] * 5),
     ((1, 5), [0.75] * 5)],
    ids=str,
)  # fmt: skip
def test_a_row_of_one_value_is_no_list(place, identity_model, shape, value):
    log, model = Log(place[0], "one"), identity_model("FP32", shape)
    values = np.full([1 if size < 0 else size for size in shape], 0.75, np.float32)
    entry = Entry(IDS.base("same", 1), 1, {"x": values}, {"y": values}, MOMENT, [], 0.5)
    assert log.predictions(model, [entry])
    log.rotate()
    assert Drain(*place).step() == 1
    assert logged(place).column("input_x").to_pylist() == logged(place).column("output_y").to_pylist() == [value]


@pytest.mark.parametrize(("width", "value"), [(1, 0.75), (2, [0.75, 0.75])])
def test_a_segment_from_before_shapes_were_noted_is_read_by_its_rows(place, identity_model, width, value):
    log = Log(place[0], "one")
    put(log, identity_model("FP32", (-1, width)), floats(1, width))
    log.rotate()
    (path,) = (place[0] / "ready").iterdir()
    noted = f'"FP32",[{width}]]'.encode()
    assert path.read_bytes().count(noted) == 2
    path.write_bytes(path.read_bytes().replace(noted, b'"FP32"]'))
    assert Drain(*place).step() == 1
    assert logged(place).column("input_x").to_pylist() == [value]


def column(place, workload="same", name="input_x"):
    return logged(place, workload).column(name)


OTHER = {
    "another width": (("FP32", (-1, 1)), floats(2, 1), ("FP32", (-1, 3)), floats(2), "float", "list"),
    "numbers for integers": (
        ("INT64", (-1, 1)), np.ones((2, 1), np.int64), ("FP32", (-1, 1)), floats(2, 1), "int64", "float"
    ),
    "whole numbers for integers": (
        ("INT64", (-1, 1)), np.ones((2, 1), np.int64), ("FP64", (-1, 1)), np.ones((2, 1)), "int64", "double"
    ),
    "text for numbers": (
        ("FP32", (-1, 1)), floats(2, 1), ("BYTES", (-1, 1)), np.array([["7"], ["a"]], object), "float", "string"
    ),
    "double for single precision": (
        ("FP32", (-1, 3)), floats(2), ("FP64", (-1, 3)), np.full((2, 3), 0.1), "list<element: float>", "double"
    ),
    "larger integers": (
        ("UINT8", (-1, 1)), np.ones((2, 1), np.uint8), ("INT64", (-1, 1)), np.ones((2, 1), np.int64), "int16", "int64"
    ),
}  # fmt: skip


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one append"])
@pytest.mark.parametrize("name", OTHER)
def test_rows_of_another_type_are_set_aside_whole_and_hold_up_nothing(place, identity_model, name, together, caplog):
    first, right, second, wrong, has, sent = OTHER[name]
    log, drain = Log(place[0], "one"), Drain(*place)
    right_model, wrong_model = identity_model(*first), replace(identity_model(*second), version=2)
    put(log, right_model, right)
    log.rotate()
    drain.step()  # the table is there
    ids = []
    for model, values in ((right_model, right), (wrong_model, wrong), (wrong_model, wrong), (right_model, right)):
        ids.append(put(log, model, values))
        log.rotate()
        if not together:
            drain.step()
    drain.step()
    assert not drain.failing
    assert not names(place[0] / "ready")
    assert set(column(place, name="version").to_pylist()) == {1}
    assert len(column(place)) == 6
    assert column(place).to_pylist()[:2] == [row if len(row) > 1 else row[0] for row in right.tolist()]
    assert len(names(place[0] / "broken")) == 2
    (record,) = [one for one in caplog.records if one.name == "serving.drain"]
    for part in ("input_x", has, sent, "another model name", "move the table away"):
        assert part in record.getMessage()
    Path(place[1], "same", "predictions").rename(place[0] / "away")
    for path in (place[0] / "broken").iterdir():
        path.rename(place[0] / "ready" / path.name)
    assert drain.step() == 4
    assert sorted(column(place, name="prediction_id").to_pylist()) == sorted([*ids[1], *ids[2]])


def test_versions_that_cannot_share_an_append_share_no_fate(place, identity_model):
    """There is no table yet: the first of them makes it."""
    log, drain = Log(place[0], "one"), Drain(*place)
    text = replace(identity_model("BYTES", (-1, 1)), version=2)
    ids = put(log, identity_model("FP32", (-1, 1)), floats(2, 1))
    log.rotate()
    put(log, text, np.array([["a"]], object))
    log.rotate()
    drain.step()
    assert column(place, name="prediction_id").to_pylist() == ids
    assert len(names(place[0] / "broken")) == 1


def test_a_name_in_other_capital_letters_is_set_aside(place, identity_model, caplog):
    log, drain = Log(place[0], "one"), Drain(*place)
    model = identity_model("FP32")
    big = replace(model, version=2, inputs=(replace(model.inputs[0], name="X"),))
    put(log, model, floats(2))
    log.rotate()
    base = IDS.base("same", 1)
    log.predictions(big, [Entry(base, 1, {"X": floats(1)}, {"y": floats(1)}, MOMENT, [], 0.5)])
    log.rotate()
    put(log, model, floats(2))
    log.rotate()
    drain.step()
    assert len(logged(place)) == 4
    assert len(names(place[0] / "broken")) == 1
    assert "capital letters" in caplog.text and "input_X" in caplog.text
    assert not drain.failing


def test_what_loses_nothing_is_widened(place, identity_model):
    log, drain = Log(place[0], "one"), Drain(*place)
    for version, (datatype, values) in enumerate(
        (("FP64", [0.5]), ("FP32", [0.25]), ("INT32", [7]), ("INT64", [2**53]), ("UINT8", [8]), ("INT64", [2**53 + 1]))
    ):
        model = replace(identity_model(datatype, (-1, 1)), version=version)
        put(log, model, np.array([values], {"FP64": "f8", "FP32": "f4", "UINT8": "u1"}.get(datatype, datatype.lower())))
        log.rotate()
        drain.step()
    found = logged(place)
    values = dict(zip(found.column("version").to_pylist(), found.column("input_x").to_pylist(), strict=True))
    assert values == {0: 0.5, 1: 0.25, 2: 7, 3: 2**53, 4: 8}
    assert len(names(place[0] / "broken")) == 1, "the last one is no double"


def test_labels_of_a_segment_whose_predictions_do_not_fit_reach_the_lake(place, identity_model):
    offered = []
    log, drain = Log(place[0], "one"), Drain(*place, offered.append)
    put(log, identity_model("FP32", (-1, 1)), floats(1, 1))
    log.rotate()
    drain.step()
    ids = put(log, identity_model("BYTES", (-1, 1)), np.array([["a"]], object))
    log.labels("same", ids, [1.0], np.array([MOMENT]))
    log.rotate()
    drain.step()
    assert Lake(place[1], "same", ANY).labels(EVER.end).column("prediction_id").to_pylist() == ids
    assert len(logged(place)) == len(offered) == len(names(place[0] / "broken")) == 1
