"""Which models every worker that may still be asked knows: what may be said to be ready.

A request may come to any worker that accepts, and on a connection that is kept to one that has stopped accepting. So a
model is ready when no worker is left that does not know it.

    everywhere.json   by the fleet   by workload the version that answers; null: workers differ

Written before a worker begins to accept. Not here: which workers there are (`serving.fleet`), and what one of them
loaded (`serving.engine`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from serving.generation import Generation
from serving.state import write_file

FILE = "everywhere.json"
Known = Mapping[str, int | None]

logger = logging.getLogger(__name__)


def read(folder: Path) -> dict[str, int | None] | None:
    """What the fleet of the server in `folder` wrote; None: there is no fleet, so this process is all there is. While
    the file cannot be read, nothing is known to be known by every worker."""
    try:
        found: dict[str, int | None] = json.loads((folder / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found


class Everywhere:
    """Writes the file of one server. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._generations: dict[int, Known] = {}
        self._said: Known | None = None
        self._trouble: str | None = None
        """Why it could not be written, said once while it lasts."""

    def made(self, generation: Generation) -> None:
        """Remember what a generation serves."""
        self._generations[generation.number] = {name: entry.version for name, entry in generation.entries.items()}

    def say(self, numbers: Collection[int]) -> bool:
        """Workers of the generations with these numbers may be asked; with none, what was said last stays. False: it
        cannot be written now, so a worker of another generation may not join yet. That one left may be said later."""
        if not numbers:
            return True
        # Numbers only grow, so an earlier generation than these has no workers any more.
        self._generations = {number: known for number, known in self._generations.items() if number >= min(numbers)}
        found = _common([self._generations[number] for number in numbers])
        if found == self._said:
            return True
        try:
            write_file(self.folder / FILE, found)
        except OSError as error:
            if error.strerror != self._trouble:
                logger.error("%s cannot be written (%s); until it is, no new version answers.", FILE, error.strerror)
            self._trouble = error.strerror
            return False
        self._said, self._trouble = found, None
        return True


def _common(generations: Collection[Known]) -> dict[str, int | None]:
    names = set.intersection(*(set(known) for known in generations))
    versions = {name: {known[name] for known in generations} for name in sorted(names)}
    return {name: found.pop() if len(found) == 1 else None for name, found in versions.items()}
