"""What the columns mean to a model: learnt from the train part only, and written once, as an ONNX graph.

Training makes its tensors by running this graph, and the served model begins with the very same one: there is no second
implementation that could disagree. Missing is a value of its own everywhere, and so is a level never seen in training.

    number      [n, 3] float32   standardised, standardised log, missing flag
    integer     [n]    int64     0 missing, 1 unknown or rare, 2... levels, most frequent first
    string      the same
    timestamp   three of [n] int64: hour, weekday, hour of week; 0 missing
    text        [n, words] int64 word ids; 0 behind the last word, 1 unknown or rare
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from onnx import TensorProto

from noria.errors import DataError
from noria.options import TrainingOptions
from noria.runtime import open_session, run_all
from noria.schema import MISSING_INTEGER, Column, Schema, Tensors
from training import graph

RARE = 5
"""Levels and words in fewer train rows share the index of the unknown, so that its embedding is learnt too."""
CLOCK = (("hour", 25), ("weekday", 8), ("hour_of_week", 169))
CHUNK = 2048
"""Rows preprocessed at once: bounds the memory that texts take."""


@dataclass(frozen=True)
class Input:
    """One preprocessed tensor, as the network sees it."""

    name: str
    column: str
    kind: Literal["level", "clock", "number", "words"]
    size: int
    """Indices an embedding needs (level, clock, words); features of a number."""
    width: int = 1
    """Words of a text; 1 otherwise."""


@dataclass(frozen=True)
class Preprocessing:
    """A fitted preprocessing graph and the description of its outputs, in order."""

    model: bytes
    inputs: tuple[Input, ...]

    @cached_property
    def _session(self) -> Any:
        return open_session(self.model, "cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "inputs": self.inputs}

    def run(self, raw: Tensors) -> Tensors:
        """Model tensors, by input name, of raw tensors [n]."""
        rows = len(next(iter(raw.values())))
        read = {entry.name for entry in self._session.get_inputs()}
        cuts = [{name: raw[name][start : start + CHUNK] for name in read} for start in range(0, max(rows, 1), CHUNK)]
        parts = [run_all(self._session, cut) for cut in cuts]
        return {entry.name: np.concatenate([part[entry.name] for part in parts]) for entry in self.inputs}

    def describe(self) -> str:
        """The inputs as JSON text; `read_inputs` reads them back."""
        return json.dumps([asdict(entry) for entry in self.inputs])


def read_inputs(text: str) -> tuple[Input, ...]:
    """The inputs that `Preprocessing.describe` wrote."""
    return tuple(Input(**entry) for entry in json.loads(text))


def fit(schema: Schema, train: pa.Table, options: TrainingOptions) -> Preprocessing:
    """Learn statistics and vocabularies from the train part and write the graph.

    Raises:
        DataError: there are no rows to learn from.
    """
    if not len(train):
        raise DataError("Preprocessing has no rows to learn from.")
    build, raw = graph.Builder(), schema.tensors(train)
    inputs: list[Input] = []
    for column in schema.columns:
        if column.feature:  # the others stay inputs of the graph, so that it takes whole records
            inputs += _column(build, column, raw[column.name], options)
    outputs = {entry.name: _described(entry) for entry in inputs}
    return Preprocessing(
        graph.finish(build, {column.name: column.kind for column in schema.columns}, outputs), tuple(inputs)
    )


def _column(build: graph.Builder, column: Column, values: np.ndarray, options: TrainingOptions) -> list[Input]:
    """Add one column's nodes to the graph."""
    name = column.name
    if column.kind == "number":
        plain, log = _statistics(values)
        graph.number(build, name, f"{name}.number", plain=plain, log=log)
        return [Input(f"{name}.number", name, "number", 3)]
    if column.kind == "timestamp":
        names = tuple(f"{name}.{part}" for part, _ in CLOCK)
        graph.clock(build, name, (names[0], names[1], names[2]))
        return [Input(made, name, "clock", size) for made, (_, size) in zip(names, CLOCK, strict=True)]
    if column.kind == "text":
        found = _words(name, values, options.words)
        known = _frequent(found, options.vocabulary)
        graph.words(build, name, f"{name}.words", known=known, width=options.words)
        return [Input(f"{name}.words", name, "words", len(known) + 2, options.words)]
    missing: Any = "" if column.kind == "string" else MISSING_INTEGER
    seen, counts = np.unique(values[values != missing], return_counts=True)
    known = _frequent(Counter(dict(zip(seen.tolist(), counts.tolist(), strict=True))), options.vocabulary)
    graph.levels(build, name, f"{name}.level", known=known, text=column.kind == "string")
    return [Input(f"{name}.level", name, "level", len(known) + 2)]


def _statistics(values: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean and deviation of the present values, plain and after the signed log1p."""
    present = values[np.isfinite(values)].astype(np.float64)
    if not len(present):
        return (0.0, 1.0), (0.0, 1.0)
    log = np.sign(present) * np.log1p(np.abs(present))
    both = [(float(one.mean()), float(one.std())) for one in (present, log)]
    # A column of one value (deviation 0, or what rounding left of it) keeps its unit.
    (plain_mean, plain), (log_mean, deviation) = both
    return (plain_mean, plain if plain > 1e-6 * abs(plain_mean) else 1.0), (
        log_mean,
        deviation if deviation > 1e-6 else 1.0,
    )


def _words(name: str, values: np.ndarray, width: int) -> Counter[str]:
    """In how many texts each word occurs, by the graph's own splitting."""
    build = graph.Builder()
    made = graph.tokens(build, name, width)
    described = (TensorProto.STRING, ["rows", "words"])
    session = open_session(graph.finish(build, {name: "text"}, {made: described}), "cpu")
    counts: Counter[str] = Counter()
    for start in range(0, len(values), CHUNK):
        for row in run_all(session, {name: values[start : start + CHUNK]})[made]:
            counts.update(set(row))
    counts.pop("", None)
    return counts


def _frequent(counts: Counter[Any], most: int) -> list[Any]:
    """Levels in at least `RARE` rows, most frequent first, equal ones in their order; at most `most`."""
    kept = [(-count, level) for level, count in counts.items() if count >= RARE]
    return [level for _, level in sorted(kept)[:most]]


def _described(entry: Input) -> tuple[int, list[Any]]:
    if entry.kind == "number":
        return TensorProto.FLOAT, ["rows", entry.size]
    return TensorProto.INT64, ["rows", entry.width] if entry.kind == "words" else ["rows"]
