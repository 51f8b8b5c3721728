"""An int8 graph in place of the float one, where that is measured to pay and costs no quality worth naming.

Weights and the inputs of matrix products become 8 bits, with scales fixed by calibration rows (static quantization;
Jacob et al. 2018). Not *dynamic* quantization: its scale is taken over the whole batch, so that a row's score would
depend on whose requests it shares a run with. The file keeps to standard operators (QuantizeLinear,
DequantizeLinear), which ONNX Runtime fuses into integer kernels.

The decision (`decide`) is pure; the evidence is measured on this machine. Not here: whether the float graph is right
(`training.parity`), and whether the candidate is promoted: the gate judges the graph that ships.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from noria.options import TrainingOptions
from noria.runtime import open_session, score
from noria.schema import Tensors
from noria.workload import Workload
from registry.proof import ABSOLUTE, RELATIVE
from training import evaluate
from training.boundary import boundary, strewn
from training.data import Prepared

PRODUCTS = ("MatMul", "Gemm")
PAIRS = {1: 400, 1024: 60}
"""Batch sizes that are timed, and in how many pairs of runs."""
CALIBRATION_ROWS, CALIBRATION_BATCH = 4096, 1024
ALONE_ROWS = 256
"""Rows that must score the same alone and among others."""


@dataclass(frozen=True)
class Evidence:
    """What was measured: the int8 graph beside the float one."""

    products: int
    """Matrix products that became int8."""
    speedups: Mapping[int, float]
    """Rows of a batch: how many times faster the int8 graph ran, the median over pairs of runs."""
    error: float
    """The gate's metric of the float graph on the validation part."""
    int8_error: float
    """The same of the int8 graph."""
    largest_difference: float
    """Between the two graphs' scores on the validation part, relative."""
    batch_difference: float
    """Between a row's score alone and among others, in units of what the proof allows: above 1 is too much."""
    finite: bool
    """Whether every score was a number, on generated edges too."""


@dataclass(frozen=True)
class Choice:
    """Whether the int8 graph ships, and every reason."""

    taken: bool
    reasons: tuple[str, ...]


def decide(evidence: Evidence, options: TrainingOptions) -> Choice:
    """Take the int8 graph only where nothing speaks against it. Pure."""
    against, said = [], []
    if not evidence.products:
        return Choice(False, ("The graph has no matrix product with constant weights to quantize.",))
    if not evidence.finite:
        against.append("The int8 graph's score is not a number on some rows.")
    if not evidence.batch_difference <= 1:
        against.append("In the int8 graph rows of a batch disturb each other.")
    for rows, speedup in evidence.speedups.items():
        sentence = f"At {rows:,} {'row' if rows == 1 else 'rows'} int8 runs at {speedup:.2f} times the float speed"
        if speedup < 1 + options.quantize_gain:
            against.append(f"{sentence}; {1 + options.quantize_gain:.2f} times is asked for.")
        said.append(f"{sentence}.")
    loss = evidence.int8_error / evidence.error - 1 if evidence.error else float(evidence.int8_error > 0)
    sentence = f"The validation error goes from {evidence.error:.4g} to {evidence.int8_error:.4g} ({loss:+.2%})"
    if not loss <= options.quantize_loss:
        against.append(f"{sentence}; at most {options.quantize_loss:+.2%} is allowed.")
    said.append(f"{sentence}.")
    return Choice(not against, tuple(against or said))


def choose(workload: Workload, prepared: Prepared, model: bytes) -> tuple[bytes, dict[str, Any]]:
    """The graph that ships, and the report with the decision, its reasons and its figures."""
    made, products = quantize(model, strewn(workload.schema, _raw(workload, prepared, "train"), CALIBRATION_ROWS))
    evidence = measure(workload, prepared, model, made, products)
    choice = decide(evidence, workload.training)
    report = {
        "taken": choice.taken,
        "reasons": list(choice.reasons),
        **asdict(evidence),
        "speedups": {str(rows): round(value, 3) for rows, value in evidence.speedups.items()},
        "model_bytes": len(made),
    }
    return (made if choice.taken else model), report


def quantize(model: bytes, calibration: Tensors) -> tuple[bytes, int]:
    """The int8 graph, and how many products became int8; scales from `calibration` (raw tensors [n])."""
    whole = onnx.ModelProto.FromString(model)
    # ONNX Runtime's own preparation would log advice about itself; the exporter has done what it does.
    whole.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            whole,
            path,
            _Rows(calibration, [entry.name for entry in whole.graph.input]),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # 7 bits of weight: with 8, processors without VNNI saturate their sums, and the same file would give
            # other scores there.
            reduce_range=True,
            # A product's result stays float: rounding the last one would round the score itself to 256 steps.
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)},
        )
        made = onnx.load(path)
    del made.metadata_props[:], made.graph.value_info[:]
    made.metadata_props.extend(onnx.ModelProto.FromString(model).metadata_props)
    onnx.checker.check_model(made, full_check=True)
    rounded = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
    products = sum(node.op_type in PRODUCTS and node.input[1] in rounded for node in made.graph.node)
    return bytes(made.SerializeToString()), products


def measure(workload: Workload, prepared: Prepared, model: bytes, made: bytes, products: int) -> Evidence:
    """Time both graphs in turn, and score the validation part and generated edges with both."""
    before, after = open_session(model, "cpu"), open_session(made, "cpu")
    raw = _raw(workload, prepared, "validation")
    scores = {"float": score(before, raw), "int8": score(after, raw)}
    found = evaluate.judge(workload, prepared.split.validation, scores)
    few = {name: values[:ALONE_ROWS] for name, values in raw.items()}
    alone, among = score(after, few, batch=1), scores["int8"][:ALONE_ROWS]
    edges = score(after, boundary(workload.schema, raw))
    return Evidence(
        products=products,
        speedups={rows: _speedup(before, after, raw, rows) for rows in PAIRS},
        error=found["float"].metrics["error"],
        int8_error=found["int8"].metrics["error"],
        largest_difference=float(
            np.max(np.abs(scores["int8"] - scores["float"]) / np.maximum(np.abs(scores["float"]), ABSOLUTE))
        ),
        batch_difference=float(np.max(np.abs(alone - among) / (ABSOLUTE + RELATIVE * np.abs(among)))),
        finite=bool(np.isfinite(scores["int8"]).all() and np.isfinite(edges).all()),
    )


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's numbers as metrics of a run."""
    speeds = {f"int8/speedup_{rows}": float(value) for rows, value in report["speedups"].items()}
    return {**speeds, "int8/error": report["int8_error"], "int8/float_error": report["error"]}


def _speedup(before: ort.InferenceSession, after: ort.InferenceSession, raw: Tensors, rows: int) -> float:
    """Median of float seconds / int8 seconds, each pair run one after the other, the order changing."""
    chosen = np.arange(rows) % len(next(iter(raw.values())))
    batch = {entry.name: raw[entry.name][chosen] for entry in before.get_inputs()}
    ratios = []
    for number in range(PAIRS[rows] + PAIRS[rows] // 4):
        order = (before, after) if number % 2 else (after, before)
        taken = {id(session): _seconds(session, batch) for session in order}
        ratios.append(taken[id(before)] / taken[id(after)])
    return float(np.median(ratios[PAIRS[rows] // 4 :]))


def _seconds(session: ort.InferenceSession, batch: Tensors) -> float:
    began = time.perf_counter()
    session.run(None, dict(batch))
    return time.perf_counter() - began


def _raw(workload: Workload, prepared: Prepared, part: str) -> Tensors:
    return workload.schema.tensors(getattr(prepared.split, part))


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    """Calibration rows as ONNX Runtime asks for them: batch by batch, then None."""

    def __init__(self, raw: Tensors, names: list[str]) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = (
            {name: raw[name][start : start + CALIBRATION_BATCH] for name in names}
            for start in range(0, len(raw[names[0]]), CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)
