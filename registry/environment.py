"""What a version was made with: code revision, installed packages, Python. Kept in the bundle, shown to people."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import distributions
from typing import Any

SHOWN = ("mlflow", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "pyarrow", "ray", "scikit-learn", "torch")


def environment() -> dict[str, Any]:
    """`revision` (git commit of the current folder, "" outside one; "-dirty" marks uncommitted changes), `lock`
    (SHA-256 over every installed package and version), `packages` (the ones that matter), `python`, `platform`."""
    installed = {found.name.lower(): found.version for found in distributions() if found.name}
    lock = "\n".join(sorted(f"{name}=={version}" for name, version in installed.items()))
    return {
        "revision": _revision(),
        "lock": hashlib.sha256(lock.encode()).hexdigest(),
        "packages": {name: installed[name] for name in SHOWN if name in installed},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _revision() -> str:
    commit = _git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
