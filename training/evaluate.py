"""How good a fitted model is, beside a naive one and boosted trees, and what its curves say.

The boosted trees read the same preprocessed tensors as the network, so that they are compared on equal terms. Not here:
the gate, which compares versions (`registry.gate`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from noria.metrics import evaluate
from noria.records import Evaluation
from noria.schema import Schema, Tensors
from noria.workload import Workload
from training.model import link_of
from training.preprocess import Input, Preprocessing

LEVELS = 254
"""Levels that scikit-learn's histograms hold beside missing; rarer ones (higher indices) count as unknown."""
WORDS = 100
"""Words whose presence the trees may ask for: those that tell most about the target in the train part."""
NARROW, WIDE = 0.05, 0.25
"""Relative gap between validation and train error that is ordinary, and that is called overfitting."""


@dataclass(frozen=True)
class Boosted:
    """Gradient-boosted trees (Friedman 2001; histograms as in LightGBM) over preprocessed tensors."""

    model: Any
    inputs: tuple[Input, ...]
    columns: np.ndarray
    """Features that vary in the train part; scikit-learn fails on one that is all missing."""
    words: Mapping[str, np.ndarray]
    link: str

    @classmethod
    def fit(
        cls,
        workload: Workload,
        inputs: tuple[Input, ...],
        tensors: Tensors,
        labels: np.ndarray,
        *,
        rounds: int = 150,
        extra: np.ndarray | None = None,
    ) -> Boosted:
        """On preprocessed tensors and labels [n]; `extra` [n, k] are features beside them (a champion's score)."""
        link = link_of(workload)
        words = {entry.name: _telling(tensors[entry.name], labels) for entry in inputs if entry.kind == "words"}
        table, categories = _features(inputs, tensors, words, extra)
        varied = np.flatnonzero(np.ptp(np.nan_to_num(table, nan=-1e9), axis=0) > 0)
        if not len(varied):  # nothing to tell rows apart by: one constant feature gives the constant model
            table, varied = np.zeros((len(labels), 1)), np.array([0])
        columns = varied
        options: dict[str, Any] = {
            "max_iter": rounds,
            "learning_rate": 0.1,
            "early_stopping": False,
            "random_state": 0,
            "categorical_features": np.isin(columns, categories),
        }
        if link == "sigmoid":
            model: Any = HistGradientBoostingClassifier(**options)
        else:
            model = HistGradientBoostingRegressor(
                loss="squared_error" if workload.loss == "squared_error" else "absolute_error", **options
            )
        target = np.log(labels) if link == "exp" else labels
        # Half the cores: training runs beside, and OpenMP's threads spin whole seconds away when they share a core.
        with threadpool_limits(max(1, (os.cpu_count() or 2) // 2), "openmp"):
            model.fit(table[:, columns], target)
        return cls(model, inputs, columns, words, link)

    def score(self, tensors: Tensors, extra: np.ndarray | None = None) -> np.ndarray:
        """Scores [n] in the target's unit, or probabilities."""
        table = _features(self.inputs, tensors, self.words, extra)[0][:, self.columns]
        if self.link == "sigmoid":
            if len(self.model.classes_) == 1:
                return np.full(len(table), float(self.model.classes_[0]))
            return np.asarray(self.model.predict_proba(table)[:, 1])
        found = self.model.predict(table)
        return np.asarray(np.exp(found) if self.link == "exp" else found)


@dataclass(frozen=True)
class BoostedScorer:
    """Boosted trees with their preprocessing: raw rows to scores, as a `noria.workload.Scorer`."""

    boosted: Boosted
    preprocessing: Preprocessing
    schema: Schema

    def __call__(self, rows: pa.Table) -> np.ndarray:
        """Scores [n] of rows that have the schema's columns."""
        return self.boosted.score(self.preprocessing.run(self.schema.tensors(rows)))


def judge(workload: Workload, rows: pa.Table, scores: Mapping[str, np.ndarray]) -> dict[str, Evaluation]:
    """Evaluation of each subject's scores [n] on labelled rows, with the workload's slices."""
    labels, slices = rows.column(workload.schema.target).to_numpy(), dict(workload.slices(rows))
    return {
        subject: evaluate(labels, found, task=workload.task, loss=workload.loss, log=workload.log_target, slices=slices)
        for subject, found in scores.items()
    }


def diagnose(history: Sequence[Mapping[str, float]], evaluations: Mapping[str, Evaluation]) -> tuple[str, ...]:
    """What the curves and the comparison say, in sentences: over- or underfitting, still learning, better or worse."""
    if not history:
        return ("Not trained further: the weights it began with were not improved on validation.",)
    best = min(history, key=lambda entry: entry["validation_loss"])
    gap = best["validation_loss"] / max(best["train_loss"], 1e-12) - 1
    said = [f"Best validation at epoch {best['epoch'] + 1:.0f} of {len(history)}."]
    if gap > WIDE:
        said.append(
            f"Overfitting, or a time unlike the one before: the validation loss is {gap + 1:.1f} times the train loss; "
            "more rows, more masking or less width would help."
        )
    elif gap > NARROW:
        said.append(f"The validation loss is {gap:.0%} above the train loss: an ordinary gap.")
    else:
        said.append(f"No overfitting: the validation loss is within {max(gap, 0):.0%} of the train loss.")
    if len(history) > 2 and best is history[-1] and best["validation_loss"] < 0.99 * history[-2]["validation_loss"]:
        said.append("Underfitting: validation was still improving when the epochs ended; train for longer.")
    return (*said, *_compared(evaluations, gap))


def _compared(evaluations: Mapping[str, Evaluation], gap: float) -> list[str]:
    candidate = evaluations["candidate"].metrics["error"]
    said = []
    for subject in ("naive", "boosted"):
        other = evaluations[subject].metrics["error"] if subject in evaluations else 0.0
        if other:
            word = "better" if candidate < other else "worse"
            said.append(
                f"On test {abs(1 - candidate / other):.1%} {word} than the {subject} baseline "
                f"({candidate:.3f} against {other:.3f})."
            )
            if subject == "boosted" and candidate > 1.1 * other and gap <= NARROW:
                said.append("Underfitting: boosted trees find more in the same inputs.")
    return said


def curves(history: Sequence[Mapping[str, float]], unit: str) -> Figure:
    """Train, validation and test by epoch: the loss that is optimised, and the error that people read."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [entry["epoch"] + 1 for entry in history]
    best = min(range(len(history)), key=lambda index: history[index]["validation_loss"], default=None)
    for axes, measure, label in zip(
        figure.subplots(1, 2),
        ("loss", "error"),
        ("loss (optimised)", f"error ({unit})" if unit else "error"),
        strict=True,
    ):
        for part, colour in (("train", "#7f8c99"), ("validation", "#1f6fb4"), ("test", "#d9822b")):
            axes.plot(
                epochs, [entry[f"{part}_{measure}"] for entry in history], color=colour, label=part, marker=".", lw=1.6
            )
        if best is not None:
            axes.axvline(epochs[best], color="#1f6fb4", lw=0.8, ls=":", label="best on validation")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    figure.axes[0].legend(frameon=False)
    return figure


def _features(
    inputs: tuple[Input, ...], tensors: Tensors, words: Mapping[str, np.ndarray], extra: np.ndarray | None
) -> tuple[np.ndarray, list[int]]:
    """Feature table float64 [n, k], and which columns are categories."""
    parts: list[np.ndarray] = []
    categories = []
    for entry in inputs:
        values = tensors[entry.name]
        if entry.kind == "words":
            parts += [(values == word).any(1).astype(np.float64) for word in words[entry.name]]
        elif entry.kind == "number":
            parts.append(np.where(values[:, 2] > 0, np.nan, values[:, 1]))  # trees need one monotone version: the log's
        elif entry.kind == "clock":
            parts.append(np.where(values == 0, np.nan, values))
        else:
            categories.append(len(parts))
            parts.append(np.where(values == 0, np.nan, np.where(values <= LEVELS, values - 1, 0)))
    if extra is not None:
        parts += list(extra.T)
    return np.stack(parts, 1).astype(np.float64), categories


def _telling(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The word ids whose presence goes along most with the target (largest absolute covariance)."""
    rows, _ = np.nonzero(ids > 1)
    found = np.unique(np.stack([rows, ids[ids > 1]], 1), axis=0)
    if not len(found):
        return np.empty(0, np.int64)
    size = int(ids.max()) + 1
    together = np.bincount(found[:, 1], weights=(labels - labels.mean())[found[:, 0]], minlength=size)
    order = np.argsort(-np.abs(together), kind="stable")[:WORDS]
    return np.asarray(order[np.abs(together[order]) > 0])
