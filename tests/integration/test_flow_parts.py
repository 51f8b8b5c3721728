"""What the flows' tasks do by themselves, without a stack: reading, naming, logging and writing a batch."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ferry import BEGIN, FIRST, WEEK, WORKLOAD

from flows.batch import batch_name, log_predictions, name_rows, read, write
from flows.watch import _known
from noria.errors import DataError, SchemaError
from noria.lake import Lake
from noria.records import Window

NOW = BEGIN + WEEK


@pytest.fixture
def lake(tmp_path):
    return Lake(str(tmp_path / "lake"), WORKLOAD.name, WORKLOAD.schema)


@pytest.fixture(scope="module")
def rows():
    return WORKLOAD.records(FIRST).slice(0, 50)


def test_a_file_is_read_by_the_schema(lake, rows, tmp_path):
    source = tmp_path / "rows.parquet"
    pq.write_table(rows.drop_columns("cars"), source)
    with pytest.raises(SchemaError, match="cars"):
        read.fn(WORKLOAD, lake, str(source), NOW)
    pq.write_table(rows.set_column(2, "cars", rows.column("cars").cast(pa.float32())), source)
    found = read.fn(WORKLOAD, lake, str(source), NOW)
    assert found.column("cars").type == pa.float64()
    assert found.select(["departed", "pier", "cars"]).equals(rows.select(["departed", "pier", "cars"]))


def test_without_a_file_the_lakes_newest_window_is_read(lake):
    lake.append("records", WORKLOAD.records(FIRST))
    found = read.fn(WORKLOAD, lake, None, NOW)
    assert len(found) == len(WORKLOAD.records(Window(BEGIN, NOW)))


@pytest.mark.parametrize(("source", "sentence"), [("none.parquet", "no file none.parquet"), (None, "no rows to score")])
def test_nothing_to_score_is_said(lake, source, sentence):
    with pytest.raises(DataError, match=sentence):
        read.fn(WORKLOAD, lake, source, NOW)


def test_a_batch_is_named_after_rows_version_and_time(rows):
    name = batch_name(rows, 3, NOW)
    assert batch_name(pa.concat_tables([rows.slice(0, 20), rows.slice(20)]), 3, NOW) == name
    others = [batch_name(rows.slice(1), 3, NOW), batch_name(rows, 4, NOW), batch_name(rows, 3, NOW + WEEK)]
    assert len({name, *others}) == 4
    ids = name_rows(rows, name).column("prediction_id").to_pylist()
    assert len(set(ids)) == len(rows) and all(len(one) == 32 for one in ids)


def test_a_batch_is_logged_once_whatever_was_logged_between(lake, rows):
    other = WORKLOAD.records(FIRST).slice(50, 10)
    for part in (rows, other, rows):
        name = batch_name(part, 3, NOW)
        scored = part.append_column("score", pa.array([20.0] * len(part)))
        scored = scored.append_column("action", pa.array(["on time"] * len(part)))
        log_predictions.fn(lake, name_rows(scored, name), WORKLOAD, version=3, batch=name)
    logged = lake.predictions(FIRST)
    assert len(logged) == lake.versions()["predictions"] * 10 + 50 == 60
    assert set(logged.column("version").to_pylist()) == {3}


def test_results_are_whole_or_not_there(rows, tmp_path):
    output = write.fn(rows, tmp_path / "new" / "rows-scored.parquet")
    assert pq.read_table(output).equals(rows)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("tag", "reason"),
    [("quality", "quality"), ("drift", "drift"), ("initial", "initial"), ("age", "age"), ("", "manual"),
     ("Rolled back from version 2.", "manual")],
)  # fmt: skip
def test_what_a_person_wrote_as_reason_counts_as_theirs(tag, reason):
    assert _known(tag) == reason
