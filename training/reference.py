"""ONNX's reference evaluator, for what an independent second opinion on the preprocessing graph needs.

It is slow, plain NumPy, and shares no code with ONNX Runtime. Three of its string operators are not usable
(StringNormalizer strips accents and drops empty strings, StringSplit splits at every white space, StringConcat makes
every string as wide as the longest: gigabytes); they are written here from the standard's text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from noria.schema import Tensors


def evaluate(model: bytes, outputs: list[str], tensors: Tensors) -> list[np.ndarray]:
    """The named outputs of a graph for one batch of raw tensors."""
    own = [StringNormalizer, StringSplit, StringConcat]
    evaluator = ReferenceEvaluator(onnx.ModelProto.FromString(model), new_ops=own)
    return list(evaluator.run(outputs, dict(tensors)))


class StringNormalizer(OpRun):  # type: ignore[misc]
    """Lower case of ASCII letters only, as the C locale has it."""

    def _run(self, x: np.ndarray, **_: Any) -> tuple[np.ndarray]:
        lower = ["".join(c.lower() if c.isascii() else c for c in text) for text in x.ravel()]
        return (np.array(lower, object).reshape(x.shape),)


class StringConcat(OpRun):  # type: ignore[misc]
    """Joined element by element."""

    def _run(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray]:
        return (np.asarray(x, object) + np.asarray(y, object),)


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
        counts = np.array([len(one) for one in pieces], np.int64)
        return np.array(padded, object).reshape(shape), counts.reshape(x.shape)


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
