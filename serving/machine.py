"""How much memory this server may have: the machine's, or less where it runs in a container or a service that has a
limit, past which the system ends it. Not here: what a worker may take of it (`serving.reload`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil


def memory(root: Path = Path("/")) -> int:
    """In bytes. `root` is where the system shows itself."""
    return min([int(psutil.virtual_memory().total), *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Of the control groups that this process is in, version 2 and 1, and of all above them, as far as they show."""
    with suppress(OSError):  # another system than Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _upwards(root / "sys/fs/cgroup", path, "memory.max")
            elif "memory" in controllers.split(","):
                yield from _upwards(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")


def _upwards(top: Path, path: str, name: str) -> Iterator[int]:
    """A container may see its own group as the top one, while its path is the one that the machine knows it by."""
    group = top / path.lstrip("/")
    for each in (group, *group.parents):
        with suppress(OSError, ValueError):  # no such group here, or "max"
            yield int((each / name).read_text())
        if each == top:
            return
