"""Cases of many rows in one request, held against the same work inside one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import orjson

from benchmarks.serving import bodies, models, subject, taxi
from benchmarks.serving.bodies import Answered
from benchmarks.serving.contest import Bench, Results, Server, contend
from benchmarks.serving.contestants import limit, noria
from benchmarks.serving.processes import Served
from benchmarks.serving.report import Figure, Section
from noria.runtime import open_session, score
from registry.store import Store

ROWS, RECORDS = 1024, 100
COLUMNS = ("what", "rows a request", "requests/s", "rows/s", "p50 ms", "p99 ms", "rounds")


def rows(bench: Bench) -> Section:
    """One binary request of many rows beside `session.run` on as many."""
    file = models.file_of(bench.folder / "repository", "small")
    served = noria(bench, "small", dialect=bodies.BINARY, name="noria, binary", rows=ROWS)
    alone = limit(bench, "run", file, ROWS, name="session.run in process")
    results = contend(bench, (served, alone), (1,))
    section = Section(
        "rows", f"one connection, {ROWS:,} rows of the small model a request", COLUMNS, absent=results.absent
    )
    section.rows = [_row(results, each.name, ROWS) for each in (served, alone)]
    section.figures = [
        Figure("rows/s by session.run's in process", results.ratio(served.name, alone.name, 1), "x", 0.5)
    ]
    return section


def predict(bench: Bench) -> Section:
    """Plain records of a workload beside the same work in process."""
    home = Path(tempfile.mkdtemp(dir=bench.folder, prefix="registry-"))
    with subject.registry(home) as store:
        subject.register(store, taxi.contents())
        served = _taxi(bench, store)
        alone = limit(bench, "predict", RECORDS, name="decode + run + encode in process")
        results = contend(bench, (served, alone), (1, 16))
    section = Section(
        "predict", f"{RECORDS} taxi records of JSON a request to /predict", COLUMNS, absent=results.absent
    )
    section.rows = [_row(results, each.name, RECORDS) for each in (served, alone)]
    for count in (1, 16):
        ratio = results.ratio(served.name, alone.name, count)
        section.figures.append(Figure(f"by decode + run + encode in process, {count} connections", ratio, "x", 0.5))
    return section


def _taxi(bench: Bench, store: Store) -> Server:
    body = taxi.records_of(RECORDS)
    tensors = taxi.SCHEMA.tensors(taxi.rows_of(RECORDS))
    expected = score(open_session(taxi.graph(), "cpu"), tensors)

    def right(answered: Answered) -> str:
        if answered.status != 200:
            return f"status {answered.status}: {answered.content[:200]!r}"
        found = [entry["prediction"] for entry in orjson.loads(answered.content)["predictions"]]
        fine = len(found) == RECORDS and np.allclose(found, expected, rtol=bodies.TOLERANCE, atol=bodies.TOLERANCE)
        return "" if fine else f"scores differ from onnxruntime's: {found[:3]} instead of {expected[:3]}"

    def start(port: int, ready: Callable[[int], str]) -> AbstractContextManager[Served]:
        home = Path(tempfile.mkdtemp(dir=bench.folder, prefix="home-"))
        return subject.workload(store, home, port, right=ready, core=bench.server_core)

    return Server("noria, /predict", start, subject.predict_path("taxi"), [(body, right)] * 4)


def _row(results: Results, name: str, size: int) -> list[str]:
    rate, p50, p99 = (results.median(name, 1, of) for of in ("rate", "p50", "p99"))
    return [
        name,
        str(size),
        f"{rate:,.0f}",
        f"{rate * size:,.0f}",
        f"{p50:.2f}",
        f"{p99:.2f}",
        str(len(results.rounds(name, 1))),
    ]
