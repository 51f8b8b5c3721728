"""The one class that a user subclasses: what is predicted from what, where records come from, and what is normal.

    class Trips(Workload):
        name = "trips"
        schema = Schema((Column("distance", "number"), ...), event_time="pickup", target="minutes")
        task = "regression"

        def records(self, window): ...

    WORKLOAD = Trips()

Everything else has a default. A workload is loaded by import string ("module:NAME"), must pickle, and holds no state.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.decision import Bands
from noria.errors import NoriaError, WorkloadError
from noria.metrics import Loss
from noria.options import DriftOptions, GateOptions, PolicyOptions, Schedules, TrainingOptions
from noria.records import Window
from noria.schema import Schema


@dataclass(frozen=True)
class Rule:
    """A cleaning rule. Rows that it does not keep go to quarantine, counted under its name."""

    name: str
    columns: tuple[str, ...]
    """Columns it reads; where the data lacks one (online records have no fare), the rule does not apply."""
    keep: Callable[[pa.Table], Any]
    """Table of n rows to a boolean Arrow array [n]; null counts as kept. A module-level function, to pickle."""


Scorer = Callable[[pa.Table], np.ndarray]


class Workload:
    """Subclass, set `name`, `schema` and `task`, implement `records`; override the rest where you know better."""

    name: ClassVar[str]
    schema: ClassVar[Schema]
    task: ClassVar[Literal["regression", "binary"]]

    log_target: ClassVar[bool] = False
    """Fit log(target): for positive targets whose errors are relative. Scores stay in the target's unit."""
    unit: ClassVar[str] = ""
    """Unit of the score, for people."""
    notes: ClassVar[str] = ""
    """What someone who reads a score must know; shown on the model's page and in reports."""
    bands: ClassVar[Bands] = Bands()
    rules: ClassVar[tuple[Rule, ...]] = ()
    network: ClassVar[str] = "training.model:TabularNet"
    """Import string of the torch module class, called with the preprocessed inputs' descriptions and the options."""
    training: ClassVar[TrainingOptions] = TrainingOptions()
    gate: ClassVar[GateOptions] = GateOptions()
    drift: ClassVar[DriftOptions] = DriftOptions()
    policy: ClassVar[PolicyOptions] = PolicyOptions()
    schedules: ClassVar[Schedules] = Schedules()
    until: ClassVar[datetime | None] = None
    """For a recorded stream: the time at which it ends, which is 'now' where nobody says otherwise."""

    def prepare(self, progress: Callable[[str], None]) -> None:
        """Fetch what `records` reads, where that takes long; `progress` gets sentences. Done already: returns at once.

        Raises:
            DataError: the source cannot be fetched; the sentence says what to do.
        """

    def records(self, window: Window) -> pa.Table:
        """Raw rows of the window (by event time): the schema's columns, the target where known, and what rules read.

        Raises:
            DataError: the source cannot be reached; the sentence says what to do.
        """
        raise NotImplementedError

    def slices(self, table: pa.Table) -> Mapping[str, np.ndarray]:
        """Named groups of rows (boolean masks [n]) that a candidate must not break. Called on the schema's columns."""
        return {}

    def naive(self, table: pa.Table) -> Scorer:
        """A baseline that a model must beat, fitted on a labelled table: the median target, or the class prior."""
        values = table.column(self.schema.target)
        constant = pc.mean(values) if self.task == "binary" else pc.quantile(values, 0.5)[0]
        level = float(constant.as_py())
        return lambda rows: np.full(len(rows), level)

    @property
    def loss(self) -> Loss:
        """The row loss whose mean is 'the error' that gate, policy and reports judge."""
        return "log_loss" if self.task == "binary" else "absolute_error"

    def clean(self, table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Rows that every applicable rule keeps, and how many each rule sent to quarantine (first rule wins)."""
        rejected: dict[str, int] = {}
        for rule in self.rules:
            if set(rule.columns) <= set(table.column_names):
                kept = table.filter(pc.fill_null(rule.keep(table), True))
                rejected[rule.name] = len(table) - len(kept)
                table = kept
        return table, rejected


def load_object(path: str) -> Any:
    """What an import string "module:NAME" names; the current folder is searched too.

    Raises:
        WorkloadError: malformed, no such module or name, or the module fails to import.
    """
    if not re.fullmatch(r"[\w.]+:\w+", path):
        raise WorkloadError(
            f"'{path}' is not an import string; write module:NAME, for example workloads.taxi:WORKLOAD."
        )
    module_name, _, name = path.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except NoriaError as error:
        raise WorkloadError(f"Cannot import '{module_name}' of '{path}': {error}") from error
    except Exception as error:  # the module's own code may raise anything
        raise WorkloadError(f"Cannot import '{module_name}' of '{path}': {type(error).__name__}: {error}.") from error
    if not hasattr(module, name):
        raise WorkloadError(f"Module '{module_name}' has no '{name}'; an import string is module:NAME.")
    return getattr(module, name)


def load(path: str) -> Workload:
    """The workload that an import string names. Raises WorkloadError when it is not a usable one."""
    workload = load_object(path)
    if not isinstance(workload, Workload):
        raise WorkloadError(f"'{path}' is {type(workload).__name__}, not an instance of a Workload subclass.")
    for attribute in ("name", "schema", "task"):
        if not hasattr(workload, attribute):
            raise WorkloadError(
                f"'{path}' does not set `{attribute}`; every workload states its name, schema and task."
            )
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", workload.name):
        raise WorkloadError(
            f"'{workload.name}' is not a usable name: lower-case letters, digits and _, a letter first."
        )
    return workload
