"""How a plain model's answered rows lie in the log, and what the lake keeps of them.

The tensors' bytes, behind the line: decimal digits of a thousand numbers would cost more than the model. In the lake
each input is a column `input_NAME`, each output `output_NAME`: one value a row, or a list where a row has or
may have more (row-major).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from serving.datatypes import NUMPY
from serving.model import Model, Tensor

COPIED_BYTES = 4096
"""Up to so many it is quicker to copy the bytes of all runs into one piece than to name each to the system."""
Piece = bytes | memoryview
SIGNED = {
    "UINT8": pa.int16(),
    "UINT16": pa.int32(),
    "UINT32": pa.int64(),
    "UINT64": pa.decimal128(20),
    "FP16": pa.float32(),
}
"""What holds a type that Delta Lake has not."""


def describe(model: Model) -> dict[str, Any]:
    """What a segment says about the model once, so that it can be read by itself: of each tensor its name, datatype and
    the shape of a row."""
    return {
        kind: [[one.name, one.datatype, one.shape[1:] if model.batched else one.shape] for one in tensors]
        for kind, tensors in (("inputs", model.inputs), ("outputs", model.outputs))
    }


def pack(runs: Sequence[Mapping[str, np.ndarray]], entries: Sequence[Tensor]) -> tuple[list[Any], list[Piece]]:
    """What the line says of each tensor, in their order: how many bytes of all runs follow, or the strings themselves;
    and the bytes."""
    said: list[Any] = []
    pieces: list[Piece] = []
    for one in entries:
        arrays = [run[one.name] for run in runs]
        if one.datatype == "BYTES":
            said.append([value for array in arrays for value in array.ravel().tolist()])
        else:
            size = sum([array.nbytes for array in arrays])
            if size <= COPIED_BYTES:
                pieces.append(b"".join([array.tobytes() for array in arrays]))
            else:
                pieces += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
            said.append(size)
    return said, pieces


def unpack(line: dict[str, Any], tail: memoryview) -> dict[str, Any]:
    """The line with the bytes that follow it in place of their numbers."""
    start = 0
    for key in ("in", "out"):
        for index, said in enumerate(line[key]):
            if isinstance(said, int):
                line[key][index] = tail[start : start + said]
                start += said
    return line


def columns(lines: Sequence[Mapping[str, Any]], described: Mapping[str, Any]) -> dict[str, pa.Array]:
    """The lake's columns for lines of one version."""
    found = {}
    for kind, key in (("inputs", "in"), ("outputs", "out")):
        for index, (name, datatype, *shape) in enumerate(described[kind]):
            flat, widths = _values([line[key][index] for line in lines], datatype, lines)
            offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
            # Segments from before shapes were noted have none; rows that may have more values are lists even with one.
            single = (not shape or set(shape[0]) <= {1}) and (widths == 1).all() and len(flat) == offsets[-1]
            found[f"{kind[:-1]}_{name}"] = flat if single else pa.ListArray.from_arrays(pa.array(offsets), flat)
    return found


def _values(packed: Sequence[Any], datatype: str, lines: Sequence[Mapping[str, Any]]) -> tuple[pa.Array, np.ndarray]:
    """All values, and how many each row has. Raises ValueError where they do not fit their rows."""
    sizes, rows = np.array([len(part) for part in packed]), np.array([len(line["t"]) for line in lines])
    if datatype == "BYTES":
        flat = pa.array([value for values in packed for value in values], pa.string())
    else:
        item = np.dtype(NUMPY[datatype]).itemsize
        if (sizes % item).any():
            raise ValueError(f"bytes that are no {datatype}")
        flat = pa.array(np.frombuffer(b"".join(packed), NUMPY[datatype]))
        sizes //= item
        if datatype in SIGNED:
            flat = flat.cast(SIGNED[datatype])
    if not rows.all() or (sizes % rows).any():
        raise ValueError("values that are not those of whole rows")
    return flat, np.repeat(sizes // rows, rows)
