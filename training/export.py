"""From a trained network to one ONNX graph, from raw columns to `score`: the exported network behind its preprocessing.

The first export of a process costs seconds (the exporter's libraries), so only `training.fit` and the trial of
`noria check` import this module. Not here: whether the graph is right (`training.parity`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import compose

from noria.errors import TrainingError
from noria.runtime import SCORE
from training import graph
from training.model import Scored
from training.preprocess import Input, Preprocessing

EXAMPLE_ROWS = 3
"""Rows of the example that is traced: with 0 or 1 the exporter would take the batch size for a constant."""


def export(scored: Scored, preprocessing: Preprocessing) -> bytes:
    """The whole graph, checked; standard operators only, every weight inside.

    Raises:
        TrainingError: the network cannot be exported.
    """
    network = _network(scored.cpu().eval(), preprocessing.inputs)
    first = onnx.ModelProto.FromString(preprocessing.model)
    network.ir_version = first.ir_version
    network = compose.add_prefix(network, "network/", rename_inputs=False, rename_outputs=False)
    read = {entry.name for entry in network.graph.input}
    links = [(entry.name, f"in_{index}") for index, entry in enumerate(preprocessing.inputs) if f"in_{index}" in read]
    whole = compose.merge_models(first, network, io_map=links, outputs=[SCORE], name="noria", producer_name="noria")
    del whole.graph.value_info[:]
    del whole.opset_import[:]  # merging lists a domain twice
    whole.opset_import.extend(first.opset_import)
    _declare_rows(whole)
    onnx.checker.check_model(whole, full_check=True)
    return bytes(whole.SerializeToString())


def _network(scored: Scored, inputs: tuple[Input, ...]) -> onnx.ModelProto:
    names = [f"in_{index}" for index in range(len(inputs))]
    examples = tuple(_example(entry) for entry in inputs)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                scored,
                examples,
                dynamo=True,
                input_names=names,
                output_names=[SCORE],
                dynamic_shapes=(tuple({0: torch.export.Dim.DYNAMIC} for _ in examples),),
                opset_version=graph.OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            # The exporter's own message is pages of advice to its developers; the cause says what the network did.
            cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise TrainingError(
                f"The network {type(scored.network).__name__} cannot be exported to ONNX: {cause[0]} "
                "Use tensor operations only, no Python decisions on values (tensor.item(), if tensor)."
            ) from error
    return onnx.ModelProto.FromString(program.model_proto.SerializeToString())


def _example(entry: Input) -> torch.Tensor:
    if entry.kind == "number":
        return torch.zeros(EXAMPLE_ROWS, entry.size)
    shape = (EXAMPLE_ROWS, entry.width) if entry.kind == "words" else (EXAMPLE_ROWS,)
    return torch.ones(shape, dtype=torch.int64)


def _declare_rows(model: onnx.ModelProto) -> None:
    """One name for the batch dimension everywhere, so that a reader sees what belongs together."""
    for entry in [*model.graph.input, *model.graph.output]:
        entry.type.tensor_type.shape.dim[0].dim_param = "rows"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns and logs about its own internals; what matters is checked by parity."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
