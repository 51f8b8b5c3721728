"""Writers of the lake as processes of their own: at once, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from noria.lake import Lake
from noria.records import Window, moment
from noria.schema import Column, Schema

SCHEMA = Schema((Column("distance", "number"), Column("pickup", "timestamp")), event_time="pickup", target="minutes")
EVER = Window(moment("2000-01-01"), moment("2100-01-01"))
OLD = pa.table({"distance": [0.0], "pickup": [moment("2020-03-01")], "minutes": [1.0]}, schema=SCHEMA.arrow())


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path), "trips", SCHEMA)


WRITER = """
import sys
from datetime import timedelta
import pyarrow as pa
from noria.lake import Lake
from noria.records import moment
from noria.schema import Column, Schema

root, source, first, count, rows = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
schema = Schema((Column("distance", "number"), Column("pickup", "timestamp")), event_time="pickup", target="minutes")
lake = Lake(root, "trips", schema)
for number in range(first, first + count):
    columns = {"distance": [float(number)] * rows, "pickup": [moment("2020-03-02")] * rows, "minutes": [1.0] * rows}
    table = pa.table(columns, schema=schema.arrow())
    print(number, flush=True)
    lake.append("records", table, batch=(source, number))
"""


def writer(lake: Lake, source: str, first: int, count: int, rows: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, lake.root, source, str(first), str(count), str(rows)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def batches(lake: Lake) -> dict[float, int]:
    """Rows by batch number."""
    values = lake.records(EVER).column("distance").value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in values}


def test_two_writers_at_once_lose_nothing(lake: Lake) -> None:
    started = [writer(lake, "one", 0, 15, 10), writer(lake, "two", 100, 15, 10)]
    for process in started:
        process.communicate(timeout=120)
        assert process.returncode == 0
    expected = [*range(15), *range(100, 115)]
    assert batches(lake) == {float(number): 10 for number in expected}


@pytest.mark.parametrize("there", [True, False], ids=["a table", "no table yet"])
def test_the_same_batch_from_two_writers_at_once_is_written_once(lake: Lake, there: bool) -> None:
    if there:
        lake.append("records", OLD, batch=("before", 0))
    started = [writer(lake, "same", 1, 20, 10) for _ in range(2)]
    for process in started:
        process.communicate(timeout=120)
        assert process.returncode == 0
    found = batches(lake)
    assert found.pop(0.0, None) == (1 if there else None)
    assert found == dict.fromkeys(range(1, 21), 10), "a writer that was thought dead must not write its batch again"


def test_a_killed_append_leaves_whole_batches_and_the_retry_writes_once(lake: Lake) -> None:
    lake.append("records", OLD, batch=("before", 0))
    rows, following = 100_000, 1
    for delay in (0.0, 0.03, 0.1):
        process = writer(lake, "killed", following, 50, rows)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == following
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()
        found = batches(lake)
        assert found.pop(0.0) == 1, "the old rows stay readable"
        assert set(found.values()) <= {rows}, "a batch is there as a whole or not at all"
        assert len(found) == max(lake.appended("records", "killed"), 0)
        retry = writer(lake, "killed", following, 1, rows)
        retry.communicate(timeout=60)
        assert retry.returncode == 0
        assert batches(lake)[float(following)] == rows
        following = lake.appended("records", "killed") + 1
