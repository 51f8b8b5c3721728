"""What the prediction log says of answered rows: the runs of a few milliseconds share one line.

    {"v": version, "i": [first id of each run], "n": [rows of each run], "ms": [latency of each run],
     "t": [when, microseconds: of each run, or of each row], ...}

and then, of a workload, scores `s`, actions `a` and raw columns `c`, or, of a plain model, its tensors
(`serving.rawlog`). Not here: files (`serving.capture`), ids as text (`serving.ids`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from noria.runtime import SCORE
from serving.model import Model
from serving.rawlog import Piece, pack

FLAGS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


@dataclass(slots=True)
class Entry:
    """The answered rows of one run."""

    first: int
    """The id of its first row, as a number; `serving.ids.expand` gives those of all rows. 0: it has none yet."""
    rows: int
    tensors: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    times: int | np.ndarray
    """Microseconds since 1970, [rows] or the same for all."""
    actions: Sequence[str | None]
    latency_ms: float


def write(model: Model, entries: Sequence[Entry]) -> list[Any]:
    """The bytes of a line, or of one a run where runs cannot share one, in pieces."""
    if model.ragged and len(entries) > 1:
        return [piece for entry in entries for piece in write(model, [entry])]
    line: dict[str, Any] = {
        "v": model.version,
        "i": [f"{entry.first:x}" for entry in entries],
        "n": [entry.rows for entry in entries],
        "ms": [round(entry.latency_ms, 3) for entry in entries],
        "t": _times(entries),
    }
    pieces: list[Piece] = []
    if model.bundle is None:
        line["in"], pieces = pack([entry.tensors for entry in entries], model.inputs)
        line["out"], others = pack([entry.outputs for entry in entries], model.outputs)
        pieces += others
        line["raw"] = sum([len(piece) for piece in pieces])
    else:
        line["s"] = _joined([entry.outputs[SCORE] for entry in entries])
        line["c"] = {name: _joined([entry.tensors[name] for entry in entries]) for name in entries[0].tensors}
        actions = [action for entry in entries for action in entry.actions]
        line["a"] = actions if actions and actions[0] is not None else None
    return [orjson.dumps(line, option=FLAGS), *pieces]


def spread(line: dict[str, Any]) -> None:
    """Give each row of a line that was read a time of its own."""
    if "n" in line and len(line["t"]) != sum(line["n"]):
        line["t"] = [when for when, rows in zip(line["t"], line["n"], strict=True) for _ in range(rows)]


def _times(entries: Sequence[Entry]) -> Any:
    if all(isinstance(entry.times, int) for entry in entries):
        return [entry.times for entry in entries]
    return np.concatenate([
        np.full(entry.rows, entry.times) if isinstance(entry.times, int) else entry.times for entry in entries
    ])  # fmt: skip


def _joined(parts: Sequence[np.ndarray]) -> Any:
    """Of all runs, as JSON takes it."""
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return values.tolist() if values.dtype == object else values
