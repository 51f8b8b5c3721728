"""Building blocks of the preprocessing graph: standard ONNX operators that turn one raw column into model tensors.

Each block adds nodes to a `Builder` and returns the name of its output. Not here: what is learnt from data
(`training.preprocess`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from noria.schema import MISSING_INTEGER

OPSET = 20
"""StringSplit came with 20; the exported network is written in the same version so that the two merge."""
ML_OPSET = 3
IR = 10
TYPES = {"number": TensorProto.FLOAT, "integer": TensorProto.INT64, "timestamp": TensorProto.INT64,
         "string": TensorProto.STRING, "text": TensorProto.STRING}  # fmt: skip
DAY, WEEK = 86_400, 604_800
ZERO = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
CLIP = 8.0
"""Standardised numbers are cut at this many deviations: a wild value must not carry the score away."""
BLANKS = ("\n", "\r", "\t")
"""White space that StringSplit does not split at; it is made a space first."""
PIECES = 256
"""Blanks of one kind that are seen in a text; what lies behind them stays glued. A power of two. The limit, and that
pieces are joined again before the next split, bound what a hostile text can ask for: memory grows with the sum of
blanks and words, not with their product."""


class Builder:
    """Collects nodes and constants; names them by number, so that the same columns always give the same graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, kind: Any) -> str:
        """A constant tensor."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def node(self, operator: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """A node; returns its first output, `name` or one made up. A second one is called `<first>_second`."""
        name = name or f"t{len(self.nodes)}"
        outputs = [name, f"{name}_second"] if operator == "StringSplit" else [name]
        self.nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))
        return name


def number(build: Builder, raw: str, name: str, *, plain: tuple[float, float], log: tuple[float, float]) -> str:
    """float32 [n] to float32 [n, 3]: standardised, standardised signed log1p, and 1 where missing.

    `plain` and `log` are mean and deviation. A missing value gives (0, 0, 1).
    """
    missing = build.node("IsNaN", raw)
    zero = build.constant(0, np.float32)
    filled = build.node("Where", missing, build.constant(plain[0], np.float32), raw)
    growth = build.node("Log", build.node("Add", build.node("Abs", filled), build.constant(1, np.float32)))
    signed = build.node("Mul", build.node("Sign", filled), growth)
    parts = []
    for values, (mean, deviation) in ((filled, plain), (signed, log)):
        centred = build.node("Sub", values, build.constant(mean, np.float32))
        scaled = build.node("Div", centred, build.constant(deviation, np.float32))
        cut = build.node("Clip", scaled, build.constant(-CLIP, np.float32), build.constant(CLIP, np.float32))
        parts.append(build.node("Where", missing, zero, cut))
    parts.append(build.node("Cast", missing, to=TensorProto.FLOAT))
    axis = build.constant([1], np.int64)
    return build.node("Concat", *(build.node("Unsqueeze", part, axis) for part in parts), name=name, axis=1)


def levels(build: Builder, raw: str, name: str, *, known: list[Any], text: bool) -> str:
    """int64 or string [n] to int64 [n]: 0 missing, 1 unknown, 2... the known levels in their order."""
    keys = {"keys_strings": ["", *known]} if text else {"keys_int64s": [MISSING_INTEGER, *known]}
    values = [0, *range(2, len(known) + 2)]
    return build.node(
        "LabelEncoder", raw, name=name, domain="ai.onnx.ml", values_int64s=values, default_int64=1, **keys
    )


def clock(build: Builder, raw: str, names: tuple[str, str, str]) -> None:
    """Epoch seconds int64 [n] to hour 1..24, weekday 1..7 (Monday first) and hour of week 1..168; 0 where missing.

    Integers only, and the remainder of the big number first: epoch seconds do not fit a float32, and adding to a number
    near the end of int64 would wrap around.
    """

    def whole(value: int) -> str:
        return build.constant(value, np.int64)

    missing = build.node("Equal", raw, whole(MISSING_INTEGER))
    within = build.node("Mod", raw, whole(WEEK))
    shifted = build.node("Mod", build.node("Add", within, whole(3 * DAY)), whole(WEEK))  # 1970 began on a Thursday
    hour_of_week = build.node("Div", shifted, whole(3600))
    for name, value in zip(
        names,
        (build.node("Mod", hour_of_week, whole(24)), build.node("Div", hour_of_week, whole(24)), hour_of_week),
        strict=True,
    ):
        build.node("Where", missing, whole(0), build.node("Add", value, whole(1)), name=name)


def tokens(build: Builder, raw: str, words: int) -> str:
    """string [n] to lower-cased (ASCII) words in reading order: string [n, k], k <= words, "" behind the last."""
    text = build.node("StringNormalizer", raw, case_change_action="LOWER", locale="C")
    for blank in BLANKS:
        text = _spaced(build, text, blank)
    pieces = build.node("StringSplit", text, maxsplit=words)
    start, end, axis = (build.constant([value], np.int64) for value in (0, words, 1))
    return build.node("Slice", pieces, start, end, axis)  # behind them: the unread rest, in one piece


def _spaced(build: Builder, text: str, blank: str) -> str:
    """string [n] with every `blank` (the first PIECES - 1 of them) replaced by a space.

    ONNX has no replace: split, fill up to PIECES, and join neighbours pair by pair until one is left.
    """
    pieces = build.node("StringSplit", text, delimiter=blank, maxsplit=PIECES - 1)
    rows = build.node("Shape", text)
    nothing = build.node(
        "Gather", build.constant([[""] * PIECES], object), build.node("ConstantOfShape", rows, value=ZERO)
    )
    every, axis, last = build.constant([2], np.int64), build.constant([1], np.int64), build.constant([PIECES], np.int64)
    filled = build.node("Concat", pieces, nothing, axis=1)
    first, second = build.constant([0], np.int64), build.constant([1], np.int64)
    filled = build.node("Slice", filled, first, last, axis)
    space = build.constant(" ", object)
    for _ in range(PIECES.bit_length() - 1):
        left, right = (build.node("Slice", filled, start, last, axis, every) for start in (first, second))
        filled = build.node("StringConcat", build.node("StringConcat", left, space), right)
    return build.node("Squeeze", filled, axis)


def words(build: Builder, raw: str, name: str, *, known: list[str], width: int) -> str:
    """string [n] to word ids int64 [n, width]: 0 behind the last word, 1 unknown, 2... the known words."""
    ids = levels(build, tokens(build, raw, width), "", known=known, text=True)
    ids = build.node("Pad", ids, build.constant([0, 0, 0, width], np.int64), build.constant(0, np.int64))
    start, end, axis = (build.constant([value], np.int64) for value in (0, width, 1))
    return build.node("Slice", ids, start, end, axis, name=name)


def finish(build: Builder, inputs: dict[str, str], outputs: dict[str, tuple[int, list[Any]]]) -> bytes:
    """The checked model: `inputs` maps raw column to kind, `outputs` name to (element type, shape)."""
    raw = [helper.make_tensor_value_info(name, TYPES[kind], ["rows"]) for name, kind in inputs.items()]
    made = [helper.make_tensor_value_info(name, *described) for name, described in outputs.items()]
    graph = helper.make_graph(build.nodes, "preprocessing", raw, made, build.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR, producer_name="noria")
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
