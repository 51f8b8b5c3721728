"""The numbers of a node's replicas that ended: who lives, and the sum of those that do not.

    metrics/<source>.alive    locked by the replica while it lives

A replica that only rests (a paused process, a full disk) keeps its lock, and its numbers stay its own. Not here: the
sum and its files (`serving.tally`).
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from serving import tally


def attend(folder: Path, source: str) -> IO[bytes]:
    """Say that a source lives, before it writes its numbers, until the file is closed or its process has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source}.alive"
    while True:
        file = path.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # taken for one that was left, between the two steps


def retire_ended(folder: Path) -> None:
    """Add the numbers of the sources that ended to their sum. One process of a node calls it. Raises OSError."""
    # First: a source that has a file has had its lock since before.
    sources = {path.stem for path in folder.glob("*.json")} - {tally.RETIRED}
    tally.fold(folder, [source for source in sources if _gone(folder / f"{source}.alive")])
    for path in folder.glob("*.alive"):
        _gone(path)
    for path in folder.glob("*.aside"):
        if not path.with_suffix(".alive").exists():
            path.unlink(missing_ok=True)


def _gone(path: Path) -> bool:
    """Whether nobody holds the lock; then its file goes."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
