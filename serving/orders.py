"""Orders of an operator to load or unload a model of the repository: from a worker, which hears them, to the parent.

    orders/<key>.json   written by a worker   what to do
    orders/<key>.done   written by the parent   what came of it

Not here: who may order (`serving.app`), and the doing (`serving.repository`).
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from serving.state import write_file

PATIENCE_SECONDS = 75.0
"""How long an order may take: a version that hangs while it loads is given up before."""
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Order:
    """Load a model, or stop serving it."""

    key: str
    name: str
    load: bool


@dataclass(frozen=True)
class Outcome:
    """What came of an order."""

    done: bool
    reason: str = ""
    """Why it was not done, as a sentence."""


def order(folder: Path, name: str, load: bool) -> str:
    """Ask the parent of the server in `folder` to load or unload a model; returns the key of the order."""
    key = uuid.uuid4().hex
    write_file(folder / "orders" / f"{key}.json", {"name": name, "load": load})
    return key


def outcome(folder: Path, key: str) -> Outcome | None:
    """What came of an order; None while the parent is at it."""
    try:
        return Outcome(**json.loads((folder / "orders" / f"{key}.done").read_bytes()))
    except FileNotFoundError:
        return None


async def wait(folder: Path, key: str, seconds: float = PATIENCE_SECONDS) -> Outcome:
    """What came of an order, when that is known. Removes the order, also where nobody waits for it any more. It looks
    from the event loop, not from a thread: the few there are have the log to hand over and the numbers to write."""
    deadline = time.monotonic() + seconds
    try:
        while (found := outcome(folder, key)) is None and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        for suffix in (".json", ".done"):
            (folder / "orders" / f"{key}{suffix}").unlink(missing_ok=True)
    return found or Outcome(False, f"The server did not act within {seconds:g} s; its log tells more.")


def waiting(folder: Path) -> list[Order]:
    """Orders without an outcome, oldest first; what cannot be read, and what a worker that died left behind, is
    removed."""
    found = []
    for path in sorted((folder / "orders").glob("*"), key=_since):
        if time.time() - _since(path) > PATIENCE_SECONDS:
            path.unlink(missing_ok=True)
        elif path.suffix == ".json" and not path.with_suffix(".done").exists():
            try:
                data = json.loads(path.read_bytes())
                found.append(Order(path.stem, str(data["name"]), bool(data["load"])))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)
    return found


def answer(folder: Path, key: str, reason: str = "") -> None:
    """Say what came of an order: done, or why not."""
    write_file(folder / "orders" / f"{key}.done", {"done": not reason, "reason": reason})


def clear(folder: Path) -> None:
    """Remove every order: whoever waited for them is gone."""
    for path in (folder / "orders").glob("*"):
        path.unlink(missing_ok=True)


def _since(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it was removed, which whoever reads it finds
        return time.time()
