"""Cleaning, order of time, the split, and duplicates that would leak."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from noria.errors import DataError
from noria.options import TrainingOptions
from noria.schema import Column, Schema
from noria.workload import Rule, Workload
from training.data import labelled, prepare


def is_short(table: pa.Table) -> object:
    return pc.less(table.column("length"), 1e6)


class Rows(Workload):
    name = "rows"
    schema = Schema(
        (Column("length", "number"), Column("colour", "string"), Column("note", "string", feature=False)),
        event_time="at",
        target="price",
    )
    task = "regression"
    rules = (Rule("long", ("length",), is_short),)
    training = TrainingOptions(minimum_rows=10)


START = datetime(2020, 1, 1, tzinfo=UTC)


def table(rows: int, **changes: list) -> pa.Table:
    columns = {
        "length": [float(row) for row in range(rows)],
        "colour": ["red"] * rows,
        "note": [str(row) for row in range(rows)],
        "at": [START + timedelta(minutes=row) for row in range(rows)],
        "price": [row + 1.0 for row in range(rows)],
    }
    return pa.table(columns | changes)


def test_the_split_is_80_10_10_in_order_of_time() -> None:
    shuffled = table(1000).take(np.random.default_rng(0).permutation(1000))
    split = prepare(shuffled, Rows()).split
    assert [len(part) for _, part in split] == [800, 100, 100]
    times = [part.column("at").to_pylist() for _, part in split]
    assert max(times[0]) < min(times[1])
    assert max(times[1]) < min(times[2])


def test_rows_of_one_moment_stay_in_one_part() -> None:
    hours = [START + timedelta(hours=row // 7) for row in range(1000)]
    split = prepare(table(1000, at=hours), Rows()).split
    seen = [set(part.column("at").to_pylist()) for _, part in split]
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    assert [len(part) for _, part in split] == [798, 98, 104]


def test_all_at_one_moment_still_splits() -> None:
    assert [len(part) for _, part in prepare(table(100, at=[START] * 100), Rows()).split] == [80, 10, 10]


def test_held_out_rows_are_the_newest_and_at_most_a_fifth() -> None:
    assert [len(part) for _, part in prepare(table(1000), Rows(), held_out=50).split] == [900, 50, 50]
    assert [len(part) for _, part in prepare(table(100), Rows(), held_out=50).split] == [60, 20, 20]


def test_what_an_earlier_part_holds_is_removed_from_later_ones_and_counted() -> None:
    lengths, prices = [float(row) for row in range(100)], [row + 1.0 for row in range(100)]
    lengths[85], prices[85] = lengths[3], prices[3]  # validation repeats train
    lengths[95], prices[95] = lengths[84], prices[84]  # test repeats validation
    lengths[97], prices[97] = lengths[5], -1.0  # same features, another label: kept
    lengths[20], prices[20] = lengths[19], prices[19]  # a repeat inside train: kept
    lengths[99] = lengths[98] = None  # missing equals missing
    prices[99] = prices[98]
    prepared = prepare(table(100, length=lengths, price=prices), Rows())
    assert prepared.duplicates == 2
    assert [len(part) for _, part in prepared.split] == [80, 9, 9]


def test_rejected_rows_are_counted_by_rule() -> None:
    lengths = [2e6, 2e6, *map(float, range(98))]
    prices = [1.0] * 97 + [None, float("nan"), 2.0]
    rows, rejected = labelled(table(100, length=lengths, price=prices), Rows())
    assert rejected == {"long": 2, "no label or event time": 2}
    assert len(rows) == 96


def test_too_few_rows_and_impossible_labels_are_refused_in_sentences() -> None:
    with pytest.raises(DataError, match=r"has 9 usable labelled rows of 11 \(2 long\); training needs 10"):
        prepare(table(11, length=[2e6, 2e6, *map(float, range(9))]), Rows())

    class Log(Rows):
        log_target = True

    with pytest.raises(DataError, match="3 values are at or below zero"):
        prepare(table(100, price=[0.0, -1.0, 0.0, *map(float, range(1, 98))]), Log())

    class Binary(Rows):
        task = "binary"

    with pytest.raises(DataError, match="holds 2; use 0 and 1"):
        prepare(table(100, price=[2.0] + [1.0] * 99), Binary())

    class Unlabelled(Rows):
        schema = replace(Rows.schema, target="value")

    with pytest.raises(DataError, match="no column 'value'"):
        prepare(table(100), Unlabelled())


def test_a_part_made_of_repeats_only_is_an_error() -> None:
    same = table(100, length=[1.0] * 100, price=[1.0] * 100)
    with pytest.raises(DataError, match="repeated"):
        prepare(same, Rows())
