"""The flow that scores a whole table with the champion: a Parquet file, or newest records of the lake.

Results go beside the source, predictions go to the log like online ones, so that watch and retrain see them too.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.names import run_name
from flows.site import Site, now_of
from noria.errors import DataError
from noria.lake import Lake
from noria.records import Window
from noria.schema import ARROW
from noria.workload import Workload, load
from registry.bundle import Bundle
from registry.store import Store
from training.score import score


@flow(name="batch", flow_run_name=run_name, persist_result=True)
def batch(workload: str, source: str | None = None, now: str | None = None) -> dict[str, Any]:
    """Score a Parquet file or, without one, the lake's newest records.

    Args:
        workload: import string, as module:NAME.
        source: path of a Parquet file with the raw columns; None for the lake's records of the window that ends `now`.
        now: ISO time; None for the clock, or for the end of a recorded stream.
    """
    site, contract = Site.here(), load(workload)
    end = now_of(contract, now)
    store = Store(site.address("mlflow_uri"))
    champion = store.version(contract.name, "champion")
    if champion is None:
        raise DataError(f"{contract.name} has no champion to score with; promote a version first.")
    bundle = store.fetch(champion, site.settings.bundles)
    lake = site.lake(contract)
    rows = read(contract, lake, source, end)
    scored = score_rows(bundle, rows, site.settings.ray_address or None)
    # The name makes a repeat a no-op: the same rows, version and time are logged once.
    name = batch_name(rows, champion.number, end)
    named = name_rows(scored, name)
    folder = Path(source).absolute().parent if source else site.settings.root / "batch"
    output = write(named, folder / f"{Path(source).stem if source else contract.name}-scored.parquet")
    log_predictions(lake, named, contract, version=champion.number, batch=name)
    summary = {"rows": len(named), "version": champion.number, "output": str(output)}
    create_table_artifact(
        [summary], key=f"batch-{contract.name}".replace("_", "-"), description="What the last batch scored"
    )
    return summary


@task(name="read", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def read(workload: Workload, lake: Lake, source: str | None, end: datetime) -> pa.Table:
    """The rows to score, conforming to the schema. Raises DataError when there are none."""
    if source is None:
        rows = lake.records(Window.last(workload.drift.window, end))
    elif Path(source).is_file():
        rows = pq.read_table(source)
    else:
        raise DataError(f"There is no file {source}; give the path of a Parquet file with the raw columns.")
    if not len(rows):
        raise DataError(f"There are no rows to score in {source or f'the window that ends {end}'}.")
    time = workload.schema.event_time
    if time not in rows.column_names:
        rows = rows.append_column(time, pa.array([end] * len(rows), ARROW["timestamp"]))
    return workload.schema.conform(rows)


@task(name="score", cache_policy=NO_CACHE)
def score_rows(bundle: Bundle, rows: pa.Table, ray_address: str | None) -> pa.Table:
    """`rows` with the columns `score` and `action`."""
    scores = score(bundle, rows, ray_address=ray_address)
    scored = rows.append_column("score", pa.array(scores, pa.float64()))
    return scored.append_column("action", pa.array(bundle.bands.actions(scores), pa.string()))


def batch_name(rows: pa.Table, version: int, end: datetime) -> str:
    """Names a batch after its rows, the version that scores them and the time: 16 hexadecimal digits."""
    digest = hashlib.sha256(f"{version} {end.isoformat()}".encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        # Taken anew, since slices and chunks of equal rows differ in their unused bytes.
        writer.write_table(rows.combine_chunks().take(pa.array(range(len(rows)), pa.int64())))
    digest.update(sink.getvalue())
    return digest.hexdigest()[:16]


def name_rows(scored: pa.Table, batch: str) -> pa.Table:
    """Give each row a prediction id made of its batch and its place in it: scoring the same again names it the same."""
    ids = [f"{batch}{index:016x}" for index in range(len(scored))]
    return scored.append_column("prediction_id", pa.array(ids, pa.string()))


@task(name="write", cache_policy=NO_CACHE)
def write(scored: pa.Table, output: Path) -> Path:
    """Write the results aside and rename, so that a reader never sees half a file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_suffix(".part")
    pq.write_table(scored, aside)
    aside.replace(output)
    return output


@task(name="log predictions", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def log_predictions(lake: Lake, named: pa.Table, workload: Workload, *, version: int, batch: str) -> None:
    """Append to the prediction log, once a batch."""
    rows = {
        "prediction_id": named.column("prediction_id"),
        "event_time": named.column(workload.schema.event_time),
        "version": pa.array([version] * len(named), pa.int64()),
        "score": named.column("score"),
        "action": named.column("action"),
        "latency_ms": pa.nulls(len(named), pa.float64()),
        **{name: named.column(name) for name in workload.schema.names},
    }
    lake.append("predictions", pa.table(rows), batch=(f"batch:{batch}", 0))
