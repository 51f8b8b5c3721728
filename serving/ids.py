"""Prediction ids that prove themselves: feedback about an id that this server never gave is refused without a look-up.

An id is 32 hexadecimal digits, and sorts by time:

    11  milliseconds since 1970      3  worker      3  sequence      4  rows of the batch      4  row      7  MAC

The MAC (keyed BLAKE2b, 28 bits) covers everything but the row, which must be below the number of rows. One MAC serves
a whole batch, so an id costs no hashing of its own. It tells an honest mistake from a real id; who may send feedback
at all is a matter of keys (`serving.access`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import overload

MOST_ROWS = 0xFFFF
"""Rows that the ids of one batch can tell apart."""
MAC_BITS = 28
DIGITS = [f"{row:04x}" for row in range(1024)]
"""Of the first rows of a batch, made once."""
WORKERS = 4096
"""Worker numbers are taken modulo this; two workers that live at once must not share one."""


class Ids:
    """Makes and verifies ids. Safe to use from several threads."""

    def __init__(self, key: bytes, worker: int, clock: Callable[[], float] = time.time) -> None:
        self.key, self.worker, self.clock = key, worker % WORKERS, clock
        self._lock = threading.Lock()
        self._last = (0, 0)

    def base(self, workload: str, rows: int) -> int:
        """The id of row 0 of a new batch, as a number; `at_row` gives that of another, `expand` all of them."""
        with self._lock:
            millisecond, sequence = self._last
            now = int(self.clock() * 1000)
            if now > millisecond:
                millisecond, sequence = now, 0
            elif sequence == 0xFFF:  # the clock stands still or went back: time goes on here
                millisecond, sequence = millisecond + 1, 0
            else:
                sequence += 1
            self._last = millisecond, sequence
        batch = (millisecond << 40) | (self.worker << 28) | (sequence << 16) | rows
        return (batch << (16 + MAC_BITS)) | self._mac(batch, workload)

    def genuine(self, name: str, workload: str) -> bool:
        """Whether a server with this key gave the id to an answer of the workload."""
        if len(name) != 32 or not (name.isascii() and name.isalnum()):
            return False
        try:
            number = int(name, 16)
        except ValueError:
            return False
        batch, row, mac = number >> (16 + MAC_BITS), (number >> MAC_BITS) & 0xFFFF, number & (2**MAC_BITS - 1)
        return row < batch & 0xFFFF and mac == self._mac(batch, workload) and name == name.lower()

    def _mac(self, batch: int, workload: str) -> int:
        digest = blake2b(batch.to_bytes(11, "big") + workload.encode(), digest_size=4, key=self.key).digest()
        return int.from_bytes(digest, "big") >> (32 - MAC_BITS)


class Range(Sequence[str]):
    """The ids of a batch, or of some of its rows, made when they are looked at: a plain model's rarely are."""

    __slots__ = ("head", "mac", "rows")

    def __init__(self, head: str, mac: str, rows: range) -> None:
        self.head, self.mac, self.rows = head, mac, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Range: ...

    def __getitem__(self, index: int | slice) -> str | Range:
        if isinstance(index, slice):
            return Range(self.head, self.mac, self.rows[index])
        return f"{self.head}{self.rows[index]:04x}{self.mac}"

    def __iter__(self) -> Iterator[str]:
        head, mac, rows = self.head, self.mac, self.rows
        if rows.stop <= len(DIGITS):
            return iter([head + digits + mac for digits in DIGITS[rows.start : rows.stop : rows.step]])
        return iter([f"{head}{row:04x}{mac}" for row in rows])


def at_row(base: int, row: int) -> int:
    """The id of one row of a batch, as a number."""
    return base + (row << MAC_BITS)


def expand(first: int, rows: int) -> Range:
    """The ids of `rows` rows of a batch, from the one whose id is `first` on."""
    name = f"{first:032x}"
    row = int(name[21:25], 16)
    return Range(name[:21], name[25:], range(row, row + rows))


def read_key(folder: Path) -> bytes:
    """The home's key, made at the first call; only its owner may read it. Safe when two ask at once."""
    path = folder / "id.key"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    aside = path.with_suffix(f".{os.urandom(4).hex()}.aside")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(32))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)  # fails where another was quicker, and then theirs counts
    except FileExistsError:
        pass
    finally:
        aside.unlink()
    return path.read_bytes()
