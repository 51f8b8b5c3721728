"""What an ONNX file must be before anything runs it: self-contained, standard operators only, and about this schema.

Not here: whether it computes the right thing (`registry.proof`, and parity in training).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from noria.errors import BundleError
from noria.runtime import SCORE
from noria.schema import Schema

MOST_BYTES = 2**31 - 1
"""Largest ONNX file: what protobuf can hold in one message."""
MOST_NODES = 100_000
STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
ELEMENTS = {
    "number": onnx.TensorProto.FLOAT,
    "integer": onnx.TensorProto.INT64,
    "string": onnx.TensorProto.STRING,
    "text": onnx.TensorProto.STRING,
    "timestamp": onnx.TensorProto.INT64,
}


def check_graph(model: bytes, schema: Schema) -> None:
    """Refuse a graph that is unsafe to run, or does not fit the schema.

    Raises:
        BundleError: says why, and where.
    """
    _check_inputs(_check_safe(model).graph, schema)


def check_file(path: Path) -> None:
    """Refuse an ONNX file that is unsafe to run; its inputs and outputs may be any. Raises BundleError."""
    if path.stat().st_size > MOST_BYTES:
        raise BundleError(f"{path.name} is larger than {MOST_BYTES // 2**20} MB, the most that is served.")
    _check_safe(path.read_bytes())


def _check_safe(model: bytes) -> Any:
    """The parsed model, which reads no other file, needs no custom operator, and is not too large."""
    if len(model) > MOST_BYTES:
        raise BundleError(f"model.onnx is larger than {MOST_BYTES // 2**20} MB, the most that is served.")
    try:
        parsed = onnx.ModelProto.FromString(model)
    except DecodeError:
        raise BundleError("model.onnx is not an ONNX model; register the version again.") from None
    local = {(function.domain, function.name) for function in parsed.functions}
    for number, node in enumerate(_every_node(parsed)):
        if number >= MOST_NODES:
            raise BundleError(f"model.onnx has more than {MOST_NODES} nodes, the most that is served.")
        if node.domain not in STANDARD and (node.domain, node.op_type) not in local:
            name = f"{node.domain}.{node.op_type}"
            raise BundleError(f"model.onnx uses the custom operator '{name}'; export with standard operators only.")
    return parsed


def _check_inputs(graph: Any, schema: Schema) -> None:
    kinds = {column.name: column.kind for column in schema.columns}
    weights = {tensor.name for tensor in graph.initializer}
    for entry in graph.input:
        if entry.name in weights:
            continue
        if entry.name not in kinds:
            raise BundleError(f"model.onnx wants the input '{entry.name}', which is no column of the schema.")
        kind = kinds[entry.name]
        if entry.type.tensor_type.elem_type != ELEMENTS[kind]:
            raise BundleError(f"Input '{entry.name}' of model.onnx has another type than the schema's {kind}.")
    if SCORE not in {entry.name for entry in graph.output}:
        raise BundleError(f"model.onnx has no output '{SCORE}'; export it with one float32 score a row.")


def _every_node(model: Any) -> Iterator[Any]:
    """Every node of a model; tensors met on the way must be inside the file."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)
        yield from _of_attributes(function.attribute_proto)


def _of_graph(graph: Any) -> Iterator[Any]:
    _refuse_external(*graph.initializer)
    _refuse_sparse(*graph.sparse_initializer)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Any) -> Iterator[Any]:
    for attribute in attributes:
        _refuse_external(attribute.t, *attribute.tensors)
        _refuse_sparse(attribute.sparse_tensor, *attribute.sparse_tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from _of_graph(graph)


def _refuse_sparse(*tensors: Any) -> None:
    for tensor in tensors:
        _refuse_external(tensor.values, tensor.indices)


def _refuse_external(*tensors: Any) -> None:
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise BundleError(
                f"Tensor '{tensor.name}' of model.onnx lies in another file; export with all weights inside."
            )
