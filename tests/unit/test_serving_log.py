"""The prediction log: what is written comes out of the lake once, whoever is killed when."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import numpy as np
import orjson
import pytest

from noria.lake import Lake
from noria.records import Window
from serving.capture import Log, batch_ids, new_base
from serving.drain import Drain, read
from serving.protocol import read_records

EVER = Window(datetime(1900, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
RECORDS = [
    {"pickup": "2020-03-15T08:30:00", "vendor": "Midtown", "distance": 2.1, "zone": 1},
    {"pickup": "2020-03-15T08:31:00"},
]


@pytest.fixture
def place(tmp_path):
    return tmp_path / "log", str(tmp_path / "lake")


def put(log, schema, records=RECORDS, version=1, workload="trips"):
    rows = read_records(orjson.dumps(records), schema)
    base = new_base(1_584_261_000_000)
    scores = np.arange(len(records), dtype=np.float32) + 0.1
    log.predictions(
        workload, version, schema, base=base, rows=rows, scores=scores, actions=["short"] * len(records), latency_ms=0.5
    )
    return batch_ids(base, len(records))


def test_rows_come_out_as_they_were_sent(place, trips_schema):
    log = Log(place[0], "one")
    ids = put(log, trips_schema)
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


def test_ids_sort_by_time_and_do_not_repeat():
    ids = [*batch_ids(new_base(1), 1000), *batch_ids(new_base(2), 1000)]
    assert len(set(ids)) == 2000
    assert ids == sorted(ids)
    assert {len(name) for name in ids} == {32}


def test_many_segments_versions_and_workloads(place, trips_schema):
    log = Log(place[0], "one")
    ids = []
    for version in (1, 1, 2):
        for _ in range(5):
            ids += put(log, trips_schema, version=version)
        log.rotate()
    other = put(log, trips_schema, workload="buses")
    log.rotate()
    assert Drain(*place).step() == 32
    rows = Lake(place[1], "trips", trips_schema).predictions(EVER)
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(ids)
    assert sorted(set(rows.column("version").to_pylist())) == [1, 2]
    assert Lake(place[1], "buses", trips_schema).predictions(EVER).column("prediction_id").to_pylist() == other


def test_a_parent_killed_before_it_cleaned_up_does_not_append_twice(place, trips_schema, tmp_path):
    log = Log(place[0], "one")
    first = put(log, trips_schema)
    log.rotate()
    kept = {path.name: path.read_bytes() for path in (place[0] / "ready").iterdir()}
    Drain(*place).step()
    for name, content in kept.items():  # as if it had been killed between the commit and the removal
        (place[0] / "ready" / name).write_bytes(content)
    second = put(log, trips_schema)
    log.rotate()
    Drain(*place).step()
    rows = Lake(place[1], "trips", trips_schema)._read("predictions", None, None, "event_time")
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(first + second)


def test_segments_of_a_dead_worker_are_adopted_without_their_torn_end(place, trips_schema):
    log = Log(place[0], "one")
    handed = put(log, trips_schema)
    log.rotate()
    left = put(log, trips_schema)
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


def test_an_adopted_segment_is_not_taken_for_an_old_one(place, trips_schema):
    log = Log(place[0], "one")
    stuck = put(log, trips_schema)
    segment = log._segments.pop("trips")  # never handed over
    later = put(log, trips_schema)
    log.rotate()
    drain = Drain(*place)
    drain.step()
    os.close(segment.descriptor)
    drain.step()
    rows = Lake(place[1], "trips", trips_schema).predictions(EVER)
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(stuck + later)


def test_a_damaged_line_is_kept_for_a_person_and_holds_up_nothing(place, trips_schema):
    log = Log(place[0], "one")
    ids = put(log, trips_schema)
    log.rotate()
    (path,) = (place[0] / "ready").iterdir()
    path.write_bytes(path.read_bytes() + b"what is this\n")
    (place[0] / "ready" / "trips.two.000000001.5").write_bytes(b'{"h":1,"schema":{}}\n{"v":1,"t":[1]}\n')
    Drain(*place).step()
    assert Lake(place[1], "trips", trips_schema).predictions(EVER).column("prediction_id").to_pylist() == ids
    assert len(list((place[0] / "broken").iterdir())) == 2
    assert not list((place[0] / "ready").iterdir())


def test_a_failing_write_is_counted_and_the_rest_stays_readable(place, trips_schema):
    log = Log(place[0], "one")
    before = put(log, trips_schema)
    segment = log._segments["trips"]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, segment.descriptor)
    os.close(full)
    put(log, trips_schema)
    assert log.lost == 2
    assert "No space left" in log.failure
    after = put(log, trips_schema)
    assert log.failure == ""
    log.rotate()
    Drain(*place).step()
    rows = Lake(place[1], "trips", trips_schema).predictions(EVER)
    assert sorted(rows.column("prediction_id").to_pylist()) == sorted(before + after)


def test_reading_a_segment_needs_nothing_else(place, trips_schema):
    log = Log(place[0], "one")
    put(log, trips_schema)
    log.rotate()
    (path,) = (place[0] / "ready").iterdir()
    tables, broken = read(path.read_bytes())
    assert broken == 0
    assert tables["predictions"].num_rows == 2
