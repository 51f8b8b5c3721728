"""Is this workload sound? Small checks in stages, each failure a sentence, before anything long runs.

    for finding in check("workloads.taxi:WORKLOAD", now=now): ...

A stage runs only when the ones before it found nothing: a workload that does not load has no data to look at. The last
stage needs a tiny training run, which this room may not know: the caller passes it (`training.trial`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import pyarrow as pa

from noria import contract
from noria.contract import Evidence, Trial
from noria.errors import NoriaError
from noria.records import Window
from noria.workload import Workload, load

__all__ = ["Finding", "Trial", "TrialFit", "check"]

Result = TypeVar("Result")
TrialFit = Callable[[Workload, pa.Table, int], Trial]
"""Workload, clean labelled rows in order of time, seed: to a tiny fit."""

STATED = (
    contract.task_is_known,
    contract.records_are_given,
    contract.names_are_usable,
    contract.target_is_no_feature,
    contract.examples_are_valid,
    contract.schema_survives_json,
    contract.workload_pickles,
)
RAW = (contract.event_times_are_inside, contract.windows_are_half_open, contract.rules_are_sound)
CLEAN = (
    contract.rules_leave_rows,
    contract.data_matches_schema,
    contract.labels_fit_task,
    contract.target_does_not_leak,
    contract.slices_are_masks,
    contract.naive_answers,
)
TRAINED = (contract.training_repeats, contract.scores_are_usable, contract.rows_do_not_mix)
SEED = 1
ROWS = 600
"""Rows of the trial fit."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a workload."""

    check: str
    """Which check found it, for example 'workload pickles'."""
    message: str
    """What is wrong and what to do."""

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def check(
    subject: str | Workload,
    trial: TrialFit | None = None,
    *,
    now: datetime,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """What is wrong with a workload (or with the one that an import string names); empty: nothing found.

    Data is read over the longest training window that ends at the workload's `until`, or `now`. `progress` gets the
    name of each check before it runs.
    """
    run = _Run(progress or (lambda name: None))
    loaded = run.step("workload loads", lambda: load(subject) if isinstance(subject, str) else subject)
    if loaded is None:
        return run.findings
    run.all(STATED, loaded)
    end = loaded.until or now
    evidence = run.step("data is read", lambda: _read(loaded, Window.last(max(loaded.training.windows), end)))
    if evidence is None:
        return run.findings
    run.all(RAW, evidence)
    run.all(CLEAN, evidence)
    if run.findings or trial is None:
        return run.findings
    sample = evidence.sample(ROWS, SEED)
    fits = run.step("a tiny model trains and exports", lambda: [trial(loaded, sample.clean, SEED) for _ in range(2)])
    run.all(TRAINED, sample, *(fits or ()))
    return run.findings


def _read(workload: Workload, window: Window) -> Evidence:
    """Raises NoriaError where the source cannot be read, gives no rows, or disagrees with the schema."""
    rows = workload.records(window)
    if not isinstance(rows, pa.Table):
        raise NoriaError(f"`records` must return a pyarrow Table; it returned {type(rows).__name__}.")
    if not len(rows):
        raise NoriaError(f"`records` gives no rows for {window}; is `until` right, or the source empty?")
    raw = workload.schema.conform(rows)
    target = workload.schema.target
    if target not in raw.column_names:
        raise NoriaError(f"Schema and data disagree: the data has no column '{target}', the target.")
    return Evidence(workload, window, raw)


class _Run:
    """Runs checks stage by stage and collects findings; what a check raises becomes one."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.findings: list[Finding] = []
        self.progress = progress

    def step(self, name: str, work: Callable[[], Result]) -> Result | None:
        """What `work` returns; None, and a finding, where it raises; None where earlier stages found something."""
        return None if self.findings else self._step(name, work)

    def _step(self, name: str, work: Callable[[], Result]) -> Result | None:
        self.progress(name)
        try:
            return work()
        except NoriaError as error:
            self.findings.append(Finding(name, str(error)))
        except Exception as error:  # the workload's own code may raise anything, and that is a finding
            self.findings.append(Finding(name, f"{type(error).__name__}: {error}"))
        return None

    def all(self, checks: Iterable[Callable[..., contract.Sentences]], *arguments: object) -> None:
        """A stage: every one of its checks, unless an earlier stage found something."""
        if self.findings:
            return
        for one in checks:
            name = one.__name__.replace("_", " ")
            for sentence in self._step(name, lambda one=one: list(one(*arguments))) or ():  # type: ignore[misc]
                self.findings.append(Finding(name, sentence))
