"""What a case is, and how cases run: each by itself, whatever the others did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import httpx
import numpy as np

from benchmarks.conformance.wire import Reply, Server


class Failed(Exception):
    """The server did something else than the specification says."""


@dataclass(frozen=True)
class Case:
    """One question to a server."""

    group: str
    title: str
    run: Callable[[Server], None]
    is_open: bool = False
    """The specification leaves it open: what the server does is shown and never fails the run."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    case: Case
    result: Literal["pass", "fail", "open"]
    note: str = ""


def run(cases: Iterable[Case], server: Server) -> list[Outcome]:
    """Ask the server every question."""
    return [_one(case, server) for case in cases]


def _one(case: Case, server: Server) -> Outcome:
    try:
        case.run(server)
    except (Failed, httpx.HTTPError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        note = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        return Outcome(case, "open" if case.is_open else "fail", " ".join(note.split())[:160])
    return Outcome(case, "pass")


def expect(condition: object, otherwise: str) -> None:
    """Raises Failed with what was found instead."""
    if not condition:
        raise Failed(otherwise)


def same(found: np.ndarray | None, expected: np.ndarray, name: str = "y") -> None:
    """The output is there, of the right type and shape, and exactly equal."""
    expect(found is not None, f"there is no output {name}")
    assert found is not None
    expect(found.shape == expected.shape, f"{name} has the shape {found.shape}, expected {expected.shape}")
    expect(found.dtype == expected.dtype, f"{name} is {found.dtype}, expected {expected.dtype}")
    expect(np.array_equal(found, expected), f"{name} is {found.ravel()[:6]}, expected {expected.ravel()[:6]}")


def fine(reply: Reply) -> Reply:
    """Status 200."""
    expect(reply.status == 200, f"status {reply.status}: {reply.error or str(reply.content)[:80]}")
    return reply


def refused(reply: Reply) -> None:
    """An error in the protocol's form, with any status that blames the client ("typically 400")."""
    expect(400 <= reply.status < 500, f"status {reply.status}, expected 4xx")
    expect(reply.error, f"the body is not {{'error': sentence}} but {str(reply.content)[:80]}")
