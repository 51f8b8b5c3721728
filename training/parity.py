"""Proof that the exported graph computes what the trained network computes, before a version may be registered.

Two comparisons over many raw rows: the preprocessing graph against an independent evaluator, and the whole graph in
ONNX Runtime against PyTorch, at several batch sizes. Rows are real ones with missing and unknown values strewn in, and a
*generated* set of edges: a sample alone once missed an export that was wrong in one row of 1,900.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from noria.errors import ParityError
from noria.runtime import open_session, score
from noria.schema import Schema, Tensors
from training.boundary import boundary, strewn
from training.model import Scored
from training.preprocess import Preprocessing

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
    raw = {name: np.concatenate([strewn(schema, sample, ROWS)[name], edges[name]]) for name in schema.names}
    independent = _preprocessing(
        preprocessing, {name: np.concatenate([raw[name][:INDEPENDENT_ROWS], edges[name]]) for name in raw}
    )
    expected = _torch_scores(scored, preprocessing, raw)
    session, worst = open_session(model, "cpu"), 0.0
    # Near zero the relative difference says nothing: there the unit of the target is the measure.
    unit = 1.0 if scored.link == "sigmoid" else abs(scored.scale) if scored.link == "identity" else 0.0
    for batch in BATCHES:
        found = score(session, raw, batch)
        off = np.abs(found - expected) / np.maximum(np.abs(expected), max(unit, 1e-30))
        if found.shape != expected.shape or not (off <= TOLERANCE).all():
            row = int(np.argmin(off <= TOLERANCE))
            record = {name: values[row] for name, values in raw.items()}
            raise ParityError(
                f"The exported graph gives {found[row]:g} instead of {expected[row]:g} in batches of {batch} for "
                f"{record}; it must not be registered. Simplify the network or report the operator that is exported wrongly."
            )
        worst = max(worst, float(off.max()))
    return {
        "rows": len(expected),
        "boundary_rows": len(next(iter(edges.values()))),
        "batches": list(BATCHES),
        "tolerance": TOLERANCE,
        "largest_difference": worst,
        "independent_rows": independent,
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


def _preprocessing(preprocessing: Preprocessing, raw: Tensors) -> int:
    """The graph in ONNX Runtime against ONNX's reference implementation; returns the rows compared."""
    made = preprocessing.run(raw)
    names = [entry.name for entry in preprocessing.inputs]
    evaluator = ReferenceEvaluator(
        onnx.ModelProto.FromString(preprocessing.model), new_ops=[StringNormalizer, StringSplit]
    )
    for name, expected in zip(names, evaluator.run(names, dict(raw)), strict=True):
        if made[name].shape != expected.shape or not np.allclose(made[name], expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise ParityError(
                f"Preprocessing of '{name}' differs between ONNX Runtime and the ONNX reference implementation."
            )
    return len(next(iter(raw.values())))


class StringNormalizer(OpRun):  # type: ignore[misc]
    """Lower case of ASCII letters only, as the C locale has it (ONNX's reference strips accents)."""

    def _run(self, x: np.ndarray, **_: Any) -> tuple[np.ndarray]:
        lower = ["".join(c.lower() if c.isascii() else c for c in text) for text in x.ravel()]
        return (np.array(lower, object).reshape(x.shape),)


class StringSplit(OpRun):  # type: ignore[misc]
    """Split at a delimiter, or at runs of spaces (the reference splits at every white space)."""

    def _run(
        self, x: np.ndarray, delimiter: str | None = None, maxsplit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        most = -1 if maxsplit is None else maxsplit
        pieces = [_split(text, delimiter, most) for text in x.ravel()]
        width = max(map(len, pieces), default=0)
        padded = [one + [""] * (width - len(one)) for one in pieces]
        shape = (*x.shape, width)
        return np.array(padded, object).reshape(shape), np.array([len(one) for one in pieces], np.int64).reshape(
            x.shape
        )


def _split(text: str, delimiter: str | None, most: int) -> list[str]:
    if delimiter:
        return text.split(delimiter, most) if text else []
    left = text.strip(" ")
    found: list[str] = []
    while left and len(found) != most:
        word, _, left = left.partition(" ")
        found.append(word)
        left = left.lstrip(" ")
    return [*found, left] if left else found


def summary(report: Mapping[str, Any]) -> str:
    """One sentence for people."""
    return (
        f"{report['rows']:,} rows ({report['boundary_rows']} generated edges) in batches of {report['batches']}: "
        f"largest relative difference {report['largest_difference']:.1e}, tolerance {report['tolerance']:g}."
    )
