"""What an export costs: the first and later ones in a process, the graph's size and speed, with and without text.

python -m benchmarks.export              prints Markdown; needs no data
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import pyarrow as pa

from noria.options import TrainingOptions
from noria.runtime import open_session, run_all, score
from noria.schema import Column, Schema, Tensors
from training import parity, preprocess
from training.export import export
from training.loop import Job
from training.model import Scored

TABULAR = (Column("a", "number"), Column("b", "integer"), Column("c", "string"), Column("at", "timestamp"))
TEXT = (*TABULAR, Column("text", "text"))
WORDS = np.array([f"word{index}" for index in range(3000)], object)


def main() -> None:
    print(f"# Export, {date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| schema | export first | export again | parity | bytes | preprocessing, 1024 rows | 1 row | 1024 rows |")
    print("|---|---|---|---|---|---|---|---|")
    for name, columns in (("number, id, level, time", TABULAR), ("the same with 200 words of text", TEXT)):
        row(name, Schema(columns, event_time="at", target="y"))


def row(name: str, schema: Schema) -> None:
    """One schema as a table row."""
    table = rows(schema, 4096)
    raw = schema.tensors(table)
    prepared = preprocess.fit(schema, table, TrainingOptions())
    scored: Scored = Job(
        prepared.inputs, "training.model:TabularNet", TrainingOptions(), "absolute_error", "exp", 1.0, 1.0
    ).build()
    first, model = clock(lambda: export(scored, prepared))
    again, _ = clock(lambda: export(scored, prepared))
    proven, _ = clock(lambda: parity.check(model, scored, prepared, schema, raw))
    session, before = open_session(model), open_session(prepared.model)
    one, many = cut(raw, 1), cut(raw, 1024)
    alone = best(lambda: score(session, one), 300)
    batch, only = best(lambda: score(session, many), 20), best(lambda: run_all(before, many), 20)
    print(
        f"| {name} | {first:.1f} s | {again:.1f} s | {proven:.1f} s | {len(model):,} | {only * 1e3:.2f} ms | "
        f"{alone * 1e3:.3f} ms | {batch * 1e3:.2f} ms |",
        flush=True,
    )


def rows(schema: Schema, size: int) -> pa.Table:
    """Random raw rows."""
    generator = np.random.default_rng(0)
    columns: dict[str, object] = {
        "a": generator.normal(size=size),
        "b": generator.integers(0, 300, size),
        "c": generator.choice(["x", "y", "z"], size),
        "at": pa.array(
            np.datetime64("2020-01-01", "us") + np.arange(size) * np.timedelta64(1, "h"), pa.timestamp("us", "UTC")
        ),
    }
    if "text" in schema.names:
        columns["text"] = [" ".join(generator.choice(WORDS, 200)) for _ in range(size)]
    return pa.table(columns)


def cut(raw: Tensors, size: int) -> Tensors:
    return {name: values[:size] for name, values in raw.items()}


def clock(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and what the work returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def best(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call."""
    return float(np.median([clock(work)[0] for _ in range(repeats)]))


if __name__ == "__main__":
    main()
