"""The prediction log: what is written comes out of the lake once, whoever is killed when."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import orjson
import pytest

from noria.lake import Lake
from noria.records import Window
from registry.bundle import write
from serving import background
from serving import drain as drain_module
from serving.capture import Log
from serving.drain import Drain
from serving.entries import Entry
from serving.ids import Ids, at_row, expand
from serving.model import load
from serving.protocol import read_records
from serving.rawlog import columns
from serving.segment import read

EVER = Window(datetime(1900, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
RECORDS = [
    {"pickup": "2020-03-15T08:30:00", "vendor": "Midtown", "distance": 2.1, "zone": 1},
    {"pickup": "2020-03-15T08:31:00"},
]


@pytest.fixture
def place(tmp_path):
    return tmp_path / "log", str(tmp_path / "lake")


IDS = Ids(b"k" * 32, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_contents):
    folder = tmp_path_factory.mktemp("bundle")
    write(folder, make_contents())
    return load("trips", 1, folder, "cpu")


def put(log, model, records=RECORDS, version=1, workload="trips"):
    rows = read_records(orjson.dumps(records), model.bundle.schema)
    base = IDS.base(workload, len(records))
    scores = np.arange(len(records), dtype=np.float32) + 0.1
    entry = Entry(base, rows.count, rows.tensors, {"score": scores}, rows.times, ["short"] * len(records), 0.5)
    log.predictions(replace(model, version=version, workload=workload), [entry])
    return list(expand(base, len(records)))


def test_rows_come_out_as_they_were_sent(place, model, trips_schema):
    log = Log(place[0], "one")
    ids = put(log, model)
    log.labels("trips", ids[:1], [7.5], np.array([1_600_000_000_000_000]))
    assert log.pending() == {"trips": (3, 1)}
    log.rotate()
    assert Drain(*place).step() == 3
    assert log.pending() == {}
    lake = Lake(place[1], "trips", trips_schema)
    rows = lake.predictions(EVER).to_pylist()
    assert [row["prediction_id"] for row in rows] == ids
    first, second = rows
    assert (first["vendor"], first["distance"], first["zone"]) == ("Midtown", 2.1, 1)  # not 2.0999999
    assert (second["vendor"], second["distance"], second["zone"]) == (None, None, None)
    assert first["event_time"] == first["pickup"] == datetime(2020, 3, 15, 8, 30, tzinfo=UTC)
    assert (first["version"], first["action"], first["latency_ms"]) == (1, "short", 0.5)
    judged = lake.judged(EVER, datetime(2100, 1, 1, tzinfo=UTC)).to_pylist()
    assert [(row["prediction_id"], row["label"]) for row in judged] == [(ids[0], 7.5)]


def test_runs_that_share_a_line_keep_their_ids_times_and_latencies(place, model, trips_schema):
    log, moment = Log(place[0], "one"), 1_600_000_000_000_000
    entries, ids = [], []
    for number, times in enumerate((moment, np.array([moment + 1, moment + 2]), moment + 3)):
        rows = read_records(orjson.dumps([RECORDS[0], RECORDS[0]]), model.bundle.schema)
        base, scores = IDS.base("trips", 2), np.array([number, number + 0.5], np.float32)
        entries.append(Entry(base, 2, rows.tensors, {"score": scores}, times, ["short", "long"], float(number)))
        ids += expand(base, 2)
    assert log.predictions(model, entries)
    log.rotate()
    (path,) = (place[0] / "ready").iterdir()
    assert path.read_bytes().count(b"\n") == 2  # the header, and one line
    assert Drain(*place).step() == 6
    rows = {row["prediction_id"]: row for row in Lake(place[1], "trips", trips_schema).predictions(EVER).to_pylist()}
    found = [rows[name] for name in ids]
    assert [row["score"] for row in found] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert [row["latency_ms"] for row in found] == [0, 0, 1, 1, 2, 2]
    assert [row["action"] for row in found] == ["short", "long"] * 3
    assert [int(row["event_time"].timestamp() * 1e6) - moment for row in found] == [0, 0, 1, 2, 3, 3]


def test_ids_of_one_batch_are_read_as_they_were_given(place, model, trips_schema):
    log, shared, alone = Log(place[0], "one"), IDS.base("trips", 5), IDS.base("trips", 1)
    runs = [(shared, 1), (at_row(shared, 1), 2), (alone, 1), (at_row(shared, 3), 2)]
    entries = [entry(model, first, rows) for first, rows in runs]
    assert log.predictions(model, entries)
    log.rotate()
    assert Drain(*place).step() == 6
    found = Lake(place[1], "trips", trips_schema).predictions(EVER).column("prediction_id").to_pylist()
    assert sorted(found) == sorted([*expand(shared, 5), *expand(alone, 1)])


def entry(model, first, rows):
    read = read_records(orjson.dumps([RECORDS[0]] * rows), model.bundle.schema)
    return Entry(
        first, rows, read.tensors, {"score": np.zeros(rows, np.float32)}, 1_600_000_000_000_000, ["short"] * rows, 0.0
    )


@pytest.mark.parametrize(("said", "rows", "size"), [("FP32", 1, 7), ("FP32", 2, 12), ("FP32", 0, 8), ("INT64", 1, 12)])
def test_tensors_that_are_not_those_of_whole_rows_are_refused(said, rows, size):
    line = {"t": [0] * rows, "in": [bytes(size)], "out": []}
    with pytest.raises(ValueError, match=r"bytes that are no|whole rows"):
        columns([line], {"inputs": [["x", said, [3]]], "outputs": []})


def test_many_segments_versions_and_workloads(place, model, trips_schema):
    log = Log(place[0], "one")
    ids = []
    for version in (1, 1, 2):
        for _ in range(5):
            ids += put(log, model, version=version)
        log.rotate()
    other = put(log, model, workload="buses")
    log.rotate()
    assert Drain(*place).step() == 32
    rows = Lake(place[1], "trips", trips_schema).predictions(EVER)
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(ids)
    assert sorted(set(rows.column("version").to_pylist())) == [1, 2]
    assert Lake(place[1], "buses", trips_schema).predictions(EVER).column("prediction_id").to_pylist() == other


def test_the_drain_gathers_where_there_is_much(place, model):
    log, drain = Log(place[0], "one"), Drain(*place)
    put(log, model)
    log.rotate()
    assert background.paced(drain) == background.DRAIN_SECONDS
    put(log, model, RECORDS * 250)
    log.rotate()
    assert background.paced(drain) == background.GATHER_SECONDS
    assert background.paced(drain) == background.DRAIN_SECONDS  # nothing came


def test_a_parent_killed_before_it_cleaned_up_does_not_append_twice(place, model, trips_schema, tmp_path):
    log = Log(place[0], "one")
    first = put(log, model)
    log.rotate()
    kept = {path.name: path.read_bytes() for path in (place[0] / "ready").iterdir()}
    Drain(*place).step()
    for name, content in kept.items():  # as if it had been killed between the commit and the removal
        (place[0] / "ready" / name).write_bytes(content)
    second = put(log, model)
    log.rotate()
    Drain(*place).step()
    rows = Lake(place[1], "trips", trips_schema)._read("predictions", None, None, "event_time")
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(first + second)


def test_segments_of_a_dead_worker_are_adopted_without_their_torn_end(place, model, trips_schema):
    log = Log(place[0], "one")
    handed = put(log, model)
    log.rotate()
    left = put(log, model)
    (path,) = (place[0] / "open").iterdir()
    drain = Drain(*place)
    assert drain.adopt() == 0  # its writer lives
    with path.open("ab") as file:
        file.write(b'{"v":1,"i":"aa","t":[15842')
    os.close(log._segments["trips"].descriptor)  # what the kernel does when a process is killed
    drain.step()
    rows = Lake(place[1], "trips", trips_schema).predictions(EVER)
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(handed + left)
    assert not list((place[0] / "open").iterdir())


def test_a_segment_that_its_writer_hands_over_meanwhile_is_passed_over(place, model, trips_schema):
    """Listed, and renamed before it is opened: here a name behind which nothing is."""
    log = Log(place[0], "one")
    put(log, model)
    log.rotate()
    drain = Drain(*place)
    (place[0] / "open" / "trips.two.000000001").symlink_to(place[0] / "ready" / "trips.two.000000001.1")
    assert drain.adopt() == 0
    assert drain.step() == len(RECORDS)


def test_an_adopted_segment_is_not_taken_for_an_old_one(place, model, trips_schema):
    log = Log(place[0], "one")
    stuck = put(log, model)
    segment = log._segments.pop("trips")  # never handed over
    later = put(log, model)
    log.rotate()
    drain = Drain(*place)
    drain.step()
    os.close(segment.descriptor)
    drain.step()
    rows = Lake(place[1], "trips", trips_schema).predictions(EVER)
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(stuck + later)


def test_a_damaged_line_is_kept_for_a_person_and_holds_up_nothing(place, model, trips_schema):
    log = Log(place[0], "one")
    ids = put(log, model)
    log.rotate()
    (path,) = (place[0] / "ready").iterdir()
    path.write_bytes(path.read_bytes() + b"what is this\n")
    (place[0] / "ready" / "trips.two.000000001.5").write_bytes(b'{"h":1,"schema":{}}\n{"v":1,"t":[1]}\n')
    Drain(*place).step()
    assert Lake(place[1], "trips", trips_schema).predictions(EVER).column("prediction_id").to_pylist() == ids
    assert len(list((place[0] / "broken").iterdir())) == 2
    assert not list((place[0] / "ready").iterdir())


def test_a_failing_write_is_counted_and_the_rest_stays_readable(place, model, trips_schema):
    log = Log(place[0], "one")
    before = put(log, model)
    segment = log._segments["trips"]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, segment.descriptor)
    os.close(full)
    put(log, model)
    assert log.lost == 2
    assert "No space left" in log.failure
    after = put(log, model)
    assert log.failure == ""
    log.rotate()
    Drain(*place).step()
    rows = Lake(place[1], "trips", trips_schema).predictions(EVER)
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(before + after)


def test_a_segment_that_the_drain_removes_before_it_is_locked_is_not_written_to(
    place, model, trips_schema, monkeypatch
):
    log, drain, lock = Log(place[0], "one"), Drain(*place), fcntl.flock

    def late(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        assert drain.adopt() == 0  # of the file that was just made: it is empty, and nobody has it
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    ids = put(log, model)
    log.rotate()
    assert drain.step() == len(ids)
    assert Lake(place[1], "trips", trips_schema).predictions(EVER).column("prediction_id").to_pylist() == ids
    assert log.lost == 0


def test_a_segment_that_somebody_removed_is_counted_and_holds_up_nothing(place, model):
    log = Log(place[0], "one")
    put(log, model)
    next(log.open_folder.iterdir()).unlink()
    put(log, model, workload="buses")
    log.rotate()
    assert log.lost == 2
    assert [path.name for path in log.ready_folder.iterdir()] == ["buses.one.000000002.2"]
    assert log.writing() == {}


def test_a_missing_folder_loses_nothing(place, model):
    log = Log(place[0], "one")
    put(log, model)
    shutil.rmtree(log.ready_folder)
    with pytest.raises(FileNotFoundError):
        log.rotate()
    log.ready_folder.mkdir()
    log.rotate()
    assert (log.lost, log.pending()) == (0, {"trips": (2, 1)})


def test_a_failing_sync_is_counted_once_and_said_until_one_succeeds(place, model, unsyncable):
    log = Log(place[0], "one")
    put(log, model)
    log.sync()
    put(log, model)
    unsyncable(log._segments["trips"])
    log.sync()
    assert (log.failures, log.lost) == (1, 2)  # the first two rows are on the disk
    put(log, model)
    assert "does not reach the disk" in log.failure  # though it can be written
    log.sync()
    assert (log.failures, log.lost) == (2, 4)
    log.sync()
    log.rotate()
    assert (log.failures, log.lost) == (2, 4)
    put(log, model)
    assert "does not reach the disk" in log.failure
    log.sync()
    assert (log.failures, log.lost, log.failure) == (2, 4, "")


def test_what_lies_behind_rows_that_were_not_synced_is_not_safe(place, model, unsyncable):
    """The system says of rows that it lost that they are there, and a file with a gap cannot be read to its end."""
    log = Log(place[0], "one")
    put(log, model)
    segment = log._segments["trips"]
    kept = os.dup(segment.descriptor)
    unsyncable(segment)
    log.sync()
    os.dup2(kept, segment.descriptor)  # the disk is well again
    os.close(kept)
    put(log, model)
    log.sync()
    assert (log.failures, log.lost) == (2, 4)
    log.rotate()
    put(log, model)
    log.sync()
    assert (log.failures, log.lost, log.failure) == (2, 4, "")


def test_reading_a_segment_needs_nothing_else(place, model, trips_schema):
    log = Log(place[0], "one")
    put(log, model)
    log.rotate()
    (path,) = (place[0] / "ready").iterdir()
    tables, broken = read(path.read_bytes())
    assert broken == 0
    assert tables["predictions"].num_rows == 2


def test_a_number_that_names_another_schema_begins_another_segment(place, model):
    """As on a cluster, where a registry that counts from 1 again brings another version 1 to the same process."""
    schema = model.bundle.schema
    fewer = replace(schema, columns=tuple(one for one in schema.columns if one.name != "zone"))
    other = replace(model, bundle=replace(model.bundle, schema=fewer))
    log = Log(place[0], "one")
    ids = put(log, model) + put(log, model)
    without = [{name: value for name, value in record.items() if name != "zone"} for record in RECORDS]
    ids += put(log, other, without)
    assert log.pending() == {"trips": (6, 2)}
    log.rotate()
    tables = [read(path.read_bytes())[0]["predictions"] for path in sorted((place[0] / "ready").iterdir())]
    assert ["zone" in table.column_names for table in tables] == [True, False]
    assert [name for table in tables for name in table.column("prediction_id").to_pylist()] == ids


def test_an_append_is_bounded_in_bytes_too(place, model, monkeypatch):
    log = Log(place[0], "one")
    for _ in range(3):
        put(log, model)
        log.rotate()
    sizes = sorted(path.stat().st_size for path in (place[0] / "ready").iterdir())
    monkeypatch.setattr(drain_module, "MOST_BYTES", 2 * sizes[-1])
    moved = []
    monkeypatch.setattr(Drain, "_move", lambda self, part: moved.append(len(part)))
    assert Drain(*place).step() == 6
    assert moved == [2, 1]


def test_a_new_table_is_checkpointed_every_ten_commits(place, model):
    log, drain = Log(place[0], "one"), Drain(*place)
    for _ in range(11):
        put(log, model)
        log.rotate()
        drain.step()
    folder = Path(place[1]) / "trips" / "predictions" / "_delta_log"
    assert list(folder.glob("*.checkpoint*.parquet"))
