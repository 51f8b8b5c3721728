"""Quality: the right numbers with intervals that hold what they promise."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from monitoring.quality import EXACT_ROWS, judge
from noria.metrics import evaluate
from noria.records import Evaluation
from noria.schema import Column, Schema
from noria.workload import Workload

NOON = datetime(2020, 3, 2, 12, tzinfo=UTC)


class Minutes(Workload):
    name = "minutes"
    schema = Schema((Column("distance", "number"),), event_time="at", target="minutes")
    task = "regression"
    log_target = True


class Spam(Workload):
    name = "spam"
    schema = Schema((Column("text", "text"),), event_time="at", target="spam")
    task = "binary"


def rows(labels: np.ndarray, scores: np.ndarray) -> pa.Table:
    times = pa.array([NOON] * len(labels), pa.timestamp("us", tz="UTC"))
    return pa.table({"label": labels, "score": scores, "event_time": times})


def trips(count: int, seed: int, slower: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    one = np.random.default_rng(seed)
    scores = one.lognormal(2, 0.6, count)
    return scores * slower * one.lognormal(0, 0.3, count), scores


@pytest.fixture(scope="module")
def reference() -> Evaluation:
    return evaluate(*trips(4000, 0), task="regression", loss="absolute_error", log=True)


def test_numbers_are_those_of_the_definitions(reference: Evaluation) -> None:
    labels, scores = trips(500, 1, slower=1.3)
    found = judge(rows(labels, scores), reference, Minutes())
    assert found.rows == 500 and found.newest == NOON and found.reference_rows == 4000
    assert found.error.value == pytest.approx(np.abs(labels - scores).mean())
    assert found.bias.value == pytest.approx(np.log(labels / scores).mean())
    assert found.relative is not None
    assert found.relative.value == pytest.approx(np.abs(labels - scores).sum() / labels.sum())
    assert found.reference_error == reference.metrics["error"]
    assert found.reference_relative == reference.metrics["wape"]
    for interval in (found.error, found.bias, found.relative):
        assert interval.low < interval.value < interval.high
    assert found.bias.low > 0.2


def test_intervals_cover_the_truth(reference: Evaluation) -> None:
    """95% intervals of 200 rows hold the true values in at least 85% of 120 windows (the error is skewed)."""
    labels, scores = trips(400_000, 2)
    truth = (
        np.abs(labels - scores).mean(),
        np.log(labels / scores).mean(),
        np.abs(labels - scores).sum() / labels.sum(),
    )
    held = np.zeros(3)
    for window in range(120):
        part = slice(window * 200, window * 200 + 200)
        found = judge(rows(labels[part], scores[part]), reference, Minutes())
        intervals = (found.error, found.bias, found.relative)
        held += [one.low <= value <= one.high for one, value in zip(intervals, truth, strict=True) if one]
    assert (held / 120 >= 0.85).all()


def test_many_rows_take_the_normal_interval_which_is_the_same(reference: Evaluation) -> None:
    labels, scores = trips(EXACT_ROWS + 1, 3)
    normal = judge(rows(labels, scores), reference, Minutes()).error
    exact = judge(rows(labels[:-1], scores[:-1]), reference, Minutes()).error
    assert normal.high - normal.low == pytest.approx(exact.high - exact.low, rel=0.1)


def test_same_rows_same_quality(reference: Evaluation) -> None:
    table = rows(*trips(300, 4))
    assert judge(table, reference, Minutes()) == judge(table, reference, Minutes())


def test_binary_workloads_are_judged_by_log_loss() -> None:
    one = np.random.default_rng(5)
    scores = one.uniform(0.02, 0.98, 600)
    labels = (one.random(600) < scores).astype(float)
    reference = evaluate(labels, scores, task="binary", loss="log_loss")
    found = judge(rows(labels, scores), reference, Spam())
    assert found.relative is None
    assert found.error.value == pytest.approx(reference.metrics["log_loss"])
    assert found.bias.value == pytest.approx((labels - scores).mean())
    assert {"auc", "brier", "f1"} <= set(found.metrics)


def test_a_reference_that_knows_nothing_is_no_error() -> None:
    found = judge(rows(*trips(300, 6)), Evaluation(0, {}), Minutes())
    assert np.isnan(found.reference_error) and found.error.value > 0
