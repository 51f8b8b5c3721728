"""A table in a folder, brought onto the disk itself: Delta Lake's writer leaves that to the system, which takes its
time, and a power cut before then takes the rows. Not here: which tables (`noria.lake`).
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""What a file system says that syncs no folders, and one where a folder above is another's."""


def commit_file(table: Path, version: int) -> Path:
    """The file that a version of the table consists of, besides its rows."""
    return table / "_delta_log" / f"{version:020}.json"


def settle(table: Path, after: int, last: int) -> int:
    """Sync the versions behind `after`, up to `last` or whatever there is behind it; returns the last one."""
    version = after
    while version < last or commit_file(table, version + 1).exists():
        version += 1
        with suppress(FileNotFoundError):  # an old one may have been cleaned away
            _settle(table, commit_file(table, version))
    if version > after:
        log = table / "_delta_log"
        with suppress(FileNotFoundError):
            _sync(log / "_last_checkpoint")
        for folder in (log, table, *(table.parents[:3] if after < 0 else ())):
            _sync_folder(folder)
    return version


def _settle(table: Path, path: Path) -> None:
    actions = [json.loads(line) for line in path.read_bytes().splitlines()]
    added = [table / unquote(action["add"]["path"]) for action in actions if "add" in action]
    for each in (*added, path.with_suffix(".checkpoint.parquet"), path):
        with suppress(FileNotFoundError):  # rows that were compacted since; a checkpoint is not made of every version
            _sync(each)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
