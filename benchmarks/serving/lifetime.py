"""Cases of a server's life: how long it takes to be ready, how much memory a worker holds, whether that stays flat."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.serving import models, subject
from benchmarks.serving.contest import Bench, Server
from benchmarks.serving.contestants import noria
from benchmarks.serving.environments import Unavailable
from benchmarks.serving.load import load
from benchmarks.serving.processes import Served, ask, free_port
from benchmarks.serving.report import Figure, Section

MEGABYTE = 2**20
WORKER = "serving.worker"
REQUESTS = 1_000_000
LOOK = 0.25
SETTLED = 0.2
"""The first part of the requests fills pools and caches; flatness is asked of the rest."""
FLAT = 0.02
"""Growth over the rest, as a share of the memory, that is taken for noise whatever its error."""


def start(bench: Bench) -> Section:
    """Seconds from `noria serve` to the first ready answer and to the first right one."""
    section = Section("start", "from the start of the process, one small model", ("round", "ready s", "model's load s"))
    found = []
    for number in range(bench.rounds):
        server = _alone(bench)
        with server.start(free_port(), subject.is_ready) as served:
            loading = _loading(bench)
            found.append(served.ready_seconds - loading)
            section.rows.append([str(number + 1), f"{served.ready_seconds:.2f}", f"{loading:.3f}"])
    value = statistics.median(found)
    section.figures = [Figure("start to ready less the model's load", value, "s", 2.0, at_most=True)]
    return section


def _loading(bench: Bench) -> float:
    began = time.perf_counter()
    models.session(models.file_of(bench.folder / "repository", "small"))
    return time.perf_counter() - began


def memory(bench: Bench) -> Section:
    """Resident memory of each process after some load, with one small model in the repository."""
    section = Section("memory", "one small model, after load at 64 connections", ("process", "resident MB", "command"))
    single = _alone(bench)
    with single.start(free_port(), subject.is_ready) as served:
        _drive(bench, single, served, 2 if bench.quick else 10)
        for number, process in enumerate(served.tree()):
            name = "first" if number == 0 else "below it"
            resident = process.memory_info().rss / MEGABYTE
            section.rows.append([name, f"{resident:.0f}", " ".join(process.cmdline()[1:4])[:60]])
        worker = max(served.memory(WORKER)) / MEGABYTE
    section.figures = [Figure("the largest worker", worker, "MB", 250, at_most=True)]
    return section


def flat(bench: Bench) -> Section:
    """Memory of the worker that answers, and of the whole tree, over a million requests."""
    single, wanted = _alone(bench), REQUESTS // 20 if bench.quick else REQUESTS
    samples: list[tuple[float, float, float]] = []
    with single.start(free_port(), subject.is_ready) as served:
        began, answered, stop = time.monotonic(), 0, threading.Event()
        watcher = threading.Thread(target=_watch, args=(served, samples, stop))
        watcher.start()
        while answered < wanted:
            answered += _drive(bench, single, served, 5)
        stop.set()
        watcher.join()
        rate = answered / (time.monotonic() - began)
    rest = [sample for sample in samples if sample[0] - began > SETTLED * (samples[-1][0] - began)]
    section = Section("flat", f"{answered:,} requests at 64 connections, {rate:,.0f}/s")
    section.columns = ("requests", "resident MB, the worker", "whole tree")
    section.rows = [
        [f"{(at - began) * rate:,.0f}", f"{worker / MEGABYTE:.1f}", f"{whole / MEGABYTE:.1f}"]
        for at, worker, whole in samples[:: max(1, len(samples) // 12)]
    ]
    section.figures = [
        _flatness("growth of the worker that answers", [(at, worker) for at, worker, _ in rest]),
        _flatness("growth of all processes", [(at, whole) for at, _, whole in rest]),
    ]
    return section


def _flatness(what: str, samples: Sequence[tuple[float, float]]) -> Figure:
    grown, error = growth(samples)
    allowed = max(FLAT * samples[0][1], 2 * error) / MEGABYTE
    note = f"fitted over the last {1 - SETTLED:.0%} of the requests; standard error {error / MEGABYTE:.2f} MB"
    return Figure(what, grown / MEGABYTE, "MB", round(allowed, 2), at_most=True, note=note)


def growth(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """What a straight line through (time, value) gains from the first time to the last, and its standard error.

    Raises:
        ValueError: fewer than three samples.
    """
    if len(samples) < 3:
        raise ValueError(f"A line needs three samples at least; there are {len(samples)}.")
    at, values = np.array(samples, float).T
    at = at - at.mean()
    slope = float(at @ values / (at @ at))
    left = values - values.mean() - slope * at
    error = float(np.sqrt(left @ left / (len(at) - 2) / (at @ at)))
    span = float(at[-1] - at[0])
    return slope * span, error * span


def _watch(served: Served, samples: list[tuple[float, float, float]], stop: threading.Event) -> None:
    """Note the time, the bytes of the worker that answers (a spare is smaller), and those of all processes."""
    while not stop.wait(LOOK):
        samples.append((time.monotonic(), float(max(served.memory(WORKER))), float(sum(served.memory()))))


def _alone(bench: Bench) -> Server:
    """noria with the small model and no other."""
    folder = bench.folder / "alone"
    path = models.file_of(folder / "repository", "small")
    if not path.exists():
        path.parent.mkdir(parents=True)
        path.write_bytes(models.perceptron(models.SIZES["small"]))
    return noria(Bench(**{**vars(bench), "folder": folder}), "small")


def _drive(bench: Bench, server: Server, served: Served, seconds: float) -> int:
    body, right = server.exchanges[0]
    if complaint := right(ask(served.port, server.path, body)):
        raise Unavailable(f"its answer is wrong: {complaint}")
    found = load(served.port, server.path, body, connections=64, seconds=seconds, core=bench.load_core)
    if not found.clean:
        raise Unavailable(f"{found.broken} requests broke and {found.refused} were refused")
    return found.requests
