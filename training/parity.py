"""Proof that the exported graph computes what the trained network computes, before a version may be registered.

Two comparisons over many raw rows: the preprocessing graph against an independent evaluator, and the whole graph in
ONNX Runtime against PyTorch, at several batch sizes. Rows are real ones with missing and unknown values strewn in, and
a *generated* set of edges: a sample alone once missed an export that was wrong in one row of 1,900.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from noria.errors import ParityError
from noria.runtime import open_session, score
from noria.schema import Schema, Tensors
from training.boundary import boundary, strewn
from training.model import Scored
from training.preprocess import Preprocessing
from training.reference import evaluate

ROWS = 10_000
BATCHES = (1, 2, 17, 1024)
TOLERANCE = 1e-4
"""Largest difference, relative to the score or, near zero, to the target's deviation."""
INDEPENDENT_ROWS = 256
"""Sampled rows for the independent evaluator, beside all edges; it is plain Python and slow."""


def check(
    model: bytes, scored: Scored, preprocessing: Preprocessing, schema: Schema, sample: Tensors
) -> dict[str, Any]:
    """Compare on rows made from `sample` (raw tensors [n]); the report that goes into the bundle.

    Raises:
        ParityError: a score differs by more than TOLERANCE, or is not finite; the sentence tells the row.
    """
    edges = boundary(schema, sample)
    many = strewn(schema, sample, ROWS)
    raw = {name: np.concatenate([many[name], edges[name]]) for name in schema.names}
    expected = _torch_scores(scored, preprocessing, raw)
    session, worst = open_session(model, "cpu"), 0.0
    # Near zero the relative difference says nothing: there the unit of the target is the measure.
    unit = 1.0 if scored.link == "sigmoid" else abs(scored.scale) if scored.link == "identity" else 0.0
    for batch in BATCHES:
        found = score(session, raw, batch)
        if found.shape != expected.shape:
            raise ParityError(
                f"The exported graph gives scores of shape {found.shape}; one a row is needed: {expected.shape}."
            )
        off = np.abs(found - expected) / np.maximum(np.abs(expected), max(unit, 1e-30))
        wrong = ~(off <= TOLERANCE)
        if wrong.any():
            row = int(np.argmax(wrong))
            record = {name: values[row] for name, values in raw.items()}
            raise ParityError(
                f"The exported graph gives {found[row]:g} instead of {expected[row]:g} in batches of {batch} for "
                f"{record}, and {wrong.sum()} of {len(off)} rows are off by more than {TOLERANCE:g}; it must not be "
                f"registered. Simplify the network, or report the wrong operator."
            )
        worst = max(worst, float(off.max()))
    few = {name: np.concatenate([many[name][:INDEPENDENT_ROWS], edges[name]]) for name in schema.names}
    check_preprocessing(preprocessing, few)
    return {
        "rows": len(expected),
        "boundary_rows": len(next(iter(edges.values()))),
        "batches": list(BATCHES),
        "tolerance": TOLERANCE,
        "largest_difference": worst,
        "independent_rows": len(next(iter(few.values()))),
        "model_bytes": len(model),
    }


def _torch_scores(scored: Scored, preprocessing: Preprocessing, raw: Tensors) -> np.ndarray:
    made = preprocessing.run(raw)
    scored.eval()
    with torch.no_grad():
        expected = scored(*[torch.from_numpy(made[entry.name]) for entry in preprocessing.inputs]).numpy()
    if not np.isfinite(expected).all():
        row = int(np.argmin(np.isfinite(expected)))
        raise ParityError(
            f"The network's score is not finite for { ({name: values[row] for name, values in raw.items()}) }."
        )
    return np.asarray(expected)


def check_preprocessing(preprocessing: Preprocessing, raw: Tensors) -> None:
    """The preprocessing graph in ONNX Runtime against ONNX's reference implementation.

    Raises:
        ParityError: names the tensor that differs.
    """
    made = preprocessing.run(raw)
    names = [entry.name for entry in preprocessing.inputs]
    for name, expected in zip(names, evaluate(preprocessing.model, names, raw), strict=True):
        if made[name].shape != expected.shape or not np.allclose(made[name], expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise ParityError(
                f"Preprocessing of '{name}' differs between ONNX Runtime and the ONNX reference implementation."
            )


def summary(report: Mapping[str, Any]) -> str:
    """One sentence for people."""
    return (
        f"{report['rows']:,} rows ({report['boundary_rows']} generated edges) in batches of {report['batches']}: "
        f"largest relative difference {report['largest_difference']:.1e}, tolerance {report['tolerance']:g}."
    )
