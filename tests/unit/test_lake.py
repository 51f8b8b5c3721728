"""The lake keeps its promises: the same rows for ever, half open windows, the newest label, batches once."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from noria.errors import LakeError
from noria.lake import COMPACT_EVERY, Lake
from noria.records import DatasetRef, Window, moment
from noria.schema import Column, Schema

SCHEMA = Schema((Column("distance", "number"), Column("pickup", "timestamp")), event_time="pickup", target="minutes")
MONDAY = moment("2020-03-02")
WEEK = Window(MONDAY, MONDAY + timedelta(weeks=1))
LATER = MONDAY + timedelta(weeks=9)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path), "trips", SCHEMA)


def records(count: int, start: datetime = MONDAY, target: float | None = 10.0) -> pa.Table:
    """One row a minute."""
    times = [start + timedelta(minutes=index) for index in range(count)]
    columns = {"distance": [float(index) for index in range(count)], "pickup": times, "minutes": [target] * count}
    return pa.table(columns, schema=SCHEMA.arrow())


def predictions(ids: list[str], start: datetime = MONDAY, version: int = 1) -> pa.Table:
    times = [start + timedelta(minutes=index) for index in range(len(ids))]
    return pa.table(
        {
            "prediction_id": ids,
            "event_time": pa.array(times, pa.timestamp("us", tz="UTC")),
            "version": pa.array([version] * len(ids), pa.int64()),
            "score": [1.0] * len(ids),
            "action": pa.nulls(len(ids), pa.string()),
            "latency_ms": [0.1] * len(ids),
            "distance": [2.0] * len(ids),
            "pickup": pa.array(times, pa.timestamp("us", tz="UTC")),
        }
    )


def labels(values: dict[str, float], arrived: datetime) -> pa.Table:
    times = pa.array([arrived] * len(values), pa.timestamp("us", tz="UTC"))
    return pa.table({"prediction_id": list(values), "label": list(values.values()), "arrived": times})


def test_what_nobody_wrote_reads_as_no_rows(lake: Lake) -> None:
    assert lake.versions() == {"records": -1, "predictions": -1, "labels": -1}
    for rows in (
        lake.shadow(WEEK, 2),
        lake.records(WEEK),
        lake.predictions(WEEK),
        lake.labels(LATER),
        lake.judged(WEEK, LATER),
    ):
        assert len(rows) == 0
    ref, rows = lake.dataset(WEEK, LATER)
    assert (ref.rows, len(rows)) == (0, 0)
    lake.append("records", records(3))
    assert len(lake.read(ref)) == 0


def test_windows_are_half_open(lake: Lake) -> None:
    edge = timedelta(microseconds=1)
    for start in (WEEK.start - edge, WEEK.start, WEEK.end - edge, WEEK.end):
        lake.append("records", records(1, start))
        lake.append("predictions", predictions([start.isoformat()], start))
    inside = [WEEK.start, WEEK.end - edge]
    assert lake.records(WEEK).column("pickup").to_pylist() == inside
    assert lake.predictions(WEEK).column("event_time").to_pylist() == inside
    following = Window(WEEK.end, WEEK.end + timedelta(weeks=1))
    assert lake.records(following).column("pickup").to_pylist() == [WEEK.end]


def test_a_dataset_reads_back_after_appends_and_compaction(lake: Lake) -> None:
    for hour in range(COMPACT_EVERY + 5):
        lake.append("records", records(5, MONDAY + timedelta(hours=hour)))
    lake.append("predictions", predictions([f"p{index}" for index in range(20)]))
    lake.append("labels", labels({f"p{index}": float(index) for index in range(10)}, MONDAY + timedelta(days=1)))
    ref, rows = lake.dataset(WEEK, LATER)
    assert len(rows) == ref.rows == 5 * (COMPACT_EVERY + 5) + 10
    lake.append("records", records(7))
    lake.append("predictions", predictions(["late"]))
    lake.append("labels", labels({"p0": 99.0, "p15": 1.0, "late": 1.0}, MONDAY + timedelta(days=2)))
    lake.compact()
    lake.append("records", records(7))
    assert lake.versions()["records"] > ref.versions["records"] + 2, "the compaction must have happened"
    again = lake.read(DatasetRef.from_json(ref.to_json()))
    assert again.equals(rows)
    fresh, grown = lake.dataset(WEEK, LATER)
    assert len(grown) == len(rows) + 14 + 2
    assert fresh.fingerprint != ref.fingerprint


def test_the_fingerprint_depends_on_the_rows_alone(tmp_path: Path) -> None:
    one, two = Lake(str(tmp_path / "one"), "trips", SCHEMA), Lake(str(tmp_path / "two"), "trips", SCHEMA)
    rows = records(50)
    one.append("records", rows)
    for start in (30, 0):
        two.append("records", rows.slice(start, 20 if start else 30))
    assert one.dataset(WEEK, LATER)[0].fingerprint == two.dataset(WEEK, LATER)[0].fingerprint


def test_a_changed_lake_is_said(lake: Lake) -> None:
    lake.append("records", records(5))
    ref, _ = lake.dataset(WEEK, LATER)
    forged = DatasetRef.from_json({**ref.to_json(), "fingerprint": "0" * 64})
    with pytest.raises(LakeError, match="no longer holds the 5 rows"):
        lake.read(forged)


def test_the_newest_label_wins_as_of_a_time(lake: Lake) -> None:
    lake.append("predictions", predictions(["a", "b"]))
    day = timedelta(days=1)
    lake.append("labels", labels({"a": 2.0}, MONDAY + 2 * day))
    lake.append("labels", labels({"a": 1.0, "stranger": 5.0}, MONDAY + day))
    lake.append("labels", labels({"a": 3.0, "b": 4.0}, MONDAY + 3 * day))
    seen = {
        days: dict(
            zip(
                *(
                    lake.judged(WEEK, MONDAY + days * day).column(name).to_pylist()
                    for name in ("prediction_id", "label")
                ),
                strict=True,
            )
        )
        for days in range(4)
    }
    assert seen == {0: {}, 1: {"a": 1.0}, 2: {"a": 2.0}, 3: {"a": 3.0, "b": 4.0}}


def test_of_labels_with_the_same_time_the_later_one_wins(lake: Lake) -> None:
    lake.append("predictions", predictions(["a"]))
    seen = []
    for number in range(12):
        values = [number + part / 10 for part in range(3)]
        times = pa.array([MONDAY] * 3, pa.timestamp("us", tz="UTC"))
        lake.append("labels", pa.table({"prediction_id": ["a"] * 3, "label": values, "arrived": times}))
        seen += lake.judged(WEEK, LATER).column("label").to_pylist()
    assert seen == [number + 0.2 for number in range(12)], "of one append, and of several"
    opened = DeltaTable(lake.address("labels"))
    opened.optimize.compact()
    assert len(DeltaTable(lake.address("labels")).file_uris()) == 1
    assert lake.judged(WEEK, LATER).column("label").to_pylist() == [11.2]


def test_records_without_a_label_are_no_training_rows(lake: Lake) -> None:
    lake.append("records", records(3, target=None))
    lake.append("records", records(2, MONDAY + timedelta(days=1)))
    assert len(lake.records(WEEK)) == 5
    assert lake.dataset(WEEK, LATER)[0].rows == 2


def test_a_prediction_logged_twice_counts_once(lake: Lake) -> None:
    lake.append("predictions", predictions(["a"]))
    lake.append("predictions", predictions(["a", "b"]))
    assert lake.predictions(WEEK).column("prediction_id").to_pylist() == ["a", "b"]


def test_rows_of_another_type_are_refused_before_anything_is_written(lake: Lake) -> None:
    whole = Lake(lake.root, "trips", Schema((Column("zone", "integer"),), event_time="pickup", target="minutes"))
    times = pa.array([MONDAY], pa.timestamp("us", tz="UTC"))
    assert whole.append("records", pa.table({"zone": [7], "pickup": times, "minutes": [1.0]}))
    before = whole.versions()
    with pytest.raises(LakeError, match=r"'zone' of .*/trips/records holds int64, and the rows have double there"):
        whole.append("records", pa.table({"zone": [0.75], "pickup": times, "minutes": [1.0]}))
    assert whole.versions() == before
    assert whole.records(WEEK).column("zone").to_pylist() == [7]


def test_a_named_batch_is_appended_once(lake: Lake) -> None:
    assert lake.append("records", records(3), batch=("server", 7))
    assert not lake.append("records", records(3), batch=("server", 7))
    assert not lake.append("records", records(3), batch=("server", 6))
    assert lake.append("records", records(3), batch=("other", 0))
    assert not lake.append("records", records(3), batch=("server", 9), after=6), "7 is among them, and there already"
    assert not lake.append("records", records(3), batch=("server", 9), after=-1)
    assert (lake.appended("records", "server"), lake.appended("records", "nobody")) == (7, -1)
    assert len(lake.records(WEEK)) == 6


def test_files_have_dictionaries_and_statistics_only_where_they_help(lake: Lake, tmp_path: Path) -> None:
    tensors = pa.array([[0.5, 1.5], [2.5, 3.5]], pa.list_(pa.float32()))
    rows = predictions(["a", "b"]).append_column("input.x", tensors)
    assert lake.append("predictions", rows)
    (path,) = (tmp_path / "trips" / "predictions").glob("*.parquet")
    group = pq.ParquetFile(path).metadata.row_group(0)
    found = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    having = {name for name, column in found.items() if "RLE_DICTIONARY" in column.encodings}
    assert {"event_time", "version"} <= having
    (tensor,) = [name for name in found if name.startswith("input.x.")]
    assert not having & {"prediction_id", tensor}
    assert {name for name, column in found.items() if not column.is_stats_set} == {tensor}
    assert {column.compression for column in found.values()} == {"SNAPPY"}
    assert lake.predictions(WEEK).column("input.x").to_pylist() == tensors.to_pylist()
