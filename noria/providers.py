"""Where models may run on this machine: ONNX Runtime's execution providers, and whether what is asked for is there.

A process that only asks, as the one that starts the workers does, loads ONNX Runtime only where there is a GPU. Not
here: sessions (`noria.runtime`), the GPU itself (`noria.gpu`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from functools import cache
from pathlib import Path
from typing import Literal

from noria.errors import SettingsError
from noria.gpu import check_driver, find_gpu, tensorrt_version
from noria.variables import export

Providers = Literal["auto", "cpu", "cuda", "tensorrt"]
NAMES = {
    "TensorrtExecutionProvider": "tensorrt",
    "CUDAExecutionProvider": "cuda",
    "CPUExecutionProvider": "cpu",
}
"""ONNX Runtime's names and ours, best first."""
ONNX_RUNTIME = {ours: theirs for theirs, ours in NAMES.items()}
DEVICE = Path("/dev/nvidiactl")
"""There where a GPU is: `auto` says why it goes without one only then."""

logger = logging.getLogger(__name__)


def require(wanted: Providers, device: int = 0) -> list[str]:
    """Our names of the providers to ask for, best first; called at start, it says at once what is missing.

    Raises:
        SettingsError: `cuda` or `tensorrt` is wanted, and this machine cannot.
    """
    if wanted == "cpu":
        return ["cpu"]
    try:
        _usable(wanted, device)
    except SettingsError as error:
        if wanted != "auto":
            raise SettingsError(
                f"NORIA_PROVIDERS={wanted} is not possible here: {error} Set it to auto or cpu to go without."
            ) from None
        if DEVICE.exists():
            go_on_without(str(error))
        return ["cpu"]
    return ["tensorrt", "cuda", "cpu"] if wanted == "tensorrt" else ["cuda", "cpu"]


@cache
def _usable(wanted: Providers, device: int) -> None:
    """Find the GPU and load the libraries, once a process. Raises SettingsError."""
    gpu = find_gpu(device)
    import onnxruntime as ort

    check_driver(gpu, getattr(ort, "cuda_version", ""))
    if importlib.util.find_spec("nvidia"):  # NVIDIA's wheels: the loader does not look there by itself
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
        if said.getvalue().strip():
            logger.warning("CUDA's libraries: %s", " ".join(said.getvalue().split()))
    if wanted == "tensorrt":
        # TensorRT's builder takes TF32 unless told otherwise, which is coarser than the proof allows.
        export(NVIDIA_TF32_OVERRIDE="0")
        tensorrt_version()


@cache
def go_on_without(sentence: str) -> None:
    """Warn, once a process for each reason, that `auto` takes the CPU."""
    logger.warning("%s Going on with the CPU.", sentence)
