"""Kills: every process of the server gets SIGKILL at a random moment under load; then the lake is counted.

Every prediction id that a client got in a whole answer must be in the lake, once. In `fast` mode what was answered in
the last flush interval before a kill may be missing. Not here: the load (`benchmarks.soak.traffic`).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import orjson
import psutil
from deltalake import DeltaTable

from benchmarks.serving import subject, taxi
from benchmarks.serving.processes import Served, free_port
from benchmarks.serving.report import Figure, Section
from benchmarks.soak.traffic import Traffic
from noria.lake import Lake
from registry.store import Store

Ack = Literal["durable", "fast"]
MODES = {"durable": subject.DURABLE, "fast": subject.FAST}
FLUSH_SECONDS = 0.02
"""In fast mode, how old an answer must be at least for its row to be safe: the 2 ms that the recorder gathers rows
for, and what a busy machine adds to them."""
EARLIEST, LATEST = 0.2, 2.5
"""Seconds of load before a kill, drawn anew each time."""
RECORDS = 3
DRAINED = 3.0
"""Seconds of the last start, which takes in what the killed ones left."""


@dataclass
class Acknowledged:
    """What clients were told."""

    at: dict[str, float] = field(default_factory=dict)
    """When each prediction id came, by `time.monotonic()`."""
    repeated: int = 0
    """Ids that were given out twice."""
    kills: list[tuple[float, float]] = field(default_factory=list)
    """Of each kill: just before the signal, and when nothing was left."""

    def take(self, traffic: Traffic) -> None:
        """Add the ids of one life's answers."""
        for kept in traffic.answers:
            if kept.status == 200:
                for entry in orjson.loads(kept.content)["predictions"]:
                    self.repeated += entry["id"] in self.at
                    self.at[entry["id"]] = kept.at


def kills(folder: Path, count: int, rate: float, ack: Ack, seed: int = 0) -> Section:
    """Start, load, kill; `count` times; then start once more, end in peace, and count."""
    draw, told, home = random.Random(seed), Acknowledged(), folder / "home"
    with subject.registry(folder / "registry") as store:
        subject.register(store, taxi.contents())
        for _ in range(count):
            _life(store, home, told, ack=ack, rate=rate, seconds=draw.uniform(EARLIEST, LATEST))
        with subject.workload(store, home, free_port(), core=None, variables=MODES[ack]):
            time.sleep(DRAINED)
    counted = Counter(_lake(home))
    missing = [name for name in told.at if name not in counted]
    late = [name for name in missing if ack == "durable" or age(told, name) > FLUSH_SECONDS]
    section = Section(f"kills, {ack}", f"{count} SIGKILLs of all processes, {rate:g} requests/s of {RECORDS} rows")
    section.figures = [
        Figure("acknowledged predictions", len(told.at), ""),
        Figure("rows in the lake", sum(counted.values()), "", note="more than acknowledged: answers cut off by a kill"),
        Figure("acknowledged and not in the lake", len(missing), "", 0 if ack == "durable" else None, at_most=True),
        Figure("the oldest of them, before the kill", max([0.0, *(1000 * age(told, name) for name in missing)]), "ms"),
        Figure(f"of them older than {1000 * FLUSH_SECONDS:g} ms", len(late), "", 0, at_most=True),
        Figure("in the lake more than once", sum(times > 1 for times in counted.values()), "", 0, at_most=True),
        Figure("ids given out twice", told.repeated, "", 0, at_most=True),
    ]
    return section


def _life(store: Store, home: Path, told: Acknowledged, *, ack: Ack, rate: float, seconds: float) -> None:
    """One life of the server, from its start to its violent end."""
    body = taxi.records_of(RECORDS)
    with (
        subject.workload(store, home, free_port(), core=None, variables=MODES[ack]) as served,
        Traffic(served.port, subject.predict_path("taxi"), body.content, rate=rate) as traffic,
    ):
        time.sleep(seconds)
        told.kills.append(slay(served))
    told.take(traffic)


def slay(served: Served) -> tuple[float, float]:
    """SIGKILL to the whole group at once, then to whoever left it; returns when it began and when all were gone."""
    tree = served.tree()
    began = time.monotonic()
    os.killpg(served.process.pid, signal.SIGKILL)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=10)
    return began, time.monotonic()


def age(told: Acknowledged, name: str) -> float:
    """Seconds from an answer to the kill that followed it; negative where it was still on its way, infinite where none
    followed."""
    at = told.at[name]
    return min((began - at for began, ended in told.kills if ended >= at), default=math.inf)


def _lake(home: Path) -> list[str]:
    # Delta's own reader, not the lake's, which would hide a row that is there twice.
    table = DeltaTable(Lake(str(home / "lake"), "taxi", taxi.SCHEMA).address("predictions"))
    names: list[str] = table.to_pyarrow_table(columns=["prediction_id"]).column("prediction_id").to_pylist()
    return names
