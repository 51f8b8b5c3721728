"""The one place that uses ONNX Runtime: open a session on what this machine has, and score rows with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from noria.errors import SettingsError
from noria.schema import Tensors

Providers = Literal["auto", "cpu", "cuda"]
SCORE = "score"
"""Name of the graph's output: float32 [n], in the target's unit or a probability."""


def available_providers(wanted: Providers = "auto") -> list[str]:
    """ONNX Runtime providers to ask for, best first.

    ONNX Runtime lists CUDA when it was *built* with it and silently falls back when the machine has no GPU, so the
    device itself is probed first.

    Raises:
        SettingsError: `cuda` is wanted and there is no usable GPU.
    """
    gpu = "CUDAExecutionProvider" in ort.get_available_providers() and Path("/dev/nvidiactl").exists()
    if wanted == "cuda" and not gpu:
        raise SettingsError("NORIA_PROVIDERS=cuda, but this machine has no NVIDIA GPU; set it to auto or cpu.")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu and wanted != "cpu" else ["CPUExecutionProvider"]


def open_session(model: Path | bytes, providers: Providers = "auto", threads: int = 1) -> ort.InferenceSession:
    """A session that leaves the other cores alone: `threads` intra-op threads, no spinning.

    Raises:
        SettingsError: CUDA was asked for and the session did not get it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=available_providers(providers))
    if providers == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise SettingsError("NORIA_PROVIDERS=cuda, but ONNX Runtime could not use the GPU; check the CUDA libraries.")
    return session


def score(session: ort.InferenceSession, tensors: Mapping[str, np.ndarray], batch: int = 4096) -> np.ndarray:
    """Scores [n] of raw tensors [n], run in batches of at most `batch` rows."""
    rows = len(next(iter(tensors.values())))
    names = [entry.name for entry in session.get_inputs()]
    parts = [
        session.run([SCORE], {name: tensors[name][start : start + batch] for name in names})[0]
        for start in range(0, rows, batch)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def run_all(session: ort.InferenceSession, tensors: Tensors) -> Tensors:
    """Every output of the graph, by name, for one batch."""
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, tensors), strict=True))
