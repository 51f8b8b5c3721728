"""A file of JSON lines that several processes append to, and that is put aside when it is large.

Each write is one system call on a descriptor opened for appending, so lines of two processes do not mix. Keys never get
in: whatever looks like one is struck out here, at the last door. Not here: what a line says (`serving.audit`).
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from serving.keys import PREFIX

SECRET = re.compile(rb"(?i)" + PREFIX.encode() + rb"[A-Za-z0-9_-]{16,}|(?<=bearer )[^\s\"\\]+")
STRUCK = b"(a key)"
STDOUT = 1


class JsonLines:
    """One such file; `-` is standard output, which is never put aside. Thread-safe for one writer at a time."""

    def __init__(self, path: str | Path, most_bytes: int, kept: int) -> None:
        """Above `most_bytes` the file becomes `path.1`, that one `path.2`, and so on to `path.kept`."""
        self.path = None if str(path) == "-" else Path(path)
        self.most_bytes = most_bytes
        self.kept = kept
        self._file = STDOUT if self.path is None else -1

    def write(self, lines: bytes) -> None:
        """Append whole lines. Raises OSError."""
        if self.path is not None:
            self._open(self.path)
        rest = memoryview(SECRET.sub(STRUCK, lines))
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def close(self) -> None:
        """Let go of the file."""
        if self.path is not None and self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self, path: Path) -> None:
        """Have the file open that has this name now: another process may have put the old one aside."""
        if self._file >= 0 and _same(path, self._file):
            if os.fstat(self._file).st_size < self.most_bytes:
                return
            self._put_aside(path)
        self.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _put_aside(self, path: Path) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if not _same(path, self._file):  # somebody else was first
            return
        for number in range(self.kept - 1, 0, -1):
            older = _numbered(path, number)
            if older.exists():
                older.replace(_numbered(path, number + 1))
        path.replace(_numbered(path, 1))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _same(path: Path, file: int) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(file))
