"""The files through which the parent and the shadow process speak, and what pages and commands read.

    shadow/asked.json    written by the parent    which challengers should shadow, and how large a share
    shadow/state.json    written by the process   what it made of each, and its running counts
    shadow/status.json   written by the parent    both together, with what was dropped: for people

Files are written aside and renamed. Not here: any decision.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar


@dataclass(frozen=True)
class Ask:
    """A challenger that should shadow."""

    version: int
    folder: str
    """Its checked bundle on this machine."""
    share: float
    """Share of the answered rows that it scores, 0 to 1."""
    asked: str
    """Names this request: the same version asked for anew is loaded anew."""


@dataclass(frozen=True)
class Reached:
    """What the shadow process made of an ask. Counts are those of this ask."""

    version: int
    asked: str
    status: Literal["loading", "shadowing", "failed"]
    reason: str = ""
    """Why it failed, as a sentence."""
    since: str = ""
    """When it began to shadow, or failed: ISO 8601, UTC."""
    rows: int = 0
    """Rows scored."""
    agreed: int = 0
    """Rows where both chose the same action (a workload without actions: all)."""
    difference: float = 0.0
    """Sum of |challenger's score - champion's|."""
    errors: int = 0
    """Rows that it could not answer."""
    error: str = ""
    """The last of them, as a sentence."""
    runs: Sequence[float] = ()
    """How long its runs took: of each bucket of `serving.families.SHORT_SECONDS` how many, those above, the sum."""
    last: Mapping[str, int] = field(default_factory=dict)
    """The number of the last segment of each writer that is counted here, those of the newest writers."""


@dataclass(frozen=True)
class Status:
    """How the shadow of one workload stands."""

    version: int
    share: float
    status: Literal["loading", "shadowing", "failed"]
    sentence: str
    """What the version's tag says."""
    since: str = ""
    asked: str = ""
    rows: int = 0
    agreement: float | None = None
    """Share of rows where both chose the same action; None before the first row."""
    difference: float | None = None
    """Mean |challenger's score - champion's|."""
    errors: int = 0
    error: str = ""
    dropped: int = 0
    """Rows that were shed because the challenger did not keep up."""
    waiting: int = 0
    restarts: int = 0
    """How often the shadow's process ended by itself."""


Record = TypeVar("Record", Ask, Reached, Status)


def now() -> str:
    """The wall clock as ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write(path: Path, records: Mapping[str, Record]) -> None:
    """Replace the file in one step; `records` by workload."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.aside")
    aside.write_text(json.dumps({name: asdict(record) for name, record in records.items()}))
    aside.replace(path)


def read(path: Path, kind: type[Record]) -> dict[str, Record]:
    """By workload; empty when there is no such file, and without the entries that are not of this kind. Raises OSError
    where it cannot be read now: nothing is known then, least of all that there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    found: dict[str, Record] = {}
    for name, data in content.items():
        try:
            found[name] = kind(**data)
        except TypeError:
            continue
    return found
