"""Metrics against scikit-learn's, and intervals against theory."""

import numpy as np
import pytest
from sklearn import metrics as peer

from noria.metrics import binary_metrics, bootstrap, evaluate, regression_metrics, residuals, row_losses

RANDOM = np.random.default_rng(0)
TRUTH = (RANDOM.random(500) < 0.3).astype(float)
SCORE = np.clip(0.3 * TRUTH + RANDOM.random(500) * 0.7, 0, 1).round(2)
MINUTES = RANDOM.lognormal(2, 0.7, 500)
GUESS = MINUTES * RANDOM.lognormal(0.1, 0.2, 500)


def test_binary_metrics_are_scikit_learns():
    found = binary_metrics(TRUTH, SCORE)
    assert found["auc"] == pytest.approx(peer.roc_auc_score(TRUTH, SCORE))
    assert found["f1"] == pytest.approx(peer.f1_score(TRUTH, SCORE > 0.5))
    assert found["brier"] == pytest.approx(peer.brier_score_loss(TRUTH, SCORE))
    assert found["log_loss"] == pytest.approx(peer.log_loss(TRUTH, np.clip(SCORE, 1e-7, 1 - 1e-7)))


def test_regression_metrics_are_scikit_learns():
    found = regression_metrics(MINUTES, GUESS, log=True)
    assert found["mae"] == pytest.approx(peer.mean_absolute_error(MINUTES, GUESS))
    assert found["rmse"] == pytest.approx(peer.root_mean_squared_error(MINUTES, GUESS))
    assert found["wape"] == pytest.approx(np.abs(MINUTES - GUESS).sum() / MINUTES.sum())
    assert found["mean_residual"] == pytest.approx(-0.1, abs=0.03)


def test_one_class_has_no_auc():
    assert np.isnan(binary_metrics(np.ones(5), np.linspace(0, 1, 5))["auc"])


def test_losses_stay_finite_at_the_edges():
    labels, scores = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert np.isfinite(row_losses("log_loss", labels, scores)).all()
    assert np.isfinite(residuals(np.array([0.0]), np.array([0.0]), log=True)).all()


def test_the_interval_is_the_one_of_theory():
    values = RANDOM.normal(3, 2, 4000)
    found = bootstrap(values)
    half = 1.96 * 2 / np.sqrt(4000)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)
    assert bootstrap(values) == found


def test_the_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        found = bootstrap(np.random.default_rng(seed).exponential(1, 200), resamples=300, seed=seed)
        covered += found.low <= 1 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_slices_without_rows_are_left_out():
    slices = {"all": np.ones(500, bool), "none": np.zeros(500, bool), "half": np.arange(500) < 250}
    found = evaluate(MINUTES, GUESS, task="regression", loss="absolute_error", log=True, slices=slices)
    assert set(found.slices) == {"all", "half"}
    assert found.slices["all"]["error"] == found.metrics["error"] == pytest.approx(found.metrics["mae"])
    assert found.slices["half"]["rows"] == 250


def test_nothing_has_no_metrics():
    assert evaluate(np.array([]), np.array([]), task="binary", loss="log_loss").metrics == {}
