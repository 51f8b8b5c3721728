"""The plain models that are served: perceptrons of fixed random weights, in a folder for `noria serve --repository`.

small     20-64-64-2       a row costs next to nothing: what is measured is everything around the model
floats    1024-10          a wide row: what is measured is the encoding
compute   1024-1024-10     two million multiplications a row: what is measured is batching
heavy     1024-4096-4096-10  21 million a row: what is measured is what a busy model leaves to the rest
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SIZES = {"small": (20, 64, 64, 2), "floats": (1024, 10), "compute": (1024, 1024, 10), "heavy": (1024, 4096, 4096, 10)}


def perceptron(sizes: tuple[int, ...], seed: int = 0) -> bytes:
    """An ONNX graph `x` [n, first] -> `y` [n, last], ReLU between layers."""
    generator, nodes, weights, given = np.random.default_rng(seed), [], [], "x"
    for layer, (rows, columns) in enumerate(pairwise(sizes)):
        last = layer == len(sizes) - 2
        made = "y" if last else f"h{layer}"
        matrix = generator.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
        bias = generator.normal(0, 0.1, columns).astype(np.float32)
        weights += [numpy_helper.from_array(matrix, f"w{layer}"), numpy_helper.from_array(bias, f"b{layer}")]
        nodes.append(helper.make_node("Gemm", [given, f"w{layer}", f"b{layer}"], [made if last else f"m{layer}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"m{layer}"], [made]))
        given = made
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
            for name, size in (("x", sizes[0]), ("y", sizes[-1]))]  # fmt: skip
    graph = helper.make_graph(nodes, "perceptron", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def repository(folder: Path) -> Path:
    """Write every model as NAME/1/model.onnx."""
    for name, sizes in SIZES.items():
        path = file_of(folder, name)
        path.parent.mkdir(parents=True)
        path.write_bytes(perceptron(sizes))
    return folder


def file_of(folder: Path, name: str) -> Path:
    """Where a model lies in the repository."""
    return folder / name / "1" / "model.onnx"


def rows_of(name: str, count: int) -> np.ndarray:
    """Rows [count, width], the same ones each time."""
    return np.random.default_rng(1).normal(size=(count, SIZES[name][0])).astype(np.float32)


def session(path: Path) -> onnxruntime.InferenceSession:
    """One thread, no spinning, as every server here opens it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def expected(path: Path, rows: np.ndarray) -> np.ndarray:
    """onnxruntime's own answer [n, m]."""
    (scores,) = session(path).run(None, {"x": rows})
    return np.asarray(scores)
