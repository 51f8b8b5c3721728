"""Bundles that came over the wire, as they lie on a replica's node: `<workload>/<version>-<digest>`.

The replicas of a node share them. What nobody asks for any more goes; whoever needs it again gets it again. Not here:
which version should serve (`serving.rollout`), bundles that were fetched from MLflow (`serving.sweep`).
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from registry.manifest import MANIFEST


def digest_of(folder: Path) -> str:
    """SHA-256 of a bundle's manifest, which holds those of its files; empty when there is none."""
    path = folder / MANIFEST
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def holds(folder: Path, digest: str) -> bool:
    """Whether the folder holds the bundle with that manifest; its files are verified when it is loaded."""
    return digest_of(folder) == digest


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """A bundle's files, aside and renamed; another replica of the node may write the same."""
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    for name, content in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:  # another replica was quicker
        shutil.rmtree(aside, ignore_errors=True)
