"""Baselines, evaluations by subject, what curves are said to show, the choice of a window."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from noria.errors import DataError
from noria.options import TrainingOptions
from noria.records import Evaluation
from noria.workload import Workload
from training import evaluate, preprocess, windows
from training.evaluate import Boosted, BoostedScorer
from training.preprocess import Input

Rows = Callable[..., pa.Table]


def test_boosted_trees_read_the_same_tensors_and_beat_the_naive_baseline(parcels: Workload, sent_parcels: Rows) -> None:
    train, test = sent_parcels(1500), sent_parcels(400, seed=1)
    made = preprocess.fit(parcels.schema, train, parcels.training)
    tensors = made.run(parcels.schema.tensors(train))
    trees = Boosted.fit(parcels, made.inputs, tensors, train.column("hours").to_numpy(), rounds=40)
    scores = {"boosted": BoostedScorer(trees, made, parcels.schema)(test), "naive": parcels.naive(train)(test)}
    found = evaluate.judge(parcels, test, {"candidate": scores["boosted"], **scores})
    assert found["boosted"].metrics["mae"] < 0.35 * found["naive"].metrics["mae"]
    assert found["boosted"].slices["express"]["rows"] == sum(s == "express" for s in test.column("service").to_pylist())


def test_boosted_trees_stand_missing_columns_constants_and_many_levels(parcels: Workload) -> None:
    inputs = (
        Input("id", "id", "level", 2000),
        Input("gone", "gone", "number", 3),
        Input("text", "text", "words", 9, 4),
    )
    labels = np.random.default_rng(0).lognormal(size=1000)
    ids = np.arange(1000) * 2
    gone = np.tile(np.array([[0, 0, 1]], np.float32), (1000, 1))
    tensors = {"id": ids, "gone": gone, "text": np.zeros((1000, 4), np.int64)}
    scores = Boosted.fit(parcels, inputs, tensors, labels, rounds=5).score(tensors)
    assert np.isfinite(scores).all()
    nothing = (inputs[1],)
    constant = Boosted.fit(parcels, nothing, {"gone": gone}, labels, rounds=5).score({"gone": gone})
    assert np.allclose(constant, constant[0])


def test_boosted_trees_give_probabilities_even_with_one_class(parcels: Workload) -> None:
    class Late(type(parcels)):  # type: ignore[misc]
        task = "binary"
        log_target = False

    inputs = (Input("weight", "weight", "number", 3),)
    weight = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    weight[:, 2] = 0
    tensors = {"weight": weight}
    scores = Boosted.fit(Late(), inputs, tensors, (weight[:, 1] > 0).astype(float), rounds=20).score(tensors)
    assert ((scores > 0.5) == (weight[:, 1] > 0)).mean() > 0.95
    for label in (0.0, 1.0):
        assert (Boosted.fit(Late(), inputs, tensors, np.full(500, label), rounds=2).score(tensors) == label).all()


def curve(train: list[float], validation: list[float]) -> list[dict[str, float]]:
    history = []
    for epoch, (low, high) in enumerate(zip(train, validation, strict=True)):
        entry = {"epoch": float(epoch)}
        for kind in ("loss", "error"):
            entry |= {f"train_{kind}": low, f"validation_{kind}": high, f"test_{kind}": high}
        history.append(entry)
    return history


def rated(**errors: float) -> dict[str, Evaluation]:
    return {subject: Evaluation(100, {"error": error}) for subject, error in errors.items()}


def test_the_diagnosis_names_over_and_underfitting() -> None:
    def said(train: list[float], validation: list[float], **errors: float) -> str:
        return " ".join(evaluate.diagnose(curve(train, validation), rated(**{"candidate": 1.0, **errors})))

    assert "Overfitting" in said([1, 0.5, 0.2], [1, 0.8, 0.9])
    assert "epoch 2 of 3" in said([1, 0.5, 0.2], [1, 0.8, 0.9])
    assert "No overfitting" in said([1, 0.5, 0.5], [1, 0.51, 0.52])
    assert "Underfitting: validation was still improving" in said([1, 0.8, 0.6], [1, 0.8, 0.6])
    assert "20.0% worse than the boosted" in said([1, 1, 1], [1, 1.01, 1.02], candidate=1.2, boosted=1.0)
    assert "boosted trees find more" in said([1, 1, 1], [1, 1.01, 1.02], candidate=1.2, boosted=1.0)
    assert "50.0% better than the naive" in said([1, 1, 1], [1, 1.01, 1.02], naive=2.0)
    assert "not improved" in evaluate.diagnose([], rated(candidate=1.0))[0]


def test_the_curves_are_a_picture_with_labelled_axes(tmp_path: Path) -> None:
    figure = evaluate.curves(curve([3, 2, 1], [3, 2.5, 2.6]), "hours")
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (optimised)", "error (hours)"]


class TestWindows:
    def workload(self, parcels: Workload, *days: int, minimum: int = 200) -> Workload:
        class Chosen(type(parcels)):  # type: ignore[misc]
            training = TrainingOptions(
                windows=tuple(timedelta(days=day) for day in days), minimum_rows=minimum, hidden=(16,), words=8
            )

        return Chosen()

    def test_after_a_break_the_short_window_wins(self, parcels: Workload, sent_parcels: Rows) -> None:
        rows = sent_parcels(3000, seed=1)
        hours = rows.column("hours").to_numpy() * np.where(np.arange(3000) < 2400, 1.0, 3.0)
        table = rows.set_column(rows.column_names.index("hours"), "hours", pa.array(hours))
        choice = windows.choose(self.workload(parcels, 100, 25), table)
        assert choice.window == timedelta(days=25)
        assert choice.start == table.column("sent")[-1].as_py() - timedelta(days=25)
        assert choice.rows == {timedelta(days=100): 2400, timedelta(days=25): 600}
        assert choice.judged_on == 150
        assert "25 days predict the newest 150 rows best (100 days " in choice.reason()

    def test_where_nothing_changed_the_long_window_wins(self, parcels: Workload, sent_parcels: Rows) -> None:
        assert windows.choose(self.workload(parcels, 100, 10), sent_parcels(3000)).window == timedelta(days=100)

    def test_windows_without_rows_are_skipped(self, parcels: Workload, sent_parcels: Rows) -> None:
        choice = windows.choose(self.workload(parcels, 100, 2), sent_parcels(3000))
        assert choice.window == timedelta(days=100)
        assert "only window with enough rows" in choice.reason()
        with pytest.raises(DataError, match="longest window, 100 days; training needs 5000"):
            windows.choose(self.workload(parcels, 100, 2, minimum=5000), sent_parcels(3000))

    def test_a_champion_that_knows_better_helps_the_short_window(self, parcels: Workload, sent_parcels: Rows) -> None:
        rows = sent_parcels(3000, seed=1)
        alone = windows.choose(self.workload(parcels, 100, 10), rows)
        helped = windows.choose(self.workload(parcels, 100, 10), rows, champion=lambda t: t.column("hours").to_numpy())
        assert helped.errors[timedelta(days=10)] < 0.7 * alone.errors[timedelta(days=10)]
