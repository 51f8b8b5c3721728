"""What lies in the folder of a model repository, NAME/VERSION/model.onnx, one look at a time.

What cannot be read concerns only itself: of a model or a version that is there and cannot be looked at, what was seen
last is taken. Not here: what follows from it (`serving.repository`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
NUMBER = re.compile(r"0|[1-9][0-9]*")
LARGEST = 2**63 - 1
"""Version: what the messages between processes and the columns of the log hold."""

Mark = tuple[int, int, int]
"""Size, time and change (ctime) of a file: another one means that it was written, or that another file is in its place.

The change, because nobody can set it: new weights have the size of the old ones, and those out of archives and images
their time. Not the numbers of the inode and the device: some network file systems number files anew as they please,
and all of them with each mount, so that every model would be loaded again."""
Versions = Mapping[int, Mark]


@dataclass(frozen=True)
class Found:
    """What one look found."""

    models: Mapping[str, Versions]
    """By name and version the model files."""
    unread: frozenset[tuple[str, int | None]] = frozenset()
    """Models (None) and versions that are there and could not be looked at."""

    def hides(self, name: str, version: int | None) -> bool:
        """Whether a version that was not found may be there."""
        return not self.unread.isdisjoint({(name, None), (name, version)})


class Folder:
    """The repository's folder. Used by one thread."""

    def __init__(self, source: Path, say: Callable[[str], None]) -> None:
        """`say` hears what is wrong, in sentences, at every look."""
        self.source, self._say = source, say
        self._last: Mapping[str, Versions] = {}
        self._held: tuple[int, int] | None = None
        """Device and inode of the folder in which models were seen last."""

    def look(self) -> Found | None:
        """What is there; None: the folder itself cannot be read now, or is not the one that it was."""
        unread: set[tuple[str, int | None]] = set()
        try:
            before = _identity(self.source)
            paths = [path for path in self.source.iterdir() if NAME.fullmatch(path.name)]
            models = {path.name: versions for path in paths if (versions := self._versions(path, unread))}
            identity = _identity(self.source)
        except OSError as error:
            self._say(f"The model repository {self.source} cannot be read ({error.strerror or error}); what was "
                      "loaded goes on answering.")  # fmt: skip
            return None
        if identity != before:  # mounted, or unmounted, meanwhile
            return None
        # What is mounted hides a folder that is empty; whoever empties the folder does that in the same one.
        if not models and self._held not in (None, identity):
            self._say(f"The model repository {self.source} is another folder than before and has no models, as when a "
                      "share is not mounted; what was loaded goes on answering. If it should not, start the server "
                      "again.")  # fmt: skip
            return None
        if models:
            self._held = identity
        self._last = models
        return Found(models, frozenset(unread))

    def _versions(self, path: Path, unread: set[tuple[str, int | None]]) -> Versions:
        last = self._last.get(path.name, {})
        found: dict[int, Mark] = {}
        try:
            folders = [folder for folder in path.iterdir() if NUMBER.fullmatch(folder.name)]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            self._say_unread(path, error)
            unread.add((path.name, None))
            return last
        for folder in folders:
            number = int(folder.name)
            if number > LARGEST:
                self._say(f"{folder} of the model repository is passed over: a version is at most {LARGEST}. Rename it "
                          "to serve it.")  # fmt: skip
                continue
            try:
                status = (folder / "model.onnx").stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                self._say_unread(folder, error)
                unread.add((path.name, number))
                if number in last:
                    found[number] = last[number]
            else:
                found[number] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return found

    def _say_unread(self, path: Path, error: OSError) -> None:
        self._say(f"{path} of the model repository cannot be read ({error.strerror or error}); what was loaded of it "
                  "goes on answering. See to it that this server may read it.")  # fmt: skip


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
