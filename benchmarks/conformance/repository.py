"""The models that the suite asks, as a repository that any server loads: `NAME/1/model.onnx`, Triton's layout.

same_<datatype>   y = x, [-1, 3], for each of the thirteen datatypes
add_sub           a, b FP32 [-1, 4] -> sum, difference
fixed             y = x, FP32 [2, 3]: no free dimension
free              y = x, FP32 [-1, -1]
several           x FP32 [-1, 2] -> twice FP32, whole INT32, positive BOOL
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.conformance.wire import NUMPY


def write(folder: Path) -> list[str]:
    """Write every model below `folder`; returns their names."""
    models = {f"same_{datatype.lower()}": _same(datatype, ["n", 3]) for datatype in NUMPY}
    models["fixed"] = _same("FP32", [2, 3])
    models["free"] = _same("FP32", ["n", "m"])
    models["add_sub"] = _add_sub()
    models["several"] = _several()
    for name, graph in models.items():
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        place = folder / name / "1"
        place.mkdir(parents=True, exist_ok=True)
        onnx.save(model, place / "model.onnx")
    return list(models)


def _value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _same(datatype: str, shape: list[int | str]) -> onnx.GraphProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(NUMPY[datatype]))
    node = helper.make_node("Identity", ["x"], ["y"])
    return helper.make_graph([node], "same", [_value("x", kind, shape)], [_value("y", kind, shape)])


def _add_sub() -> onnx.GraphProto:
    number, shape = TensorProto.FLOAT, ["n", 4]
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    inputs = [_value(name, number, shape) for name in ("a", "b")]
    return helper.make_graph(nodes, "add_sub", inputs, [_value(name, number, shape) for name in ("sum", "difference")])


def _several() -> onnx.GraphProto:
    number, shape = TensorProto.FLOAT, ["n", 2]
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Greater", ["x", "zero"], ["positive"]),
    ]
    outputs = [
        _value("twice", number, shape), _value("whole", TensorProto.INT32, shape),
        _value("positive", TensorProto.BOOL, shape),
    ]  # fmt: skip
    zero = helper.make_tensor("zero", number, [], [0.0])
    return helper.make_graph(nodes, "several", [_value("x", number, shape)], outputs, [zero])
