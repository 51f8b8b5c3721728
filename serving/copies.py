"""Bundles that came over the wire, as they lie on a replica's node: `<workload>/<version>-<digest>`.

The replicas of a node share them. What nobody asks for any more goes; whoever needs it again gets it again. Not here:
which version should serve (`serving.rollout`), bundles that were fetched from MLflow (`serving.sweep`).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from noria.errors import BundleError
from registry.manifest import digest_of, verify

YOUNG_SECONDS = 600
"""What was written or loaded more recently stays: another replica of the node may have been told otherwise, and be at
it."""

logger = logging.getLogger(__name__)


def copy_of(bundles: Path, workload: str, version: int | None, digest: str) -> Path:
    """Where the copy of a version lies."""
    return bundles / workload / f"{version}-{digest[:16]}"


def holds(folder: Path, digest: str) -> bool:
    """Whether the folder holds the bundle with that manifest; its files are verified when it is loaded."""
    return digest_of(folder) == digest


def found(copy: Path, digest: str) -> bool:
    """Whether there is such a copy; it counts as used now."""
    with suppress(OSError):
        os.utime(copy)
    return holds(copy, digest)


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """A bundle's files, aside and renamed; what another replica of the node was quicker to put there stays."""
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    for name, content in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(content)
    try:
        aside.rename(folder)
    except OSError:  # something is there
        if digest_of(folder) != digest_of(aside):
            with suppress(OSError):
                _remove(folder)
                aside.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def drop_damaged(copy: Path) -> None:
    """Remove a copy that is not whole, so that the next try gets it anew. A whole one may be what another replica of
    the node loads just now."""
    try:
        verify(copy)
    except (BundleError, OSError):
        with suppress(OSError):
            _remove(copy)


def sweep(bundles: Path, wanted: Collection[Path], young: float = YOUNG_SECONDS) -> None:
    """Remove copies that are neither wanted nor were used lately, and what a replica that was killed left half."""
    for copy in bundles.glob("*/*"):
        with suppress(OSError):  # another replica of the node was quicker
            if copy in wanted or time.time() - copy.stat().st_mtime <= young:
                continue
            _remove(copy)
            logger.info("The copy %s is not needed any more and was removed.", copy)


def _remove(copy: Path) -> None:
    """Out of the way first, so that nobody finds half of it."""
    aside = copy.rename(copy.with_name(f".gone-{uuid.uuid4().hex}"))
    shutil.rmtree(aside, ignore_errors=True)
