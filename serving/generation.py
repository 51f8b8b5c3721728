"""A generation: everything that one worker process serves, fixed when it starts and never changed while it lives.

A new version of one workload makes a new generation, and a new generation makes new processes. Each lies in
`generations/<number>.json`. Not here: processes (`serving.supervise`), and when there is a new one (`serving.fleet`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from noria.errors import ServiceError
from serving.state import Desired, write_file


@dataclass(frozen=True)
class Generation:
    """What a worker process serves."""

    number: int
    entries: Mapping[str, Desired] = field(default_factory=dict)
    """By workload, the version to load."""
    missing: tuple[str, ...] = ()
    """Workloads that should serve, and of which nothing can be loaded."""

    def changed(self, number: int, workload: str, entry: Desired | None) -> Generation:
        """The generation that follows when one workload gets another version, or (None) is gone."""
        entries = {name: other for name, other in self.entries.items() if name != workload}
        if entry is not None:
            entries[workload] = entry
        return Generation(number, entries, tuple(name for name in self.missing if name != workload))

    def without(self, number: int, workload: str) -> Generation:
        """The generation that is left when a workload's version cannot be loaded: its fallback, or it is missing."""
        entry = self.entries[workload]
        if entry.fallback_version is not None:
            back = Desired(workload, entry.fallback_version, entry.fallback_folder, plain=entry.plain)
            return self.changed(number, workload, back)
        left = self.changed(number, workload, None)
        return Generation(number, left.entries, (*left.missing, workload))


def path_of(folder: Path, number: int) -> Path:
    """The file of a generation in the server's `folder`."""
    return folder / "generations" / f"{number}.json"


def write(folder: Path, generation: Generation) -> Path:
    """Write a generation's file, once, for what it loads never changes: a worker that dies while the disk is full is
    replaced all the same. Returns where. Raises OSError."""
    path = path_of(folder, generation.number)
    if not path.exists():
        write_file(path, asdict(generation))
    return path


def read(path: Path) -> Generation:
    """A generation from its file. Raises ServiceError when it is not one."""
    try:
        data = json.loads(path.read_bytes())
        entries = {name: Desired(**entry) for name, entry in data["entries"].items()}
        return Generation(int(data["number"]), entries, tuple(data["missing"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ServiceError(f"{path} is not readable as a generation ({error}); start the server again.") from None


def numbers(folder: Path) -> list[int]:
    """The numbers of all generations on disk, ascending."""
    return sorted(int(path.stem) for path in (folder / "generations").glob("*.json") if path.stem.isdigit())


def prune(folder: Path, keep: Collection[int]) -> None:
    """Remove the files of generations that no process serves any more."""
    for number in numbers(folder):
        if number not in keep:
            path_of(folder, number).unlink(missing_ok=True)
