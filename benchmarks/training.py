"""How long a first fit and a retrain of the taxi workload take, stage by stage, on a local Ray, and how good they are.

python -m benchmarks.training            prints Markdown; needs the taxi data (`noria demo` fetches it once)
"""

from __future__ import annotations

import os
import tempfile
import time
from datetime import date
from pathlib import Path

from noria.records import Window, moment
from training import launch
from training.fit import Trained, fit
from training.windows import choose
from workloads.taxi import WORKLOAD


def main() -> None:
    print(f"# Training the taxi model, {date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    start = time.perf_counter()
    launch.connect()
    print(f"Ray started in {time.perf_counter() - start:.1f} s.\n")
    print("| fit | rows | seconds | prepare | train | export | parity | evaluate | test error | boosted | naive |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        first = timed("2018-01..06, first in the process", "2018-01-01", "2018-07-01", Path(folder))
        timed("2018-01..06, again", "2018-01-01", "2018-07-01", Path(folder))
        table = WORKLOAD.records(Window(moment("2019-10-06"), moment("2020-04-05")))
        start = time.perf_counter()
        choice = choose(WORKLOAD, table)
        seconds = time.perf_counter() - start
        since = f"{choice.start:%Y-%m-%d}"
        timed(f"{since}..2020-04-05, warm", since, "2020-04-05", Path(folder), warm=first.weights, held_out=1000)
    print(f"\nChoosing the window: {seconds:.1f} s. {choice.reason()}")
    launch.disconnect()


def timed(name: str, start: str, end: str, storage: Path, **options: object) -> Trained:
    """One fit as a table row."""
    table = WORKLOAD.records(Window(moment(start), moment(end)))
    begun = time.perf_counter()
    trained = fit(WORKLOAD, table, storage=storage, **options)  # type: ignore[arg-type]
    total = time.perf_counter() - begun
    stages = " | ".join(f"{seconds:.1f}" for seconds in trained.seconds.values())
    errors = " | ".join(
        f"{trained.evaluations[subject].metrics['error']:.3f}" for subject in ("candidate", "boosted", "naive")
    )
    print(f"| {name} | {len(table):,} | {total:.1f} | {stages} | {errors} |", flush=True)
    return trained


if __name__ == "__main__":
    main()
