"""The files in which the parts of the server speak: what should serve, and what does. They survive every process.

    desired/<workload>.json       by whoever follows aliases or a repository   what should serve
    generations/<number>.json     by the fleet          what a worker process loads (`serving.generation`)
    state/<workload>.json         by the fleet          which version answers
    failed/<workload>.json        by the fleet          the last version that was refused, until another one answers
    swaps.json                    by the fleet          how many versions were served and refused, by workload
    workers.json                  by the fleet          processes: pid, generation, phase, what it loads, memory

Files are written aside and renamed, so a reader never sees half of one. A file that cannot be read is not a file that
is not there: whoever reads hears of it, and goes on with what it knew. Not here: any decision.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from noria.errors import ServiceError

FRESH_NS = 2 * 10**9
"""A folder's time moves in steps; what was written less than this ago may share its time with what comes next."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Desired:
    """What should serve for one workload."""

    workload: str
    version: int | None
    """None: the workload is registered, and no version of it has been champion yet."""
    folder: str = ""
    """The checked bundle on this machine."""
    asked: str = ""
    """Names this request; the worker's answer repeats it."""
    fallback_version: int | None = None
    """What serves when a worker starts anew and cannot load the version."""
    fallback_folder: str = ""
    plain: bool = False
    """No bundle but any `model.onnx`, of a model repository."""
    content: str = ""
    """Names the bundle's content, where a registry that counts from 1 again may use the number anew."""

    def same_as(self, serving: Desired) -> bool:
        """Whether what is asked for is what serves. A bundle is known by its content, a plain file by its mark."""
        if self.plain or serving.plain:
            return (self.asked, self.folder) == (serving.asked, serving.folder)
        return (self.version, self.folder, self.content) == (serving.version, serving.folder, serving.content)


@dataclass(frozen=True)
class State:
    """What came of a request."""

    workload: str
    version: int
    """The version that was asked for."""
    status: Literal["serving", "failed"]
    reason: str
    """Why it failed, as a sentence; empty when it serves."""
    since: str
    """When this version began to answer, or was refused: ISO 8601, UTC."""
    asked: str
    replaced: int | None = None
    """The version that answered until then; None when there was none."""


Record = TypeVar("Record", Desired, State)


def now() -> str:
    """The wall clock as ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write(folder: Path, record: Desired | State) -> None:
    """Replace the workload's file in `folder` in one step. Raises OSError."""
    # What should serve is not known otherwise while MLflow is away; all else is found anew after a power cut, and
    # thousands of plain models would take seconds to sync before the first answer.
    is_safe = isinstance(record, Desired) and not record.plain
    write_file(folder / f"{record.workload}.json", asdict(record), is_safe=is_safe)


def write_file(target: Path, data: object, *, is_safe: bool = True) -> None:
    """Replace a JSON file in one step; a safe one outlives a power cut. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{os.getpid()}.aside")
    with aside.open("w") as file:
        json.dump(data, file)
        if is_safe:
            file.flush()
            os.fsync(file.fileno())
    aside.replace(target)


def remove(folder: Path, workload: str) -> None:
    """Remove the workload's file in `folder`, if there is one."""
    (folder / f"{workload}.json").unlink(missing_ok=True)


def swaps(folder: Path) -> dict[str, dict[str, int]]:
    """By workload, how many versions were served ("serving") and refused ("failed") since this home was made."""
    try:
        found: dict[str, dict[str, int]] = json.loads((folder / "swaps.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def read(folder: Path, kind: type[Record]) -> dict[str, Record]:
    """Every workload's record in `folder`.

    Raises:
        OSError: one of them cannot be read now; nothing is known then, least of all that it is not there.
        ServiceError: one of them is no record.
    """
    found: dict[str, Record] = {}
    for path in _paths(folder):
        with suppress(FileNotFoundError):  # removed meanwhile
            found[path.stem] = _record(path, kind)
    return found


def set_aside(folder: Path, kind: type[Record]) -> None:
    """At a start: rename what is no record, which only damage to the disk makes, for whoever wrote it writes it anew.
    Raises OSError."""
    for path in _paths(folder):
        try:
            _record(path, kind)
        except ServiceError as error:
            logger.error("%s It is renamed to %s.broken.", error, path.name)
            path.rename(path.with_name(f"{path.name}.broken"))


def signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes whenever a file of `folder` is replaced; costs one stat a file. Raises OSError."""
    marks = []
    for path in _paths(folder):
        with suppress(FileNotFoundError):
            status = path.stat()
            marks.append((path.name, status.st_mtime_ns, status.st_ino))
    return tuple(marks)


def written(path: Path) -> int:
    """When a file was last written, or when one of a folder was made, replaced or removed; 0: it is not there. Raises
    OSError."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


class Watched:
    """Folders of such files that are looked at many times a second, and seldom written. Used by one thread."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self._times: list[int] = []
        self._certain = False
        """Nothing can be written any more that would leave the folders' times as they are."""
        self._mark: list[object] = []

    def mark(self) -> list[object]:
        """Changes whenever a file of a folder is replaced; costs one stat a folder while nothing is. Raises OSError."""
        clock, times = time.time_ns(), [written(folder) for folder in self.folders]
        if not self._certain or times != self._times:
            self._mark = [signature(folder) for folder in self.folders]
            self._times, self._certain = times, max(times) < clock - FRESH_NS
        return self._mark


def _record(path: Path, kind: type[Record]) -> Record:
    try:
        return kind(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        sentence = f"{path} is not what the server wrote there ({error}); look at the disk, and start the server again."
        raise ServiceError(sentence) from None


def _paths(folder: Path) -> list[Path]:
    """The records' files, by name. Not with Path.glob, for which what cannot be listed is empty."""
    try:
        return sorted((path for path in folder.iterdir() if path.suffix == ".json"), key=lambda path: path.name)
    except FileNotFoundError:
        return []
