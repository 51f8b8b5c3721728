"""Kills: every process of the server gets SIGKILL at a random moment under load; then the lake is counted.

Every prediction id that a client got in a whole answer must be in the lake, once. In `fast` mode what was answered in
the last flush interval before a kill may be missing. Not here: the load (`benchmarks.soak.traffic`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
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
FLUSH_SECONDS = 0.1
"""In fast mode, how old an answer must be at least for its row to be safe."""
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
    kills: list[float] = field(default_factory=list)

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
    late = unexcused(told, missing, 0.0 if ack == "durable" else FLUSH_SECONDS)
    section = Section(f"kills, {ack}", f"{count} SIGKILLs of all processes, {rate:g} requests/s of {RECORDS} rows")
    section.figures = [
        Figure("acknowledged predictions", len(told.at), ""),
        Figure("rows in the lake", sum(counted.values()), "", note="more than acknowledged: answers cut off by a kill"),
        Figure("acknowledged and not in the lake", len(missing), "", 0 if ack == "durable" else None, at_most=True),
        Figure("of them older than the flush interval", len(late), "", 0, at_most=True),
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
        slay(served)
        told.kills.append(time.monotonic())  # after: what it had sent may still be on its way
    told.take(traffic)


def slay(served: Served) -> None:
    """SIGKILL to the whole group at once, then to whoever left it."""
    tree = served.tree()
    os.killpg(served.process.pid, signal.SIGKILL)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=10)


def unexcused(told: Acknowledged, missing: Sequence[str], flush: float) -> list[str]:
    """Missing ids that were answered longer than `flush` seconds before the kill that followed."""
    late = []
    for name in missing:
        following = [kill for kill in told.kills if kill >= told.at[name] - 1e-3]
        if not flush or not following or min(following) - told.at[name] > flush:
            late.append(name)
    return late


def _lake(home: Path) -> list[str]:
    # Delta's own reader, not the lake's, which would hide a row that is there twice.
    table = DeltaTable(Lake(str(home / "lake"), "taxi", taxi.SCHEMA).address("predictions"))
    names: list[str] = table.to_pyarrow_table(columns=["prediction_id"]).column("prediction_id").to_pylist()
    return names
