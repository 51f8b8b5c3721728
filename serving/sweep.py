"""Fetched bundles that nobody names any more go from the disk. Not here: which are named (`serving.reconcile`)."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

KEEP = 2
"""Newest versions of each workload that stay whether they are named or not."""
YOUNG_SECONDS = 600
"""What was fetched more recently stays: a flow may be reading it."""

logger = logging.getLogger(__name__)


def sweep(bundles: Path, named: Mapping[str, Collection[int]], young: float = YOUNG_SECONDS) -> list[Path]:
    """Remove bundles `<workload>/<number>` that are neither named, nor among the newest, nor just fetched.

    Returns what was removed.
    """
    removed = []
    for left in bundles.glob("*/.gone-*"):  # of a removal that did not come to its end
        shutil.rmtree(left, ignore_errors=True)
    for workload in sorted(path for path in bundles.glob("*") if path.is_dir()):
        numbers = sorted(int(path.name) for path in workload.glob("*") if path.name.isdigit())
        for number in numbers[:-KEEP]:
            target = workload / str(number)
            if number not in named.get(workload.name, ()) and time.time() - target.stat().st_mtime > young:
                removed += [target] if _remove(target) else []
    return removed


def _remove(target: Path) -> bool:
    """Aside first, so that nobody finds half of it; not while somebody fetches it."""
    aside = target.with_name(f".gone-{target.name}")
    try:
        with FileLock(target.parent / f".{target.name}.lock", timeout=0):
            target.rename(aside)
    except Timeout:
        return False
    except OSError as error:  # the others may still go
        logger.warning("The bundle %s is not needed any more, and could not be removed: %s", target, error)
        return False
    shutil.rmtree(aside, ignore_errors=True)
    logger.info("The bundle %s is not needed any more and was removed.", target)
    return True
