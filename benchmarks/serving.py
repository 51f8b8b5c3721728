"""How much of a core noria's server needs: requests/s and latency of the whole server beside the bare `session.run`.

    python -m benchmarks.serving [--seconds 4] [--rows 1 64 1024] [--clients 1 16]

Starts the real worker (capture on, log written before each answer) on a bundle made here, without MLflow, and asks it
from this process over keep-alive connections. The client is Python, too, and shares the machine: rates are a floor.
`CPU ms` is the processor time that the serving process spent on a request: it depends less on who else is busy.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import orjson
import psutil
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from noria.decision import Bands
from noria.records import DatasetRef, Evaluation, Window
from noria.runtime import open_session, score
from noria.schema import Column, Schema
from registry.bundle import Contents, Facts, write
from registry.proof import Proof
from serving import state
from serving.capture import Log
from serving.engine import Engine
from serving.metrics import Metrics
from serving.service import Service
from serving.state import Desired
from serving.supervise import Worker, listen

SCHEMA = Schema(
    (
        Column("pickup", "timestamp", required=True),
        Column("from_zone", "integer"),
        Column("to_zone", "integer"),
        Column("distance", "number", low=0, high=100),
        Column("passengers", "integer", low=0),
        Column("vendor", "string"),
        Column("rate", "string"),
    ),
    event_time="pickup",
    target="minutes",
)  # fmt: skip
HIDDEN = 64


def graph() -> bytes:
    """A network of the taxi model's size: embeddings of zones and levels, two hidden layers of 64."""
    generator = np.random.default_rng(0)
    nodes, weights, parts = [], {}, []

    def embed(name: str, ids: str, size: int) -> None:
        weights[f"{name}_table"] = generator.normal(0, 0.1, (size, 16)).astype(np.float32)
        nodes.append(helper.make_node("Gather", [f"{name}_table", ids], [f"{name}_vector"]))
        parts.append(f"{name}_vector")

    for name in ("from_zone", "to_zone"):
        keys = list(range(1, 265))
        nodes.append(helper.make_node(
            "LabelEncoder", [name], [f"{name}_id"], domain="ai.onnx.ml",
            keys_int64s=keys, values_int64s=keys, default_int64=0,
        ))  # fmt: skip
        embed(name, f"{name}_id", 265)
    for name in ("vendor", "rate"):
        nodes.append(helper.make_node(
            "LabelEncoder", [name], [f"{name}_id"], domain="ai.onnx.ml",
            keys_strings=["1", "2", "3"], values_int64s=[1, 2, 3], default_int64=0,
        ))  # fmt: skip
        embed(name, f"{name}_id", 4)
    weights |= {"hour": np.array(3600, np.int64), "week": np.array(168, np.int64), "one": np.array([1], np.int64)}
    weights["usual"] = np.array(3, np.float32)
    nodes += [
        helper.make_node("IsNaN", ["distance"], ["absent"]),
        helper.make_node("Where", ["absent", "usual", "distance"], ["miles"]),
        helper.make_node("Div", ["pickup", "hour"], ["hours"]),
        helper.make_node("Mod", ["hours", "week"], ["pickup_id"]),
        helper.make_node("Unsqueeze", ["miles", "one"], ["distance_column"]),
    ]
    embed("pickup", "pickup_id", 168)
    parts.append("distance_column")
    width = 16 * 5 + 1
    nodes.append(helper.make_node("Concat", parts, ["h0"], axis=1))
    for layer, (given, made) in enumerate([(width, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]):
        weights[f"w{layer}"] = generator.normal(0, given**-0.5, (given, made)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu" if layer < 2 else "Exp", [f"m{layer}"], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("Squeeze", ["h3", "one"], ["score"]))
    kinds = {"number": TensorProto.FLOAT, "string": TensorProto.STRING}
    inputs = [
        helper.make_tensor_value_info(column.name, kinds.get(column.kind, TensorProto.INT64), ["n"])
        for column in SCHEMA.columns
    ]
    output = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 4)]
    made = helper.make_model(helper.make_graph(nodes, "taxi", inputs, [output], constants), opset_imports=opsets)
    made.ir_version = 10
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def rows_of(count: int) -> pa.Table:
    """Rows that look like taxi trips."""
    generator, start = np.random.default_rng(1), datetime(2020, 1, 1, tzinfo=UTC)
    times = [start + timedelta(seconds=int(second)) for second in generator.integers(0, 10_000_000, count)]
    return pa.table({
        "pickup": pa.array(times, pa.timestamp("us", tz="UTC")),
        "from_zone": generator.integers(1, 265, count),
        "to_zone": generator.integers(1, 265, count),
        "distance": generator.exponential(3, count).round(2).clip(0, 90),
        "passengers": generator.integers(1, 6, count),
        "vendor": generator.choice(["1", "2"], count),
        "rate": generator.choice(["1", "2", "5"], count),
    })  # fmt: skip


def bundle(folder: Path) -> None:
    """A bundle of the graph."""
    model, table, start = graph(), rows_of(500), datetime(2020, 1, 1, tzinfo=UTC)
    scores = pa.array(score(open_session(model, "cpu"), SCHEMA.tensors(table)).astype(float))
    reference = table.append_column("minutes", scores).append_column("score", scores)
    window = Window(start, start + timedelta(days=180))
    write(folder, Contents(
        model=model, facts=Facts("taxi", "regression", "absolute_error"), schema=SCHEMA, bands=Bands(),
        proof=Proof.make(model, SCHEMA, table), reference=reference.append_column("split", pa.array(["train"] * 500)),
        dataset=DatasetRef("taxi", window, window.end, {}, 500, "0" * 64),
        evaluations={"candidate": Evaluation(10, {"error": 1.0}), "naive": Evaluation(10, {"error": 2.0})},
    ))  # fmt: skip


def predict_body(count: int) -> bytes:
    """A request to /predict."""
    records = [{**row, "pickup": row["pickup"].isoformat()[:19]} for row in rows_of(count).to_pylist()]
    return orjson.dumps({"records": records})


def infer_body(count: int) -> bytes:
    """The same rows to the v2 route, a tensor a column."""
    kinds = {"number": "FP32", "string": "BYTES"}
    types = {column.name: kinds.get(column.kind, "INT64") for column in SCHEMA.columns}
    inputs = [
        {"name": name, "datatype": types[name], "shape": [count], "data": values.tolist()}
        for name, values in SCHEMA.tensors(rows_of(count)).items()
    ]
    return orjson.dumps({"inputs": inputs})


@dataclass(frozen=True)
class Measured:
    """Requests a second; latencies and processor time of a request in milliseconds."""

    rate: float
    middle: float
    slow: float
    cpu: float


def summary(latencies: list[float], seconds: float, cpu: float) -> Measured:
    """Rate, p50, p99, and each request's share of `cpu` seconds."""
    middle, slow = np.percentile(np.array(latencies) * 1000, [50, 99])
    return Measured(len(latencies) / seconds, float(middle), float(slow), 1000 * cpu / len(latencies))


def bare(call: Callable[[], object], seconds: float) -> Measured:
    """A function called again and again in this process."""
    latencies: list[float] = []
    end, spent = time.perf_counter() + seconds, time.process_time()
    while (began := time.perf_counter()) < end:
        call()
        latencies.append(time.perf_counter() - began)
    return summary(latencies, seconds, time.process_time() - spent)


async def ask(port: int, path: str, body: bytes, *, clients: int, seconds: float) -> Measured:
    """Keep-alive clients, each with one request in flight."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    request, latencies = head.encode() + body, []
    (worker,) = psutil.Process().children()
    end, before = time.perf_counter() + seconds, worker.cpu_times()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        while (began := time.perf_counter()) < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            latencies.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    after = worker.cpu_times()
    return summary(latencies, seconds, after.user + after.system - before.user - before.system)


async def until_ready(port: int) -> None:
    """Wait until the worker serves."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.2)


def line(name: str, rows: int, clients: int | str, found: Measured) -> None:
    """One row of the table."""
    figures = f"{found.rate:,.0f} | {found.rate * rows:,.0f} | {found.middle:.2f} | {found.slow:.2f} | {found.cpu:.3f}"
    print(f"| {name} | {rows} | {clients} | {figures} |", flush=True)


def machine() -> str:
    """What it was measured on."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"onnxruntime {onnxruntime.__version__}, revision {asked.stdout.strip()}, load before the run {load}"
    )


COLUMNS = ("what", "rows", "connections", "requests/s", "rows/s", "p50 ms", "p99 ms", "CPU ms")
ROUTES = {"predict": ("/predict/taxi", predict_body), "infer": ("/v2/models/taxi/infer", infer_body)}


def in_process(folder: Path) -> Service:
    """The handler without HTTP, its log included."""
    engine = Engine("cpu")
    engine.take(Desired("taxi", 1, str(folder / "bundle"), "benchmark"))
    return Service(engine, Log(folder / "own", "benchmark"), Metrics())


def measure(folder: Path, port: int, given: argparse.Namespace) -> None:
    """Every row of the table."""
    service = in_process(folder)
    session = service.engine.models["taxi"].session
    for rows in given.rows:
        tensors = SCHEMA.tensors(rows_of(rows))
        line("session.run alone", rows, "-", bare(partial(score, session, tensors), given.seconds))
        for route, (path, make) in ROUTES.items():
            body = make(rows)
            line(f"{route}, no HTTP", rows, "-", bare(partial(service.handle, route, "taxi", body), given.seconds))
            for clients in given.clients:
                found = asyncio.run(ask(port, path, body, clients=clients, seconds=given.seconds))
                line(path, rows, clients, found)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    given = parser.parse_args()
    print(machine(), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        bundle(folder / "bundle")
        state.write(folder / "serving" / "desired", Desired("taxi", 1, str(folder / "bundle"), "benchmark"))
        listener = listen("127.0.0.1", 0)
        worker = Worker(listener, folder / "serving", "cpu")
        worker.start()
        try:
            port = listener.getsockname()[1]
            asyncio.run(until_ready(port))
            measure(folder, port, given)
        finally:
            worker.stop()


if __name__ == "__main__":
    main()
