"""What a version consists of: one folder with the model and everything needed to serve, judge and explain it.

    model.onnx                 the graph from raw columns to `score`      MLmodel, ...   what MLflow adds
    noria/workload.json        name, task, loss, unit, notes              schema.json    decision.json
    noria/proof.json           reference rows and the scores that they must get
    noria/reference.parquet    rows that it was trained on: raw columns, event time, target, score, split
    noria/thresholds.json      drift calibration                          evaluations.json    parity.json
    noria/dataset.json         which rows of the lake                     environment.json
    noria/manifest.json        SHA-256 of every other file, written last

Not here: MLflow (`registry.store`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from noria.decision import Bands
from noria.errors import BundleError, NoriaError
from noria.metrics import Loss
from noria.records import DatasetRef, Evaluation
from noria.schema import Schema
from noria.workload import Workload
from registry.environment import environment
from registry.graph import check_graph
from registry.manifest import seal, verify
from registry.proof import Proof

MODEL = "model.onnx"
PARTS = "noria"
REFERENCE_ROWS = 100_000


@dataclass(frozen=True)
class Facts:
    """What is known about a workload without its code."""

    name: str
    task: Literal["regression", "binary"]
    loss: Loss
    log_target: bool = False
    unit: str = ""
    notes: str = ""

    @property
    def error_unit(self) -> str:
        """Unit of the error: the score's for an absolute error, none otherwise."""
        return self.unit if self.loss == "absolute_error" else ""

    @classmethod
    def of(cls, workload: Workload) -> Facts:
        """The facts of a workload."""
        return cls(workload.name, workload.task, workload.loss, workload.log_target, workload.unit, workload.notes)


@dataclass(frozen=True)
class Contents:
    """All that a bundle is written from. Build the proof with `Proof.make(model, schema, table)`."""

    model: bytes
    """The ONNX graph."""
    facts: Facts
    schema: Schema
    bands: Bands
    proof: Proof
    reference: pa.Table
    """Raw columns, event time, target, `score`, `split` (train, validation or test); thinned to REFERENCE_ROWS."""
    dataset: DatasetRef
    evaluations: Mapping[str, Evaluation]
    """On the test split, by subject: candidate, boosted, naive."""
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=environment)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    facts: Facts
    schema: Schema
    bands: Bands
    proof: Proof
    dataset: DatasetRef
    evaluations: Mapping[str, Evaluation]
    thresholds: Mapping[str, Any]
    parity: Mapping[str, Any]
    environment: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, check: bool = True) -> Bundle:
        """Read the bundle in `folder`; with `check`, its manifest and its graph first.

        Raises:
            BundleError: not whole, changed, unsafe to run, or not readable.
        """
        if check:
            verify(folder)
        try:
            bundle = _read(folder)
        except (OSError, ValueError, KeyError, TypeError, NoriaError) as error:
            raise BundleError(f"The bundle in {folder} cannot be read ({error}). Fetch the version again.") from None
        if check:
            check_graph(bundle.model.read_bytes(), bundle.schema)
        return bundle

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL

    def reference(self) -> pa.Table:
        """The rows that the version was trained on, with its scores."""
        return pq.read_table(self.folder / PARTS / "reference.parquet")


def write(folder: Path, contents: Contents) -> None:
    """Write a bundle into `folder` (made if absent; what lies in it becomes part of the bundle), manifest last.

    Raises:
        BundleError: the graph is unsafe or does not fit the schema, or the reference lacks a column.
    """
    check_graph(contents.model, contents.schema)
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(contents.model)
    pq.write_table(_reference(contents), parts / "reference.parquet", compression="zstd")
    texts: dict[str, Any] = {
        "workload": asdict(contents.facts),
        "schema": contents.schema.to_json(),
        "decision": contents.bands.to_json(),
        "proof": {"records": contents.proof.records, "scores": contents.proof.scores},
        "thresholds": contents.thresholds,
        "evaluations": {subject: _finite(found) for subject, found in contents.evaluations.items()},
        "parity": contents.parity,
        "dataset": contents.dataset.to_json(),
        "environment": contents.environment,
    }
    for name, data in texts.items():
        options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
        (parts / f"{name}.json").write_bytes(orjson.dumps(data, option=options))
    seal(folder)


def _read(folder: Path) -> Bundle:
    def part(name: str) -> Any:
        return orjson.loads((folder / PARTS / f"{name}.json").read_bytes())

    proof = part("proof")
    return Bundle(
        folder=folder,
        facts=Facts(**part("workload")),
        schema=Schema.from_json(part("schema")),
        bands=Bands.from_json(part("decision")),
        proof=Proof(tuple(proof["records"]), tuple(proof["scores"])),
        dataset=DatasetRef.from_json(part("dataset")),
        evaluations={subject: Evaluation.from_json(data) for subject, data in part("evaluations").items()},
        thresholds=part("thresholds"),
        parity=part("parity"),
        environment=part("environment"),
    )


def _reference(contents: Contents) -> pa.Table:
    schema, rows = contents.schema, contents.reference
    wanted = dict.fromkeys([*schema.names, schema.event_time, schema.target, "score", "split"])
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise BundleError(f"The reference lacks {', '.join(missing)}: it needs every raw column, score and split.")
    if len(rows) > REFERENCE_ROWS:
        rows = rows.take(np.linspace(0, len(rows) - 1, REFERENCE_ROWS).astype(np.int64))
    return rows.select(list(wanted))


def _finite(evaluation: Evaluation) -> dict[str, Any]:
    """As JSON, which has no NaN: a metric that has no value (the AUC of one class) is left out."""
    data = evaluation.to_json()
    known = {name: value for name, value in data["metrics"].items() if math.isfinite(value)}
    slices = {
        name: {metric: value for metric, value in metrics.items() if math.isfinite(value)}
        for name, metrics in data["slices"].items()
    }
    return {**data, "metrics": known, "slices": slices}
