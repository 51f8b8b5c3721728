"""A loaded version: open it, warm it, prove it, then it never changes.

Two kinds are served the same way. A *workload's* version is a bundle: raw columns in, `score` out, with a schema,
decision bands and a proof. A *plain* model is any ONNX file of a model repository (`NAME/VERSION/model.onnx`): its own
tensors in and out. Not here: which version should serve (`serving.engine`), requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from noria.errors import BundleError
from noria.providers import Providers
from noria.runtime import SCORE, Runner, nodes_by_provider, open_session, placed, provider_of, runner
from registry.bundle import Bundle
from registry.graph import check_file
from registry.proof import ABSOLUTE, RELATIVE
from serving.datatypes import NUMPY, ONNX
from serving.forms import Frame, Head, Kept
from serving.hardware import gpu_options

WARM = (1, 2, 8, 64, 256, 1024)
"""Batch sizes that are run, and must agree with each other, before a model answers. The last is the largest batch."""
SHARED_SECONDS = 0.05
"""A run of this length is as quick per row as a longer one: what is read once a run, the weights, costs less by far."""
COLUMN_TYPES = {"number": "FP32", "integer": "INT64", "string": "BYTES", "text": "BYTES", "timestamp": "INT64"}

Form = tuple[bytes, list[tuple[str, str, bool]]]
"""Of an answer: its JSON but for the values (`serving.forms`); name, datatype and whether as bytes of each of these."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tensor:
    """One input or output: its v2 datatype, and its shape with -1 where any size goes."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """One version, ready to answer. Thread-safe."""

    workload: str
    """Its name, for a plain model too."""
    version: int
    session: ort.InferenceSession
    inputs: tuple[Tensor, ...]
    """What a v2 client may send. A workload: its raw columns, [n]."""
    outputs: tuple[Tensor, ...]
    """What a v2 client gets. A workload: score, action, prediction_id."""
    batched: bool
    """Rows of several requests may share a run: the first dimension of every input and output is free, and counts the
    same rows in all of them."""
    sizes: tuple[int, ...]
    """Batch sizes that were run before it answered, ascending."""
    seconds: tuple[float, ...]
    """How long one run took at each of `sizes`."""
    bundle: Bundle | None = None
    """What a workload's version consists of; None: a plain model."""

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The graph's inputs: of a workload, the columns that the model looks at."""
        return tuple(entry.name for entry in self.session.get_inputs())

    @cached_property
    def gives(self) -> tuple[str, ...]:
        """The graph's outputs."""
        return tuple(entry.name for entry in self.session.get_outputs())

    @cached_property
    def _runner(self) -> Runner:
        return runner(self.session)

    @cached_property
    def most_rows(self) -> int:
        """Rows that one run may hold: the largest batch that was proven."""
        return self.sizes[-1]

    @cached_property
    def shared_rows(self) -> int:
        """Rows that requests may share in one run: no more than take SHARED_SECONDS, for all of them wait for it."""
        return max(1, int(np.interp(SHARED_SECONDS, self.seconds, self.sizes)))

    @cached_property
    def ragged(self) -> bool:
        """Rows may differ in shape: requests share a run only where theirs agree, and runs no line of the log."""
        first = 1 if self.batched else 0
        return any(-1 in tensor.shape[first:] for tensor in (*self.inputs, *self.outputs))

    @cached_property
    def types(self) -> dict[str, str]:
        """The datatypes of `outputs`, by name."""
        return {tensor.name: tensor.datatype for tensor in self.outputs}

    @cached_property
    def heads(self) -> Kept[bytes, Head]:
        """Of requests, by their JSON."""
        return Kept()

    @cached_property
    def frames(self) -> Kept[bytes, Frame]:
        """Of requests all in JSON, by what stands before the values."""
        return Kept()

    @cached_property
    def forms(self) -> Kept[tuple[object, ...], Form]:
        """Of answers, by what is in them (`serving.tensors`)."""
        return Kept()

    @cached_property
    def nodes(self) -> dict[str, int]:
        """How many nodes of the graph run where, by provider, best first: tensorrt, cuda, cpu."""
        return nodes_by_provider(self.session)

    @cached_property
    def provider(self) -> str:
        """Where it runs: the best provider that runs any of its nodes."""
        return provider_of(self.session)

    def expected(self, rows: int) -> float:
        """Seconds that a run of so many rows takes, from what was measured while warming."""
        return float(np.interp(rows, self.sizes, self.seconds))

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The graph's outputs for its inputs, [n, ...] each."""
        wanted = {name: tensors[name] for name in self.reads}
        return dict(zip(self.gives, self._runner(self.gives, wanted), strict=True))


def load(workload: str, version: int, folder: Path, providers: Providers, *, plain: bool = False) -> Model:
    """Open, warm and prove the version that lies in `folder`: a bundle, or with `plain` any `model.onnx`.

    Raises:
        BundleError: it does not open, does not run, or does not give its own proof's scores.
    """
    name = f"Version {version} of {workload}"
    try:
        model = (_load_plain if plain else _load_bundle)(workload, version, folder, providers)
    except Exception as error:  # ONNX Runtime, too, raises a dozen types of its own, and any of them means the same
        raise BundleError(f"{name} cannot be loaded: {_line(error)}") from error
    logger.info("%s runs on %s.", name, placed(model.session))
    return model


def _load_bundle(workload: str, version: int, folder: Path, providers: Providers) -> Model:
    bundle = Bundle.open(folder)
    if bundle.facts.name != workload:
        raise BundleError(f"the bundle was made for the workload '{bundle.facts.name}'.")
    session = open_session(bundle.model, providers, gpu=gpu_options(bundle.model, providers, WARM))
    bundle.proof.check(session, bundle.schema)
    rows = bundle.schema.parse(bundle.proof.records)
    expected = np.asarray(bundle.proof.scores, np.float64)
    outputs = [("score", "FP32"), ("action", "BYTES"), ("prediction_id", "BYTES")]
    model = Model(
        workload, version, session,
        inputs=tuple(Tensor(column.name, COLUMN_TYPES[column.kind], (-1,)) for column in bundle.schema.columns),
        outputs=tuple(Tensor(output, datatype, (-1,)) for output, datatype in outputs),
        batched=True, sizes=WARM, seconds=(0.0,) * len(WARM),
        bundle=bundle,
    )  # fmt: skip
    seconds = []
    for size in WARM:
        chosen = np.arange(size) % len(expected)
        tensors = {name: values[chosen] for name, values in rows.items()}
        found, elapsed = _timed(model, tensors)
        wrong = ~np.isclose(found[SCORE], expected[chosen], rtol=RELATIVE, atol=ABSOLUTE)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise BundleError(
                f"Reference row {chosen[first]} scores {found[SCORE][first]:g} in a batch of {size} rows instead of "
                f"{expected[chosen[first]]:g}: rows of a batch disturb each other in this graph."
            )
        seconds.append(elapsed)
    return _with_seconds(model, WARM, seconds)


def _load_plain(workload: str, version: int, folder: Path, providers: Providers) -> Model:
    path = folder / "model.onnx"
    check_file(path)
    session = open_session(path, providers, gpu=gpu_options(path, providers, WARM))
    inputs, outputs = _tensors(session.get_inputs()), _tensors(session.get_outputs())
    free = [tensor.shape[:1] == (-1,) for tensor in (*inputs, *outputs)]
    model = Model(workload, version, session, inputs, outputs, batched=all(free), sizes=(1,), seconds=(0.0,))
    sizes, seconds = WARM if model.batched else (1,), []
    # Zeros, because nothing is known of the values: a graph that does not run on them may still run on real ones.
    proven = []
    for size in sizes:
        tensors = {tensor.name: _zeros(tensor, size) for tensor in inputs}
        try:
            found, elapsed = _timed(model, tensors)
        except Exception:
            break
        proven.append(size)
        seconds.append(elapsed)
        if model.batched and not even(found, size):
            return _with_seconds(replace(model, batched=False), (1,), seconds[:1])
    if model.batched and _counts_values(model):
        return _with_seconds(replace(model, batched=False), (1,), seconds[:1] or (0.0,))
    return _with_seconds(model, proven or (1,), seconds or (0.0,))


def even(outputs: Mapping[str, np.ndarray], rows: int) -> bool:
    """Whether every output has as many rows as went in. What a graph calls its dimensions does not tell: a detector
    has boxes, and an exporter a new name for each."""
    return not [array for array in outputs.values() if array.shape[:1] != (rows,)]


def _counts_values(model: Model) -> bool:
    """Whether the rows that come out are other than went in where one is all zeros and one all ones."""
    tensors = {tensor.name: _zeros(tensor, 2) for tensor in model.inputs}
    for tensor in model.inputs:
        tensors[tensor.name][1] = "1" if tensor.datatype == "BYTES" else 1
    try:
        return not even(model.run(tensors), 2)
    except Exception:  # it does not take these values, which tells nothing of others
        return False


def _tensors(entries: Sequence[Any]) -> tuple[Tensor, ...]:
    found = []
    for entry in entries:
        if entry.type not in ONNX:
            raise BundleError(f"'{entry.name}' is {entry.type}; only dense tensors of the v2 datatypes can be served.")
        shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in entry.shape)
        found.append(Tensor(entry.name, ONNX[entry.type], shape))
    return tuple(found)


def _zeros(tensor: Tensor, size: int) -> np.ndarray:
    first, *rest = tensor.shape or (None,)
    shape = [] if first is None else [size if first == -1 else first, *(1 if one == -1 else one for one in rest)]
    return np.full(shape, "" if tensor.datatype == "BYTES" else 0, NUMPY[tensor.datatype])


def _timed(model: Model, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """The outputs of a first run, and the seconds of a second one."""
    found = model.run(tensors)
    began = time.perf_counter()
    model.run(tensors)
    return found, time.perf_counter() - began


def _with_seconds(model: Model, sizes: Sequence[int], seconds: Sequence[float]) -> Model:
    # A larger batch is never taken to be quicker than a smaller one: one run is measured, on a machine that has others.
    return replace(model, sizes=tuple(sizes), seconds=tuple(np.maximum.accumulate(seconds).tolist()))


def _line(error: Exception) -> str:
    told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    line = " ".join(told.split())[:400] or type(error).__name__
    return line if line.endswith(".") else f"{line}."
