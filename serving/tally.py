"""The workers' numbers as files, and their sum: any worker can answer for all of them, those that ended included.

    metrics/<source>.json    one worker's numbers, written aside and renamed; a source is the name of one process's life
    metrics/retired.json     the sum of the workers that ended, and which ones it holds

A worker's file goes into the sum by two steps that a kill may part: the sum is replaced, then the file is removed. The
sum names what it holds, so neither a reader nor the next try counts a file twice. Not here: what is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from serving.families import BY_NAME, FAMILIES, Numbers, add, empty

RETIRED = "retired"
STALE_SECONDS = 10.0
"""A file that was not renewed for so long is one of a worker that was killed: its counters count, its gauges do not."""
MOST_FOLDED = 256
"""Sources that the sum remembers; only the last few can still have a file."""
MOST_VERSIONS = 32
"""Versions of a workload whose counters the sum keeps. Older series end, as those of a removed target do."""

LASTING = tuple(family for family in FAMILIES if family.lasting)


@dataclass
class Tally:
    """One file."""

    source: str
    numbers: Numbers
    at: float = field(default_factory=time.time)
    """When they were read off, seconds since 1970."""
    ended: bool = False
    """The process is about to end: its gauges tell nothing any more."""
    folded: tuple[str, ...] = ()
    """Sources whose numbers these hold, of the sum of the ended ones."""

    @property
    def live(self) -> bool:
        """Its gauges still tell what is."""
        return not self.ended and time.time() - self.at < STALE_SECONDS


def write(folder: Path, tally: Tally) -> None:
    """Replace the file of a source in one step. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "source": tally.source, "at": tally.at, "ended": tally.ended, "folded": tally.folded,
        "numbers": {name: list(series.items()) for name, series in tally.numbers.items()},
    }  # fmt: skip
    aside = folder / f"{tally.source}.aside"
    aside.write_bytes(orjson.dumps(content))
    aside.replace(folder / f"{tally.source}.json")


def read(path: Path) -> Tally | None:
    """A file's content; None when it is not there, or is none of ours."""
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
        numbers = {
            name: {tuple(labels): values for labels, values in series}
            for name, series in content["numbers"].items()
            if name in BY_NAME
        }
        return Tally(content["source"], numbers, content["at"], content["ended"], tuple(content["folded"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def total(folder: Path | None, own: Tally) -> Numbers:
    """The numbers of all workers: this one's as they are, the others' as they last wrote them."""
    found = empty()
    add(found, own.numbers)
    if folder is None:
        return found
    others = [read(path) for path in folder.glob("*.json") if path.stem not in (own.source, RETIRED)]
    # Last: a file that was gone already when it was looked for is in the sum by now, and never in neither.
    retired = read(folder / f"{RETIRED}.json") or Tally(RETIRED, {}, ended=True)
    for other in others:
        if other is not None and other.source not in retired.folded:
            add(found, other.numbers, FAMILIES if other.live else LASTING)
    add(found, retired.numbers, LASTING)
    return found


def retire(folder: Path, alive: set[str]) -> None:
    """Add the files of sources that are not `alive` to the sum of the ended ones, and remove them. Raises OSError.

    One process of a home calls it, and names itself among the alive if it counts too.
    """
    fold(folder, {path.stem for path in folder.glob("*.json")} - alive - {RETIRED})
    for path in folder.glob("*.aside"):
        if path.stem not in alive:
            path.unlink(missing_ok=True)


def fold(folder: Path, ended: Iterable[str]) -> None:
    """Add the files of those sources to the sum of the ended ones, and remove them. Raises OSError."""
    names = {name: folder / f"{name}.json" for name in ended}
    sum_path = folder / f"{RETIRED}.json"
    retired = read(sum_path) or Tally(RETIRED, {}, ended=True)
    new = [tally for name, path in names.items() if name not in retired.folded and (tally := read(path)) is not None]
    if new:
        for tally in new:
            add(retired.numbers, tally.numbers, LASTING)
        _forget(retired.numbers)
        folded = (*retired.folded, *(tally.source for tally in new))[-MOST_FOLDED:]
        write(folder, Tally(RETIRED, retired.numbers, ended=True, folded=folded))
    for path in names.values():
        path.unlink(missing_ok=True)


def _forget(numbers: Numbers) -> None:
    """Drop what was counted of all but the newest versions, so that years of deployments stay one page."""
    for family in LASTING:
        if "version" not in family.labels:
            continue
        workload, version = family.labels.index("workload"), family.labels.index("version")
        series = numbers.get(family.name, {})
        held: dict[str, set[int]] = {}
        for labels in series:
            held.setdefault(labels[workload], set()).add(int(labels[version] or 0))
        newest = {name: {0, *sorted(versions)[-MOST_VERSIONS:]} for name, versions in held.items()}
        numbers[family.name] = {
            labels: values for labels, values in series.items() if int(labels[version] or 0) in newest[labels[workload]]
        }
