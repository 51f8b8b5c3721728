"""Cases of closed-loop load on plain models: all on one small row; noria against itself in batching, encoding."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.serving import bodies, models, subject
from benchmarks.serving.contest import Bench, Contestant, Results, contend
from benchmarks.serving.contestants import limit, noria, peer
from benchmarks.serving.peers import FASTEST, FLOOR, PEERS
from benchmarks.serving.report import Figure, Section

CONNECTIONS = (1, 16, 64)
OF_FLOOR = {1: 0.9, 16: 1.5, 64: 2.0}
COLUMNS = (
    "server",
    "connections",
    "requests/s",
    "of the floor",
    "p50 ms",
    "p99 ms",
    "p99 of the floor's",
    "rounds",
    "note",
)


def small(bench: Bench) -> Section:
    """One JSON row of the small model by v2 infer: noria, the floor and every peer asked for."""
    file = models.file_of(bench.folder / "repository", "small")
    names = [FLOOR, subject.NAME, *(name for name in bench.peers if name != FLOOR)]
    contestants: list[Contestant] = [
        noria(bench, "small") if name == subject.NAME else peer(bench, name) for name in names
    ]
    limits = {"session.run": ("run", file, 1), "decode + run + encode": ("row", file)}
    contestants += [limit(bench, *what, name=name) for name, what in limits.items()]
    results = contend(bench, contestants, CONNECTIONS)
    section = Section("small", f"MLP {_shape('small')}, one JSON row a request, everything on one core", COLUMNS)
    for name in names:
        for count in CONNECTIONS:
            note = f"{PEERS[name].note}" if name in PEERS and count == CONNECTIONS[0] else ""
            section.rows.append([name, str(count), *_measured(results, name, count), note])
    for name in limits:
        section.rows.append([f"{name}, in process", "-", *_measured(results, name, CONNECTIONS[0]), ""])
    section.figures = [figure for count in CONNECTIONS for figure in _against_floor(results, count)]
    section.figures.append(
        Figure(f"noria by {FASTEST}, {CONNECTIONS[-1]} connections", results.ratio(subject.NAME, FASTEST, 64), "x", 1.0)
    )
    section.absent = results.absent
    return section


def _against_floor(results: Results, count: int) -> list[Figure]:
    rate = results.ratio(subject.NAME, FLOOR, count)
    slow = results.ratio(subject.NAME, FLOOR, count, "p99")
    return [
        Figure(f"requests/s by the floor's, {count} connections", rate, "x", OF_FLOOR[count]),
        Figure(f"p99 by the floor's, {count} connections", slow, "x", 1.0, at_most=True),
    ]


def _measured(results: Results, name: str, count: int, against: str = FLOOR) -> list[str]:
    rounds = results.rounds(name, count)
    if not rounds:
        return ["-"] * 5 + ["0"]
    rate, p50, p99 = (results.median(name, count, of) for of in ("rate", "p50", "p99"))
    ratio, slower = results.ratio(name, against, count), results.ratio(name, against, count, "p99")
    return [f"{rate:,.0f}", f"{ratio:.2f}", f"{p50:.2f}", f"{p99:.2f}", f"{slower:.2f}", str(len(rounds))]


def _shape(model: str) -> str:
    return "-".join(str(size) for size in models.SIZES[model])


def _pair(
    bench: Bench, sides: Sequence[Contestant], connections: Sequence[int], name: str, about: str
) -> tuple[Results, Section]:
    """Two ways of noria; the second one is what the first is held against."""  # fmt: skip
    results = contend(bench, sides, connections)
    columns = ("way", "connections", "requests/s", "of the other", "p50 ms", "p99 ms", "p99 of the other's", "rounds")
    section = Section(name, about, columns, absent=results.absent)
    for side in sides:
        for count in connections:
            section.rows.append([side.name, str(count), *_measured(results, side.name, count, sides[1].name)])
    return results, section


def batching(bench: Bench) -> Section:
    """What batching costs where there is nothing to batch."""
    sides = noria(bench, "small", name="on"), noria(bench, "small", name="off", variables=subject.UNBATCHED)
    results, section = _pair(bench, sides, (1,), "batching", "the small model at one connection, batching on and off")
    section.figures = [
        Figure("p50 on by off, 1 connection", results.ratio("on", "off", 1, "p50"), "x", 1.02, at_most=True)
    ]
    return section


def encodings(bench: Bench) -> Section:
    """Binary tensors beside our own JSON."""
    wholes = Section("encodings", "binary tensors beside noria's own JSON")
    for model, least, connections in (("small", 1.2, 64), ("floats", 4.0, 16)):
        binary = noria(bench, model, dialect=bodies.BINARY, name=f"{model}, binary")
        text = noria(bench, model, name=f"{model}, JSON")
        results, section = _pair(bench, (binary, text), (1, connections), "", "")
        wholes.columns, wholes.absent = section.columns, {**wholes.absent, **section.absent}
        wholes.rows += section.rows
        ratio = results.ratio(binary.name, text.name, connections)
        what = f"binary by JSON, {_shape(model)}, {connections} connections"
        wholes.figures.append(Figure(what, ratio, "x", least))
        alone = results.ratio(binary.name, text.name, 1)
        wholes.figures.append(Figure(f"the same at 1 connection, {_shape(model)}", alone, "x"))
    return wholes


def compute(bench: Bench) -> Section:
    """A model that computes: what batching brings."""
    sides = (
        noria(bench, "compute", dialect=bodies.BINARY, name="batched"),
        noria(bench, "compute", dialect=bodies.BINARY, name="unbatched", variables=subject.UNBATCHED),
    )
    results, section = _pair(bench, sides, (64,), "compute", f"MLP {_shape('compute')}, one binary row a request")
    section.figures = [
        Figure("batched by unbatched, 64 connections", results.ratio("batched", "unbatched", 64), "x", 1.3)
    ]
    return section
