"""The case of too much: three times what the server can do, open-loop, for half a minute; then, is it itself again?

`overload` takes the heavy model, `flood` the lighter one, where reading a request costs as much as answering it: there
the connections wait in the kernel before the server can refuse them. Not here: the generator
(`benchmarks.serving.openloop`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.serving import bodies, models
from benchmarks.serving.contest import Bench, Server
from benchmarks.serving.contestants import noria
from benchmarks.serving.environments import Unavailable
from benchmarks.serving.load import load
from benchmarks.serving.processes import Served, ask, free_port
from benchmarks.serving.report import Figure, Section

TIMES = 3
CLOSED = 128
"""Connections that find the capacity: enough to keep every batch full, too few to be refused on a slow machine."""
OPEN = 3000
"""Connections of the open loop: more than the queue holds, so that it is the server that refuses."""
AFTER = 2.0


def overload(bench: Bench) -> Section:
    """The model is the bottleneck."""
    return _overload(bench, "overload", "heavy")


def flood(bench: Bench) -> Section:
    """Reading requests is the bottleneck."""
    return _overload(bench, "flood", "compute")


def _overload(bench: Bench, case: str, model: str) -> Section:
    """Capacity before, goodput and refusals during, capacity after."""
    server = noria(bench, model, dialect=bodies.BINARY)
    body, right = server.exchanges[0]
    seconds = 5.0 if bench.quick else 30.0
    with server.start(free_port(), lambda port: right(ask(port, server.path, body))) as served:
        server.check(served)
        _closed(bench, server, served, 1)
        before = _closed(bench, server, served, bench.seconds)
        during = _open(bench, server, served, before * TIMES, seconds)
        time.sleep(AFTER)
        after = _closed(bench, server, served, bench.seconds)
    section = Section(
        case, f"MLP {'-'.join(map(str, models.SIZES[model]))}, binary; {TIMES} x capacity for {seconds:g} s over "
        f"{OPEN} connections", ("phase", "requests/s", "refused/s", "p50 ms", "p99 ms", "refusals' p99 ms"),
    )  # fmt: skip
    section.rows = [
        ["capacity before", f"{before:,.0f}", "", "", "", ""],
        ["during", f"{during['goodput']:,.0f}", f"{during['refused'] / seconds:,.0f}", _ms(during["fine_p50"]),
         _ms(during["fine_p99"]), _ms(during["refused_p99"])],
        [f"{AFTER:g} s after", f"{after:,.0f}", "", "", "", ""],
    ]  # fmt: skip
    section.figures = _figures(before, during, after)
    return section


def _figures(before: float, during: dict[str, Any], after: float) -> list[Figure]:
    held = (
        f"{during['held']:,} of {during['sent'] + during['held']:,} found no idle connection" if during["held"] else ""
    )
    late = f"the generator itself was late by {during['lag_p99']:.1f} ms at p99"
    unwell = during["broken"] + sum(during["other"].values())
    return [
        Figure("offered by capacity", during["offered"] / before, "x", 0.95 * TIMES, note=held),
        Figure("goodput by capacity", during["goodput"] / before, "x", 0.9),
        Figure("refusals' p99", during["refused_p99"] or float("nan"), "ms", 50, at_most=True, note=late),
        Figure("broken or answered otherwise", unwell, "requests", 0, at_most=True),
        Figure(f"capacity {AFTER:g} s after by before", after / before, "x", 0.9),
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _closed(bench: Bench, server: Server, served: Served, seconds: float) -> float:
    body = server.exchanges[0][0]
    found = load(served.port, server.path, body, connections=CLOSED, seconds=seconds, core=bench.load_core)
    if not found.clean:
        raise Unavailable(f"at {CLOSED} connections {found.broken} broke and {found.refused} were refused")
    return found.rate


def _open(bench: Bench, server: Server, served: Served, rate: float, seconds: float) -> dict[str, Any]:
    body, file = server.exchanges[0][0], bench.folder / "overload-body"
    file.write_bytes(body.content)
    pinned = [] if bench.load_core is None else ["taskset", "-c", str(bench.load_core)]
    command = [
        *pinned, sys.executable, "-m", "benchmarks.serving.openloop", str(served.port), server.path, str(file),
        body.content_type, str(rate), str(seconds), str(OPEN),
        *(part for pair in body.headers.items() for part in pair),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"the open-loop generator ended with {done.returncode}: {done.stderr[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
