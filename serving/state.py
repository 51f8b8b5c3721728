"""The files in which the parts of the server speak: what should serve, and what does. They survive every process.

    desired/<workload>.json       by whoever follows aliases or a repository   what should serve
    generations/<number>.json     by the fleet          what a worker process loads (`serving.generation`)
    state/<workload>.json         by the fleet          which version answers
    failed/<workload>.json        by the fleet          the last version that was refused, until another one answers
    swaps.json                    by the fleet          how many versions were served and refused, by workload
    workers.json                  by the fleet          processes: pid, generation, phase, what it loads, memory

Files are written aside and renamed, so a reader never sees half of one. Not here: any decision.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar


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
    """Replace the workload's file in `folder` in one step."""
    write_file(folder / f"{record.workload}.json", asdict(record))


def write_file(target: Path, data: object) -> None:
    """Replace a JSON file in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{os.getpid()}.aside")
    with aside.open("w") as file:
        json.dump(data, file)
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
    except (OSError, ValueError):
        return {}
    return found


def read(folder: Path, kind: type[Record]) -> dict[str, Record]:
    """Every workload's record in `folder`; a file that is not one is passed over."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
            found[path.stem] = kind(**data)
        except (OSError, ValueError, TypeError):
            continue
    return found


def signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes whenever a file of `folder` is replaced; costs one stat a file."""
    marks = []
    for path in sorted(folder.glob("*.json")):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        marks.append((path.name, status.st_mtime_ns, status.st_ino))
    return tuple(marks)
