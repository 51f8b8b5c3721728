"""A challenger's answers to rows that the champion has answered: which rows, in which batches, and what became of them.

Rows are scored in the batches that the champion had (rows of one batch share their latency in the log), so that the
latencies of both mean the same. Not here: files and processes (`serving.shadow`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.column import ARROW
from noria.errors import SchemaError
from noria.runtime import SCORE
from noria.schema import Schema, Tensors
from serving.model import Model


@dataclass
class Answers:
    """What a challenger answered to the rows of a segment, and what it could not answer."""

    parts: list[dict[str, list[Any]]] = field(default_factory=list)
    agreed: int = 0
    difference: float = 0.0
    errors: int = 0
    error: str = ""
    seconds: list[float] = field(default_factory=list)
    """How long each run took."""

    def __len__(self) -> int:
        return sum(len(part["id"]) for part in self.parts)

    def line(self, version: int) -> dict[str, Any]:
        """As a line of the log."""
        joined = {name: [value for part in self.parts for value in part[name]] for name in self.parts[0]}
        # Single precision as the champion's log has it: equal scores stay equal.
        return {"shadow": version, **joined, "s": np.array(joined["s"], np.float32)}

    def refuse(self, rows: int, sentence: str) -> None:
        """Count rows without an answer."""
        self.errors += rows
        self.error = sentence[:400]


def chosen(rows: pa.Table, share: float, version: int) -> pa.Table:
    """The share of rows that is shadowed: always the same ones, a smaller share within a larger one. Rows that the
    challenger answered itself, as the champion of another moment, are left out."""
    rows = rows.filter(pc.not_equal(rows.column("version"), version))
    if share >= 1:
        return rows
    limit = int(share * 2**32)
    return rows.filter(pa.array([_hash(name) < limit for name in rows.column("prediction_id").to_pylist()], pa.bool_()))


def score(model: Model, rows: pa.Table, answers: Answers) -> Iterator[None]:
    """Score `rows` and add to `answers`; yields after every run, where the caller may stop."""
    if not len(rows) or model.bundle is None:
        return
    schema = model.bundle.schema
    rows = yield from _castable(schema, rows, answers)
    if not len(rows):
        return
    tensors = _tensors(schema, rows)
    log = {name: rows.column(name).to_numpy() for name in ("version", "score")}
    log["action"] = np.array(rows.column("action").to_pylist(), object)
    log["id"] = np.array(rows.column("prediction_id").to_pylist(), object)
    log["t"] = rows.column("event_time").cast(pa.int64()).to_numpy()
    for first, last in _batches(rows, model.most_rows):
        batch = {name: values[first:last] for name, values in tensors.items()}
        valid = np.zeros(last - first, bool)
        _accept(schema, batch, valid, 0, answers)
        if valid.any():
            here = {name: values[first:last][valid] for name, values in log.items()}
            _run(model, {name: values[valid] for name, values in batch.items()}, here, answers)
        yield


def _run(model: Model, tensors: Tensors, log: dict[str, np.ndarray], answers: Answers) -> None:
    """One batch of rows that the challenger's schema accepts."""
    began = time.perf_counter()
    try:
        scores = np.asarray(model.run(tensors)[SCORE], np.float64)
    except Exception as error:  # ONNX Runtime's own types; any of them means that these rows have no answer
        answers.refuse(len(log["id"]), " ".join(str(error).split()))
        return
    answers.seconds.append(time.perf_counter() - began)
    finite = np.isfinite(scores)
    if not finite.all():
        answers.refuse(int((~finite).sum()), "It has no finite score for some rows.")
        log, scores = {name: values[finite] for name, values in log.items()}, scores[finite]
    assert model.bundle is not None
    actions = model.bundle.bands.actions(scores)
    elapsed = round((time.perf_counter() - began) * 1000, 3)
    answers.agreed += sum(own == other for own, other in zip(actions, log["action"], strict=True))
    answers.difference += float(np.abs(scores - log["score"]).sum())
    answers.parts.append(
        {
            "id": log["id"].tolist(),
            "t": log["t"].tolist(),
            "champion": log["version"].tolist(),
            "s": scores.tolist(),
            "a": actions,
            "ms": [elapsed] * len(scores),
        }
    )


def _tensors(schema: Schema, rows: pa.Table) -> Tensors:
    """The challenger's inputs; a column that the champion does not have is missing in every row, as it would be in
    these requests. Raises SchemaError where the challenger requires it."""
    for column in schema.columns:
        if column.name not in rows.column_names:
            if column.required:
                sentence = f"The requests have no '{column.name}', which the challenger requires."
                raise SchemaError(sentence, column.name)
            rows = rows.append_column(column.name, pa.nulls(len(rows), ARROW[column.kind]))
    return schema.tensors(rows)


def _castable(schema: Schema, rows: pa.Table, answers: Answers) -> Generator[None, None, pa.Table]:
    """The rows whose values can be of the challenger's types. A refusal tells of no row, so halves are tried; yields
    after every try."""
    try:
        _tensors(schema, rows)
        return rows
    except pa.ArrowInvalid as error:
        if len(rows) > 1:
            half = len(rows) // 2
            yield
            first = yield from _castable(schema, rows.slice(0, half), answers)
            yield
            second = yield from _castable(schema, rows.slice(half), answers)
            return pa.concat_tables([first, second])
        answers.refuse(1, f"A value is not of its column's type in the challenger: {error}")
    except (SchemaError, pa.ArrowException) as error:
        answers.refuse(len(rows), str(error))
    return rows.slice(0, 0)


def _accept(schema: Schema, tensors: Tensors, valid: np.ndarray, first: int, answers: Answers) -> None:
    """Mark the rows that the challenger's schema accepts. A refusal names one row only, so halves are tried."""
    rows = len(next(iter(tensors.values())))
    try:
        schema.check(tensors)
        valid[first : first + rows] = True
    except SchemaError as error:
        if rows == 1:
            answers.refuse(1, str(error))
            return
        for part in (slice(0, rows // 2), slice(rows // 2, rows)):
            _accept(
                schema, {name: values[part] for name, values in tensors.items()}, valid, first + part.start, answers
            )


def _batches(rows: pa.Table, most: int) -> Iterator[tuple[int, int]]:
    """First and last of each run of rows with the same version and latency: what the champion ran together."""
    version, latency = (rows.column(name).to_numpy() for name in ("version", "latency_ms"))
    edges = np.flatnonzero((np.diff(version) != 0) | (np.diff(latency) != 0)) + 1
    for first, last in zip([0, *edges], [*edges, len(rows)], strict=True):
        for start in range(first, last, most):
            yield start, min(start + most, last)


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big")
