"""The shapes that TensorRT builds an engine for: every tensor of a graph, from one row to the largest proven batch.

TensorRT takes part of a graph, whose inputs are tensors in its middle; where a profile is given it must name all of
them, and which they are is known only once the graph is cut. So every tensor with a free number of rows is named.
Not here: whether TensorRT is there (`noria.gpu`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import shape_inference


def profile(model: bytes, sizes: Sequence[int]) -> dict[str, tuple[str, str, str]]:
    """Tensor name to its smallest, usual and largest shape, for batches of `sizes` (ascending; the middle is usual).

    Strings are left out, which TensorRT does not read, and tensors of which more than the rows is free.
    """
    graph = shape_inference.infer_shapes(onnx.ModelProto.FromString(model)).graph
    ends = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    found = {}
    for entry in (*graph.input, *graph.value_info):
        kind = entry.type.tensor_type
        dimensions = kind.shape.dim
        if kind.elem_type == onnx.TensorProto.STRING or not dimensions or dimensions[0].HasField("dim_value"):
            continue
        if all(dimension.HasField("dim_value") for dimension in dimensions[1:]):
            rest = [str(dimension.dim_value) for dimension in dimensions[1:]]
            smallest, usual, largest = ("x".join([str(rows), *rest]) for rows in ends)
            found[entry.name] = (smallest, usual, largest)
    return found
