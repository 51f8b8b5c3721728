"""Rounds: each contestant is started afresh, checked, loaded and ended, one after the other, again and again.

Nobody else's server runs meanwhile, and ratios are taken within a round, so that a slow minute of the machine hits both
sides. A contestant that cannot be started or answers wrongly is left out with its reason. Not here: what is compared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.serving import bodies
from benchmarks.serving.bodies import Answered, Body, Dialect
from benchmarks.serving.environments import CACHE, Unavailable
from benchmarks.serving.load import Loaded, load
from benchmarks.serving.processes import Served, ask, free_port

WARM = 1.0
CHECKED = 32
"""Rows whose answers are compared before the first timing, asked 16 at a time so that batches form."""


@dataclass(frozen=True)
class Bench:
    """What holds for a whole run."""

    folder: Path
    """Models, homes and logs of the run."""
    rounds: int = 5
    seconds: float = 4.0
    peers: tuple[str, ...] = ()
    server_core: int | None = 0
    load_core: int | None = 1
    cache: Path = CACHE
    quick: bool = False
    """Only to see that everything runs: the long cases take their short form."""
    say: Callable[[str], None] = lambda _: None


class Contestant(Protocol):
    """Somebody who is measured."""

    @property
    def name(self) -> str:
        """As it stands in the table."""

    def measure(self, bench: Bench, connections: Sequence[int]) -> list[Loaded]:
        """One round: a figure for each number of connections. Raises Unavailable."""


Start = Callable[[int, Callable[[int], str]], AbstractContextManager[Served]]


@dataclass(frozen=True)
class Server:
    """A server that is asked for one body again and again."""

    name: str
    start: Start
    """Given a port and what tells whether an answer is right."""
    path: str
    exchanges: Sequence[tuple[Body, Callable[[Answered], str]]]
    """Requests, and what is wrong with an answer to each; the first is the one that load is made of."""

    def measure(self, bench: Bench, connections: Sequence[int]) -> list[Loaded]:
        """Start, check, warm, load, end."""
        body, right = self.exchanges[0]
        with self.start(free_port(), lambda port: right(ask(port, self.path, body))) as served:
            self.check(served)
            found = []
            for count in connections:
                self._load(bench, served, count, WARM)  # whatever comes of it: Ray's first second may answer nothing
                loaded = self._load(bench, served, count, bench.seconds)
                if not loaded.clean:
                    raise Unavailable(
                        f"at {count} connections {loaded.requests:,} were answered, {loaded.broken:,} broke, "
                        f"{loaded.refused:,} were refused"
                    )
                found.append(loaded)
            return found

    def _load(self, bench: Bench, served: Served, connections: int, seconds: float) -> Loaded:
        body = self.exchanges[0][0]
        return load(served.port, self.path, body, connections=connections, seconds=seconds, core=bench.load_core)

    def check(self, served: Served) -> None:
        """Every exchange, many at once. Raises Unavailable with the first wrong answer."""

        def one(exchange: tuple[Body, Callable[[Answered], str]]) -> str:
            return exchange[1](served.ask(self.path, exchange[0]))

        with ThreadPoolExecutor(16) as pool:
            for complaint in pool.map(one, self.exchanges):
                if complaint:
                    raise Unavailable(f"its answer is wrong: {complaint}")


@dataclass(frozen=True)
class InProcess:
    """A function called again and again in its own process on the server's core: `benchmarks.serving.inprocess`."""

    name: str
    arguments: tuple[str, ...]

    def measure(self, bench: Bench, connections: Sequence[int]) -> list[Loaded]:
        """The same figure for every number of connections."""
        pinned = [] if bench.server_core is None else ["taskset", "-c", str(bench.server_core)]
        command = [*pinned, sys.executable, "-m", "benchmarks.serving.inprocess", *self.arguments, str(bench.seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"ended with {done.returncode}: {done.stderr[-300:]}")
        return [Loaded(**json.loads(done.stdout.splitlines()[-1]))] * len(connections)


def exchanges(dialect: Dialect, rows: np.ndarray, scores: np.ndarray, at_once: int = 1) -> list:
    """Requests of `at_once` rows each, and the comparison with onnxruntime's scores."""

    def pair(start: int) -> tuple[Body, Callable[[Answered], str]]:
        part = slice(start, start + at_once)
        return dialect.write(rows[part]), lambda answered: bodies.wrong(dialect, answered, scores[part])

    return [pair(start) for start in range(0, len(rows), at_once)]


@dataclass
class Results:
    """What the rounds saw: a list over rounds for each contestant and number of connections."""

    found: dict[tuple[str, int], list[Loaded | None]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Who was left out, and why."""

    def rounds(self, name: str, connections: int) -> list[Loaded]:
        """The rounds in which it was measured."""
        return [loaded for loaded in self.found.get((name, connections), []) if loaded is not None]

    def median(self, name: str, connections: int, of: str = "rate") -> float:
        """The middle round; NaN when there is none."""
        values = [getattr(loaded, of) for loaded in self.rounds(name, connections)]
        return statistics.median(values) if values else float("nan")

    def ratio(self, name: str, other: str, connections: int, of: str = "rate") -> float:
        """The median over rounds of one's figure by the other's in the same round; NaN when none has both."""
        pairs = zip(self.found.get((name, connections), []), self.found.get((other, connections), []), strict=False)
        ratios = [getattr(a, of) / getattr(b, of) for a, b in pairs if a is not None and b is not None]
        return statistics.median(ratios) if ratios else float("nan")


def contend(bench: Bench, contestants: Sequence[Contestant], connections: Sequence[int]) -> Results:
    """All rounds of all contestants, interleaved."""
    results = Results()
    for number in range(bench.rounds):
        for contestant in contestants:
            measured: Mapping[int, Loaded] = {}
            if contestant.name not in results.absent:
                bench.say(f"round {number + 1} of {bench.rounds}: {contestant.name}")
                try:
                    measured = dict(zip(connections, contestant.measure(bench, connections), strict=True))
                except Unavailable as reason:
                    results.absent[contestant.name] = str(reason)
                    bench.say(f"{contestant.name} is left out: {reason}")
            for count in connections:
                results.found.setdefault((contestant.name, count), []).append(measured.get(count))
    return results
