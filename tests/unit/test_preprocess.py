"""The preprocessing graph against plain Python: dictionaries, datetime, math."""

import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from noria.errors import DataError
from noria.options import TrainingOptions
from noria.schema import MISSING_INTEGER, Column, Schema
from training.preprocess import Preprocessing, fit, read_inputs

SCHEMA = Schema(
    (Column("size", "number"), Column("shop", "integer"), Column("colour", "string"), Column("at", "timestamp"),
     Column("body", "text")),
    event_time="at", target="price",
)  # fmt: skip
OPTIONS = TrainingOptions(words=6, vocabulary=50)


@pytest.fixture(scope="module")
def fitted() -> Preprocessing:
    rows = 60
    table = pa.table({
        "size": pa.array([None if row % 10 == 0 else row * 1.5 for row in range(rows)], pa.float64()),
        "shop": pa.array([[7, -3, 12][row % 3] if row > 2 else None for row in range(rows)], pa.int64()),
        "colour": ["red" if row % 2 else "rosé" for row in range(rows - 2)] + ["rare", None],
        "at": [datetime(2020, 1, 1, tzinfo=UTC) + timedelta(hours=row) for row in range(rows)],
        "body": ["Free money\nNOW" if row % 2 else "see\tyou\r\nnow" for row in range(rows)],
    })  # fmt: skip
    return fit(SCHEMA, table, OPTIONS)


def run(fitted: Preprocessing, **columns: list) -> dict[str, np.ndarray]:
    rows = len(next(iter(columns.values())))
    kinds = {"size": (np.nan, np.float32), "shop": (MISSING_INTEGER, np.int64), "colour": ("", object),
             "at": (MISSING_INTEGER, np.int64), "body": ("", object)}  # fmt: skip
    return fitted.run(
        {name: np.array(columns.get(name, [missing] * rows), kind) for name, (missing, kind) in kinds.items()}
    )


def test_numbers_are_standardised_cut_and_know_missing(fitted: Preprocessing) -> None:
    values = [1.5 * row for row in range(60) if row % 10]
    mean, deviation = float(np.mean(values)), float(np.std(values))
    logs = np.log1p(values)
    given = [0.0, 30.0, -4.0, 3e38, -3e38, math.nan]
    made = run(fitted, size=given)["size.number"]
    for value, row in zip(given[:-1], made, strict=False):
        log = math.copysign(math.log1p(abs(value)), value)
        assert row[0] == pytest.approx(np.clip((value - mean) / deviation, -8, 8), rel=1e-5)
        assert row[1] == pytest.approx(np.clip((log - logs.mean()) / logs.std(), -8, 8), rel=1e-5)
        assert row[2] == 0
    assert made[-1].tolist() == [0, 0, 1]


def test_levels_are_ordered_by_frequency_and_rare_or_new_ones_are_unknown(fitted: Preprocessing) -> None:
    assert run(fitted, shop=[12, -3, 7, 99, -99, MISSING_INTEGER])["shop.level"].tolist() == [4, 2, 3, 1, 1, 0]
    assert run(fitted, colour=["red", "rosé", "rare", "Red", "", "🦆"])["colour.level"].tolist() == [2, 3, 1, 1, 0, 1]


def test_clock_agrees_with_datetime_on_every_edge(fitted: Preprocessing) -> None:
    midnights = [
        int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (1901, 1969, 1970, 2018, 2020, 2038, 2106)
    ]
    given = sorted({base + day * 86_400 + hour * 3600 + second for base in [*midnights, 0, 2**31, 2**32]
                    for day in range(8) for hour in (0, 1, 23) for second in (-64, -1, 0, 1, 59, 3599)})  # fmt: skip
    made = run(fitted, at=given)
    for row, seconds in enumerate(given):
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
        assert made["at.hour"][row] == moment.hour + 1
        assert made["at.weekday"][row] == moment.weekday() + 1
        assert made["at.hour_of_week"][row] == moment.weekday() * 24 + moment.hour + 1


def test_clock_survives_the_ends_of_int64_and_missing(fitted: Preprocessing) -> None:
    made = run(fitted, at=[MISSING_INTEGER, 2**63 - 1, MISSING_INTEGER + 1])
    assert [made[name][0] for name in ("at.hour", "at.weekday", "at.hour_of_week")] == [0, 0, 0]
    assert (made["at.hour_of_week"][1:] >= 1).all()
    assert (made["at.hour_of_week"][1:] <= 168).all()


def test_words_are_lower_cased_split_at_any_blank_and_cut(fitted: Preprocessing) -> None:
    # By frequency, then alphabet: now (60), free, money, see, you (30 each).
    ids = {"now": 2, "free": 3, "money": 4, "see": 5, "you": 6}
    texts = ["FREE  money\r\n\tnow", "", "  ", "you " * 9, "ünknown Now", "a\n\n\n\nsee", "now\x00 \u2003 free"]
    made = run(fitted, body=texts)["body.words"]
    for text, row in zip(texts, made, strict=True):
        words = [word for word in "".join(" " if c in "\n\r\t" else c for c in text).split(" ") if word][:6]
        expected = [ids.get("".join(c.lower() if c.isascii() else c for c in word), 1) for word in words]
        assert row.tolist() == expected + [0] * (6 - len(expected)), text


def test_a_batch_of_empty_texts_and_a_batch_of_one_work(fitted: Preprocessing) -> None:
    assert run(fitted, body=["", ""])["body.words"].tolist() == [[0] * 6] * 2
    assert run(fitted, body=["now"])["body.words"].tolist() == [[2, 0, 0, 0, 0, 0]]


def test_a_column_without_any_value_is_harmless() -> None:
    empty = SCHEMA.arrow()
    table = pa.table({name: pa.nulls(9, empty.field(name).type) for name in SCHEMA.names})
    made = run(fit(SCHEMA, table, OPTIONS), size=[3.0, math.nan], shop=[1, MISSING_INTEGER], colour=["red", ""])
    assert np.isfinite(made["size.number"]).all()
    assert made["shop.level"].tolist() == made["colour.level"].tolist() == [1, 0]
    with pytest.raises(DataError, match="no rows"):
        fit(SCHEMA, table.slice(0, 0), OPTIONS)


def test_inputs_describe_the_tensors_and_survive_json(fitted: Preprocessing) -> None:
    assert read_inputs(fitted.describe()) == fitted.inputs
    made = run(fitted, size=[1.0] * 5000)
    for entry in fitted.inputs:
        width = {"number": (entry.size,), "words": (entry.width,)}.get(entry.kind, ())
        assert made[entry.name].shape == (5000, *width)
        assert entry.kind == "number" or made[entry.name].max() < entry.size
