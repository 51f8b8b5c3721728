"""How a version uses this machine's GPU: which one, how much of it, and what TensorRT builds its engine for.

TensorRT takes part of a graph, whose inputs are tensors in its middle; where a profile is given it must name all of
them, and which they are is known only once the graph is cut. So every tensor with a free number of rows is named.
Not here: whether there is a GPU, and its libraries' options (`noria.gpu`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import shape_inference

from noria.gpu import GpuOptions
from noria.providers import Providers
from noria.runtime import ANY_GPU


def gpu_options(model: Path, providers: Providers, sizes: Sequence[int]) -> GpuOptions:
    """What `open_session` is told about the GPU, from the settings; the profile is made for TensorRT only."""
    if providers == "cpu":
        return ANY_GPU
    settings = importlib.import_module("noria.settings").load_settings()
    shapes = profile(model.read_bytes(), sizes) if providers == "tensorrt" else {}
    return GpuOptions(settings.gpu_device, settings.gpu_memory_mb, settings.engines, shapes)


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
