"""The one place that runs ONNX Runtime: open a session on what this machine has, and score rows with it.

Where a GPU is asked for and not there, that is an error; what a session really runs on is told by `nodes_by_provider`.
Not here: what there is to run on (`noria.providers`), what a GPU is and how it is set up (`noria.gpu`).
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from noria.errors import SettingsError
from noria.gpu import GpuOptions, cuda_options, engine_cache, find_gpu, tensorrt_options, tensorrt_version
from noria.providers import NAMES, ONNX_RUNTIME, Providers, go_on_without, require
from noria.schema import Tensors

Runner = Callable[[Sequence[str], Mapping[str, np.ndarray]], list[np.ndarray]]
"""What gives a session's named outputs for one batch."""
SCORE = "score"
"""Name of the graph's output: float32 [n], in the target's unit or a probability."""
ANY_GPU = GpuOptions()

logger = logging.getLogger(__name__)


def open_session(
    model: Path | bytes, providers: Providers = "auto", threads: int = 1, *, gpu: GpuOptions = ANY_GPU
) -> ort.InferenceSession:
    """A session that leaves the other cores alone: `threads` intra-op threads, no spinning.

    Raises:
        SettingsError: a GPU was asked for and the session did not get it.
    """
    chain = require(providers, gpu.device)
    if chain == ["cpu"]:
        return _session(model, {"cpu": {}}, threads)
    try:
        session = _on_gpu(model, chain, threads, gpu)
    except SettingsError as error:
        if providers != "auto":
            raise
        go_on_without(str(error))
        return _session(model, {"cpu": {}}, threads)
    return session


def nodes_by_provider(session: ort.InferenceSession) -> dict[str, int]:
    """How many nodes of the graph run where, by our names, best provider first: what a session really uses.

    A subgraph that TensorRT took counts with the nodes that it had.
    """
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        found[NAMES.get(part.ep_name, part.ep_name)] += len(part.get_nodes())
    return dict(sorted(found.items(), key=lambda entry: [*ONNX_RUNTIME, entry[0]].index(entry[0])))


def provider_of(session: ort.InferenceSession) -> str:
    """The best provider that runs any of the session's nodes: tensorrt, cuda or cpu."""
    return next(iter(nodes_by_provider(session)), "cpu")


def placed(session: ort.InferenceSession) -> str:
    """Where the nodes run, for a log or a page: "cuda (31 nodes), cpu (44 nodes)"."""
    return ", ".join(f"{name} ({count} nodes)" for name, count in nodes_by_provider(session).items()) or "cpu"


def run(session: ort.InferenceSession, names: Sequence[str], tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The named outputs for one batch, on the CPU. Thread-safe.

    Where the graph begins or ends on a GPU, inputs and outputs are bound: each input is copied once to where its first
    reader runs, outputs stay on the device until one copy brings all of them back. A graph of strings is run plainly:
    ONNX Runtime binds no strings from Python.
    """
    return runner(session)(list(names), dict(tensors))


def runner(session: ort.InferenceSession) -> Runner:
    """`run` of one session, with the choice made once: where the graph lies does not change."""
    infos = (*session.get_input_memory_infos(), *session.get_output_memory_infos())
    if all(_device(info.name) == "cpu" for info in infos) or _strings(session):
        plain: Runner = session.run
        return plain
    return partial(run_bound, session)


def run_bound(
    session: ort.InferenceSession, names: Sequence[str], tensors: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """As `run`, always with bound inputs and outputs; numbers only."""
    binding = session.io_binding()  # one a run: a binding is not thread-safe, and making one costs microseconds
    for name, values in tensors.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values)))
    places = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
    devices = {entry.name: (_device(info.name), info.device_id) for entry, info in places}
    for name in names:
        binding.bind_output(name, *devices[name])
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    copied: list[np.ndarray] = binding.copy_outputs_to_cpu()
    return copied


def score(session: ort.InferenceSession, tensors: Mapping[str, np.ndarray], batch: int = 4096) -> np.ndarray:
    """Scores [n] of raw tensors [n], run in batches of at most `batch` rows."""
    rows = len(next(iter(tensors.values())))
    names = [entry.name for entry in session.get_inputs()]
    parts = [
        run(session, [SCORE], {name: tensors[name][start : start + batch] for name in names})[0]
        for start in range(0, rows, batch)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def run_all(session: ort.InferenceSession, tensors: Tensors) -> Tensors:
    """Every output of the graph, by name, for one batch."""
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, run(session, names, tensors), strict=True))


def _on_gpu(model: Path | bytes, chain: Sequence[str], threads: int, gpu: GpuOptions) -> ort.InferenceSession:
    options: dict[str, dict[str, str]] = {"cuda": cuda_options(gpu), "cpu": {}}
    if chain[0] == "tensorrt":
        options = {"tensorrt": tensorrt_options(gpu, _engines(model, gpu)), **options}
    try:
        session = _session(model, options, threads)
    except Exception as error:  # a dozen types of its own, and a RuntimeError where a library is missing
        if gpu.profile and chain[0] == "tensorrt":
            # Named tensors that the optimiser has renamed: without names TensorRT learns the range while warming.
            logger.warning("TensorRT refuses the profile (%s); going on without.", " ".join(str(error).split())[:300])
            return _on_gpu(model, chain, threads, GpuOptions(gpu.device, gpu.memory_mb, gpu.engines))
        raise SettingsError(f"ONNX Runtime cannot use {chain[0]}: {' '.join(str(error).split())[:400]}") from error
    if ONNX_RUNTIME[chain[0]] not in session.get_providers():
        raise SettingsError(
            f"There is a GPU, but ONNX Runtime could not use {chain[0]} and fell back to "
            f"{', '.join(session.get_providers())}; install noria[{chain[0]}], which brings CUDA's libraries."
        )
    return session


def _session(model: Path | bytes, providers: Mapping[str, Mapping[str, str]], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    source = model if isinstance(model, bytes) else str(model)
    asked = [(ONNX_RUNTIME[name], dict(chosen)) for name, chosen in providers.items()]
    # Its own fallback prints to standard output and goes on elsewhere, even in the middle of a run.
    return ort.InferenceSession(source, options, providers=asked, enable_fallback=0)


def _engines(model: Path | bytes, gpu: GpuOptions) -> Path | None:
    if gpu.engines is None:
        return None
    content = model if isinstance(model, bytes) else model.read_bytes()
    sha = hashlib.sha256(content).hexdigest()
    place = engine_cache(
        gpu.engines, find_gpu(gpu.device), sha, tensorrt=tensorrt_version(), runtime=str(ort.__version__)
    )
    place.mkdir(parents=True, exist_ok=True)
    return place


def _strings(session: ort.InferenceSession) -> bool:
    return any(entry.type == "tensor(string)" for entry in (*session.get_inputs(), *session.get_outputs()))


def _device(memory: str) -> str:
    """ONNX Runtime's name of a memory ("Cuda", "CudaPinned", "Cpu") as a device to bind to."""
    return "cuda" if memory == "Cuda" else "cpu"
