"""What v2 requests of one form have in common, worked out once: clients send the same tensors with other values.

Of a request, what the JSON before its binary tensors or around the values of its only tensor says; of an answer, the
JSON around its values. A version keeps them (`serving.model`), so they end with it. Not here: what is right and wrong
in a request (`serving.tensors`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import orjson

MOST_KEPT = 256
LONGEST_HEAD = 2048
"""Bytes of JSON; a longer one is read anew each time."""
VALUE = orjson.Fragment(b"\0")
"""Stands for a value in a form: JSON never has this byte, in a string it is escaped."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(dict[K, V]):
    """A dictionary that begins anew when it is full: what clients choose must not fill the memory."""

    def keep(self, key: K, value: V) -> V:
        """Keep and return a value."""
        if len(self) >= MOST_KEPT:
            self.clear()
        self[key] = value
        return value


@dataclass(frozen=True, slots=True)
class Head:
    """What the JSON of a request says whose tensors all follow as numbers, and fit the model."""

    inputs: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int, int], ...]
    """Name, type, shape, elements and first byte behind the JSON."""
    size: int
    """Bytes behind the JSON."""
    rows: int
    wanted: dict[str, bool] | None
    """Outputs to answer, and whether as bytes; None: all, as JSON."""

    def tensors(self, body: bytes, start: int) -> dict[str, np.ndarray]:
        """The tensors of a body whose JSON ends at `start` and that has `size` bytes behind it."""
        found = {}
        for name, kind, shape, count, offset in self.inputs:
            array = np.frombuffer(body, kind, count, start + offset).reshape(shape)
            # ONNX Runtime reads whole words: a tensor behind JSON of odd length must move first.
            found[name] = array if array.flags.aligned else array.copy()
        return found


def head_of(
    names: Sequence[str], tensors: Mapping[str, np.ndarray], rows: int, wanted: dict[str, bool] | None
) -> Head | None:
    """What was read of a request whose `names` lie in this order behind its JSON; None where values decide, too."""
    starts, end = {}, 0
    for name in names:
        starts[name], end = end, end + tensors[name].nbytes
    if any(array.dtype.kind in "Ob" or not array.size for array in tensors.values()):
        return None
    inputs = tuple((name, array.dtype, array.shape, array.size, starts[name]) for name, array in tensors.items())
    return Head(inputs, end, rows, wanted)


@dataclass(frozen=True, slots=True)
class Frame:
    """What the JSON around the values of the only tensor of a request says, which fits the model.

    What stands before the values and behind them was read as JSON once, and the values in between are a list in JSON
    again: so the whole is what it was, with other values.
    """

    end: bytes
    """The JSON behind the values."""
    shape: tuple[int, ...]
    count: int
    """Values."""
    rows: int
    wanted: dict[str, bool] | None

    def values(self, body: bytes, start: int) -> list[Any] | None:
        """The values that begin at `start`; None where this body must be read as a whole."""
        if not body.endswith(self.end):
            return None
        try:
            found = orjson.loads(memoryview(body)[start : len(body) - len(self.end)])
        except orjson.JSONDecodeError:
            return None
        # A nested list may be right, but is not what was read before.
        return found if len(found) == self.count and found[0].__class__ is not list else None


def values_at(body: bytes) -> int:
    """Where the values of a request in JSON begin, if it has one tensor only; -1: nowhere."""
    return body.find(b"[", body.find(b'"data"'))


def frame_of(
    body: bytes, content: Any, shape: tuple[int, ...], rows: int, wanted: dict[str, bool] | None
) -> tuple[bytes, Frame] | None:
    """What was read of a body as `content` with one tensor, and what stands before its values; None where it must be
    read as a whole each time."""
    entry = content["inputs"][0]
    data = entry.get("data")
    if not data or data[0].__class__ is list:
        return None
    start = values_at(body)
    behind = body.find(b"]", start) + 1
    if max(start, len(body) - behind) > LONGEST_HEAD:
        return None
    before, end = body[:start], body[behind:]
    try:
        other = orjson.loads(b"%bnull%b" % (before, end))
    except orjson.JSONDecodeError:
        return None
    # The values stand where they seem to: nothing else changes with them.
    if other != {**content, "inputs": [{**entry, "data": None}]}:
        return None
    return before, Frame(end, shape, len(data), rows, wanted)


def form_of(content: Mapping[str, Any]) -> bytes:
    """JSON with `%b` for each VALUE in it, in order; `form % texts` fills it."""
    return orjson.dumps(content).replace(b"%", b"%%").replace(b"\0", b"%b")
