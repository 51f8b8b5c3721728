"""The NVIDIA GPU of this machine: is there one that computes, what is it, and how ONNX Runtime should use it.

The driver itself is asked (`libcuda`), because ONNX Runtime names CUDA when it was *built* with it and goes on without
a word where there is no GPU. Not here: sessions (`noria.runtime`).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from noria.errors import SettingsError

DRIVER = "libcuda.so.1"
TENSORRT = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""What ONNX Runtime's TensorRT provider is linked against, in the order in which they need each other."""
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_VERSION = Path("/sys/module/nvidia/version")
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    capability: str
    """Compute capability, for example "9.0"."""
    memory: int
    """Bytes."""
    driver: str
    """The driver's version; where the system does not tell it, the CUDA version that it supports."""
    cuda: int
    """Newest CUDA version that the driver supports: 13000 is 13.0."""


@dataclass(frozen=True)
class GpuOptions:
    """How a GPU is used, where one is."""

    device: int = 0
    """Which GPU, counted as CUDA counts them (CUDA_VISIBLE_DEVICES applies)."""
    memory_mb: int = 0
    """Most memory that one session's arena may take; 0: no limit."""
    engines: Path | None = None
    """Folder of TensorRT's built engines; None: they are built again at every load, which takes minutes."""
    profile: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    """TensorRT's: tensor name to smallest, usual and largest shape ("1x68"); empty: it learns the range in warming."""


def find_gpu(device: int = 0, library: str = DRIVER) -> Gpu:
    """The GPU with that number.

    Raises:
        SettingsError: there is no driver, no such GPU, or it does not answer; says which.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        raise SettingsError(f"This machine has no NVIDIA driver ({library} is not found).") from None
    _ask(driver, "cuInit", 0)
    count, number = ctypes.c_int(), ctypes.c_int()
    _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not 0 <= device < count.value:
        raise SettingsError(f"There is no GPU number {device}; CUDA sees {count.value}, counted from 0.")
    _ask(driver, "cuDeviceGet", ctypes.byref(number), device)
    name, memory, supported = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t(), ctypes.c_int()
    _ask(driver, "cuDeviceGetName", name, _NAME_BYTES, number)
    _ask(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), number)
    _ask(driver, "cuDriverGetVersion", ctypes.byref(supported))
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, number)
        parts.append(str(value.value))
    version = _VERSION.read_text().strip() if _VERSION.exists() else f"cuda-{supported.value}"
    return Gpu(name.value.decode(errors="replace"), ".".join(parts), memory.value, version, supported.value)


def check_driver(gpu: Gpu, built_for: str) -> None:
    """Refuse a driver that is older than the CUDA which ONNX Runtime was built for ("13.0"); "" is no CUDA build.

    Raises:
        SettingsError: with both versions.
    """
    if not built_for:
        raise SettingsError("The installed ONNX Runtime is built without CUDA; install onnxruntime-gpu.")
    major = int(built_for.split(".")[0])
    if gpu.cuda < major * 1000:
        raise SettingsError(
            f"The driver of {gpu.name} ({gpu.driver}) supports CUDA {gpu.cuda // 1000}.{gpu.cuda % 1000 // 10}, and "
            f"ONNX Runtime was built for CUDA {built_for}; update the driver."
        )


def tensorrt_version() -> str:
    """Load TensorRT's libraries, from its wheel or from the system; its version ("101303" is 10.13.3).

    Raises:
        SettingsError: they are not there.
    """
    found = importlib.util.find_spec("tensorrt_libs")
    folders = [Path(place) for place in found.submodule_search_locations or ()] if found else []
    loaded = []
    for name in TENSORRT:
        wheel = next((str(folder / name) for folder in folders if (folder / name).exists()), name)
        try:
            loaded.append(ctypes.CDLL(wheel, mode=ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise SettingsError(
                f"TensorRT's library {name} cannot be loaded ({error}); install noria[tensorrt], or use cuda."
            ) from None
    return str(loaded[0].getInferLibVersion())


def engine_cache(root: Path, gpu: Gpu, model_sha: str, *, tensorrt: str, runtime: str) -> Path:
    """Folder of the engines of one model on one kind of machine: an engine is right for nothing else.

    TensorRT checks some of this when it reads an engine, and a wrong one is at best built anew at each load.
    """
    key = "\n".join((gpu.name, gpu.capability, gpu.driver, tensorrt, runtime, model_sha))
    name = re.sub(r"[^a-z0-9]+", "-", f"{gpu.name} sm{gpu.capability}".lower()).strip("-")
    return root / name / hashlib.sha256(key.encode()).hexdigest()[:32]


def cuda_options(options: GpuOptions) -> dict[str, str]:
    """Options of ONNX Runtime's CUDA provider."""
    chosen = {
        "device_id": str(options.device),
        "arena_extend_strategy": "kSameAsRequested",  # a server holds several models: no doubling beyond need
        "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE would search again at every new batch size
        "do_copy_in_default_stream": "1",  # copies on a stream of their own may pass the run that writes
        "use_tf32": "0",  # its 10 bits of mantissa are coarser than the proof allows
    }
    return chosen | ({"gpu_mem_limit": str(options.memory_mb * 2**20)} if options.memory_mb else {})


def tensorrt_options(options: GpuOptions, cache: Path | None) -> dict[str, str]:
    """Options of ONNX Runtime's TensorRT provider; `cache` is what `engine_cache` named."""
    chosen = {"device_id": str(options.device), "trt_fp16_enable": "0", "trt_int8_enable": "0"}
    if cache is not None:
        chosen |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache.parent),  # measured kernel times serve every model on this GPU
        }
    for index, end in enumerate(("min", "opt", "max")):
        if options.profile:
            shapes = ",".join(f"{name}:{shape[index]}" for name, shape in options.profile.items())
            chosen[f"trt_profile_{end}_shapes"] = shapes
    return chosen


def _ask(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(driver, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        said = text.value.decode(errors="replace") if text.value else "no explanation"
        raise SettingsError(f"The NVIDIA driver refuses {function} with code {code} ({said}).")
