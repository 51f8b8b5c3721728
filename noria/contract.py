"""The small checks behind `noria check`: each asks one question about a workload and yields sentences where it fails.

In the spirit of scikit-learn's and river's `check_estimator`. Order, stages and reporting are in `noria.check`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.errors import SchemaError
from noria.records import Window
from noria.runtime import open_session, score
from noria.schema import MISSING, NUMPY, Schema
from noria.workload import Workload

Sentences = Iterator[str]
RESERVED = ("prediction_id", "event_time", "version", "score", "label", "action", "latency_ms", "arrived", "split")
"""Columns that the lake and the bundle write beside the raw ones."""
TOLERANCE = 1e-4
"""Relative difference of two scores that should be equal: float32 sums in another order."""
ALIKE = 0.99999
"""Correlation with the target above which a column is taken for a copy of it."""


@dataclass(frozen=True)
class Evidence:
    """Real rows of a workload that the data checks look at."""

    workload: Workload
    window: Window
    raw: pa.Table
    """As `records` gave them, conforming to the schema."""

    @cached_property
    def clean(self) -> pa.Table:
        """What the rules kept, labelled, in order of time."""
        kept, _ = self.workload.clean(self.raw)
        labelled = kept.filter(pc.is_finite(kept.column(self.workload.schema.target)))
        return labelled.sort_by(self.workload.schema.event_time)

    def sample(self, rows: int, seed: int) -> Evidence:
        """The same with at most that many clean rows, drawn at random."""
        chosen = np.random.default_rng(seed).choice(len(self.clean), min(rows, len(self.clean)), replace=False)
        return Evidence(self.workload, self.window, self.clean.take(np.sort(chosen)))

    @property
    def columns(self) -> pa.Table:
        """Clean rows with the schema's columns only: what serving sees."""
        return self.clean.select(list(self.workload.schema.names))


@dataclass(frozen=True)
class Trial:
    """A tiny fit: what the trial callable returns."""

    model: bytes
    """ONNX, from raw columns to `score`."""
    loss: float
    """Of the last epoch."""


def task_is_known(workload: Workload) -> Sentences:
    """Task, log target and bands fit each other."""
    if workload.task not in ("regression", "binary"):
        yield f"`task` is {workload.task!r}; it must be 'regression' or 'binary'."
    if workload.task == "binary" and workload.log_target:
        yield "`log_target` is for regression: a binary target has no logarithm. Remove it."
    outside = [band.action for band in workload.bands.bands if not 0 <= band.above < 1]
    if workload.task == "binary" and outside:
        yield f"The bands {', '.join(outside)} have limits outside [0, 1), but a binary task's score is a probability."
    if workload.until is not None and workload.until.tzinfo is None:
        yield "`until` has no zone; write datetime(2021, 1, 1, tzinfo=UTC)."


def records_are_given(workload: Workload) -> Sentences:
    """The one method that has no default."""
    if type(workload).records is Workload.records:
        yield "`records(window)` is not implemented; it returns the raw rows of a window as a pyarrow Table."


def names_are_usable(workload: Workload) -> Sentences:
    """Column names neither collide with noria's own nor break a table format."""
    schema = workload.schema
    for name in dict.fromkeys([*schema.names, schema.target, schema.event_time]):
        if name in RESERVED and (name != "event_time" or name in schema.names):
            yield f"'{name}' is a column that noria writes itself; rename yours."
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
            yield f"'{name}' is not a usable column name; use letters, digits and _, a letter first."
    if not any(column.feature for column in schema.columns):
        yield "No column of the schema is a feature; a model needs at least one to read."


def target_is_no_feature(workload: Workload) -> Sentences:
    """What is predicted must not be among what it is predicted from."""
    if workload.schema.target in workload.schema.names:
        yield f"The target '{workload.schema.target}' is among the columns; remove it."


def examples_are_valid(workload: Workload) -> Sentences:
    """The record in the server's documentation page is one that the server takes."""
    schema = workload.schema
    try:
        schema.parse([schema.example()])
    except SchemaError as error:
        yield f"The example record is not valid: {error} Correct the column's `example`."
    empty = [column.name for column in schema.columns if column.example is None]
    if empty:
        yield f"Columns without an `example`: {', '.join(empty)}. One valid value each makes the server's page usable."


def schema_survives_json(workload: Workload) -> Sentences:
    """Bundles carry schema and bands as JSON."""
    if Schema.from_json(workload.schema.to_json()) != workload.schema:
        yield "The schema changes on its way through JSON; use plain strings and numbers in its columns."


def workload_pickles(workload: Workload) -> Sentences:
    """Workers and processes get workloads, rules and options by pickle."""
    for what, thing in (("The workload", workload), ("`rules`", workload.rules), ("`training`", workload.training)):
        try:
            pickle.loads(pickle.dumps(thing))
        except Exception as error:  # pickling runs code of the workload, which may raise anything
            yield f"{what} does not pickle ({error}); use module-level classes and functions, no lambdas or open files."


def event_times_are_inside(evidence: Evidence) -> Sentences:
    """`records(window)` returns rows of that window."""
    times = evidence.raw.column(evidence.workload.schema.event_time)
    outside = pc.or_(pc.less(times, evidence.window.start), pc.greater_equal(times, evidence.window.end))
    count = int(pc.sum(outside).as_py() or 0) + times.null_count
    if count:
        yield f"{count} of {len(times)} rows have an event time outside {evidence.window} or none; filter in `records`."


def windows_are_half_open(evidence: Evidence) -> Sentences:
    """Two neighbouring windows hold each row once, and asking again gives the same rows."""
    window, workload = evidence.window, evidence.workload
    middle = window.start + (window.end - window.start) / 2
    halves = [len(workload.records(Window(*ends))) for ends in ((window.start, middle), (middle, window.end))]
    if sum(halves) != len(evidence.raw):
        yield (
            f"{window} has {len(evidence.raw)} rows, its two halves have {halves[0]} + {halves[1]}; `records` must "
            "return the same rows each time, from the window's start (included) to its end (not included)."
        )


def rules_are_sound(evidence: Evidence) -> Sentences:
    """Each rule returns one boolean a row and finds the columns that it reads."""
    for rule in evidence.workload.rules:
        if not set(rule.columns) <= set(evidence.raw.column_names):
            yield f"Rule '{rule.name}' never applies: `records` lacks some of {', '.join(rule.columns)}."
            continue
        kept = rule.keep(evidence.raw)
        if len(kept) != len(evidence.raw) or not pa.types.is_boolean(kept.type):
            yield f"Rule '{rule.name}' must return one boolean a row; it returned {len(kept)} of {kept.type}."


def rules_leave_rows(evidence: Evidence) -> Sentences:
    """Together the rules leave something to learn from."""
    if not len(evidence.clean):
        yield f"The rules reject all {len(evidence.raw)} rows, or none has a label."


def data_matches_schema(evidence: Evidence) -> Sentences:
    """Clean rows are ones that the server would take, and every column has values."""
    schema, rows = evidence.workload.schema, evidence.clean
    for sentence, count in schema.violations(rows).items():
        yield f"Schema and data disagree: {count} of {len(rows)} clean rows break '{sentence}'; widen it or add a rule."
    for name in schema.names:
        if len(rows) and rows.column(name).null_count == len(rows):
            yield f"Column '{name}' is missing in all {len(rows)} rows; remove it or correct `records`."


def labels_fit_task(evidence: Evidence) -> Sentences:
    """Labels that the task can learn from, and enough of them."""
    workload, labels = evidence.workload, evidence.clean.column(evidence.workload.schema.target).to_numpy()
    if workload.task == "binary" and not np.isin(labels, (0.0, 1.0)).all():
        yield f"The task is binary, but '{workload.schema.target}' holds values other than 0 and 1."
    if len(np.unique(labels)) < 2:
        yield f"'{workload.schema.target}' has the same value in every row; there is nothing to learn."
    if workload.log_target and (labels <= 0).any():
        yield f"`log_target` needs positive targets; {int((labels <= 0).sum())} are not. Add a rule or set it to False."
    if len(labels) < workload.training.minimum_rows:
        yield (
            f"{evidence.window} has {len(labels)} clean labelled rows, training needs "
            f"{workload.training.minimum_rows}; lengthen `training.windows` or lower `training.minimum_rows`."
        )


def target_does_not_leak(evidence: Evidence) -> Sentences:
    """No feature is a copy of the target under another name."""
    target = evidence.clean.column(evidence.workload.schema.target).to_numpy()
    for column in evidence.workload.schema.columns:
        if not column.feature or column.kind not in ("number", "integer"):
            continue
        values = evidence.clean.column(column.name)
        known = pc.is_valid(values).to_numpy()
        found = pc.drop_null(values).to_numpy().astype(np.float64)
        if len(found) > 2 and np.ptp(found) > 0 and np.ptp(target[known]) > 0:
            likeness = abs(float(np.corrcoef(found, target[known])[0, 1]))
            if likeness > ALIKE:
                yield f"Column '{column.name}' follows the target exactly (correlation {likeness:.6f}): remove it."


def slices_are_masks(evidence: Evidence) -> Sentences:
    """Each slice is one boolean a row, computed from the schema's columns alone."""
    for name, mask in evidence.workload.slices(evidence.columns).items():
        if getattr(mask, "shape", None) != (len(evidence.clean),) or mask.dtype != bool:
            yield f"Slice '{name}' must be a boolean NumPy array with one entry a row ({len(evidence.clean)})."


def naive_answers(evidence: Evidence) -> Sentences:
    """The baseline gives one finite score a row, from the schema's columns alone."""
    scores = evidence.workload.naive(evidence.clean)(evidence.columns)
    if getattr(scores, "shape", None) != (len(evidence.clean),):
        yield f"`naive` must return a scorer that gives one score a row ({len(evidence.clean)})."
    elif not np.isfinite(scores).all():
        yield f"The naive baseline gives {int((~np.isfinite(scores)).sum())} scores that are not finite."


def training_repeats(evidence: Evidence, first: Trial, second: Trial) -> Sentences:
    """The same rows and the same seed give the same model."""
    same = np.array_equal(_scores(evidence, first.model), _scores(evidence, second.model), equal_nan=True)
    if first.loss != second.loss or not same:
        yield (
            f"Two trainings with one seed differ (losses {first.loss:.9g} and {second.loss:.9g}); take randomness from "
            "torch's generator, which is seeded, and nowhere else."
        )


def scores_are_usable(evidence: Evidence, first: Trial, second: Trial) -> Sentences:
    """Finite everywhere, also where every value is missing; a probability where one is promised."""
    schema = evidence.workload.schema
    nothing = {column.name: np.array([MISSING[column.kind]], NUMPY[column.kind]) for column in schema.columns}
    for what, scores in (
        ("rows of the data", _scores(evidence, first.model)),
        ("a row whose values are all missing", score(open_session(first.model, "cpu"), nothing)),
    ):
        if not np.isfinite(scores).all():
            yield f"The exported model gives scores that are not finite, for {what}."
        elif evidence.workload.task == "binary" and not ((scores >= 0) & (scores <= 1)).all():
            yield f"The exported model gives scores outside [0, 1], for {what}; they must be probabilities."


def rows_do_not_mix(evidence: Evidence, first: Trial, second: Trial) -> Sentences:
    """A row's score depends on nothing but the row: alone or in a batch it is the same."""
    together = _scores(evidence, first.model)
    session = open_session(first.model, "cpu")
    tensors = evidence.workload.schema.tensors(evidence.columns)
    chosen = np.linspace(0, len(together) - 1, min(16, len(together))).astype(int)
    alone = np.concatenate([score(session, {name: value[[row]] for name, value in tensors.items()}) for row in chosen])
    worst = float(np.max(np.abs(alone - together[chosen]) / np.maximum(np.abs(together[chosen]), 1e-3)))
    if not worst <= TOLERANCE:
        yield (
            f"A batch of 1 gives another score than the same row in a batch of {len(together)} (up to {worst:.2g} "
            "relative); the network mixes rows, for example by statistics over the batch."
        )


def _scores(evidence: Evidence, model: bytes) -> np.ndarray:
    return score(open_session(model, "cpu"), evidence.workload.schema.tensors(evidence.columns))
