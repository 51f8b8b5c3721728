"""What a slow challenger costs the champion: requests/s with and without one, in turns, in one run.

    python -m benchmarks.shadow [--pairs 12] [--seconds 4] [--server-cores 0] [--client-cores 1]

A real MLflow, the real server with every process of its own on the given cores, and clients on the others. The
challenger multiplies matrices of 1,024 x 1,024 for every row, several times slower than the champion answers, so that
it can never keep up: it must be shed. "Without" is a share of 0: it is loaded, and nothing is copied for it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import onnx
import orjson
import psutil
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from noria.decision import Bands
from noria.records import DatasetRef, Evaluation, Window
from noria.runtime import open_session, score
from noria.schema import Column, Schema
from registry.bundle import Contents, Facts
from registry.proof import Proof
from registry.store import Store
from serving import shadow_state
from serving.shadow_state import Status

SCHEMA = Schema(
    (Column("a", "number", required=True), Column("b", "number", required=True)), event_time="at", target="y"
)
QUICK, SLOW = (64, 2), (1024, 4)
"""Size and number of layers of the champion and of the challenger."""
CLIENTS, ROWS = 16, 20
SERVE = (
    "import sys; from noria.settings import load_settings; from serving.reload import serve; "
    "serve(load_settings(home=sys.argv[1]), '127.0.0.1', int(sys.argv[2]), sys.argv[3])"
)


def graph(size: int, layers: int) -> bytes:
    """A network of as many layers of that size over two numbers; its scores lie around 1."""
    generator = np.random.default_rng(0)
    weights = {"axis": np.array([1], np.int64), "one": np.array(1, np.float32)}
    nodes = [helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_column"]) for name in SCHEMA.names]
    nodes.append(helper.make_node("Concat", [f"{name}_column" for name in SCHEMA.names], ["h0"], axis=1))
    for layer in range(layers):
        given = size if layer else len(SCHEMA.names)
        weights[f"w{layer}"] = generator.normal(0, given**-0.5, (given, size)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"h{layers}", "axis"], ["mean"], keepdims=0))
    nodes.append(helper.make_node("Add", ["mean", "one"], ["score"]))
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "bench",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in SCHEMA.names],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def contents_of(model: bytes) -> Contents:
    """A bundle's contents around a graph."""
    generator, start = np.random.default_rng(1), datetime(2020, 1, 1, tzinfo=UTC)
    table = pa.table({name: generator.normal(0, 1, 200) for name in SCHEMA.names})
    scores = pa.array(score(open_session(model, "cpu"), SCHEMA.tensors(table)).astype(float))
    extra = {"at": pa.array([start] * 200, pa.timestamp("us", tz="UTC")), "y": scores, "score": scores}
    reference = pa.table(
        {**dict(zip(table.column_names, table.columns, strict=True)), **extra, "split": ["train"] * 200}
    )
    window = Window(start, start + timedelta(days=180))
    return Contents(
        model=model, facts=Facts("bench", "regression", "absolute_error"), schema=SCHEMA, bands=Bands(),
        proof=Proof.make(model, SCHEMA, table), reference=reference,
        dataset=DatasetRef("bench", window, window.end, {}, 200, "0" * 64),
        evaluations={"candidate": Evaluation(10, {"error": 1.0}), "naive": Evaluation(10, {"error": 2.0})},
    )  # fmt: skip


async def ask(port: int, seconds: float, body: bytes) -> tuple[float, float]:
    """Requests/s and the 99th percentile of the latency in ms."""
    head = f"POST /predict/bench HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            began = time.monotonic()
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in answer.splitlines()[0]:
                raise SystemExit(answer.decode())
            size = next(int(line.split(b":")[1]) for line in answer.lower().splitlines() if b"content-length" in line)
            await reader.readexactly(size)
            latencies.append(time.monotonic() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(latencies) / seconds, float(np.quantile(latencies, 0.99)) * 1000


def spent(server: psutil.Process) -> float:
    """Processor seconds of the server's processes, the shadow left out."""
    processes = [one for one in (server, *server.children(recursive=True)) if "serving.shadow" not in one.cmdline()]
    return sum(one.cpu_times().user + one.cpu_times().system for one in processes)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not _held(condition):
        if time.monotonic() > end:
            raise SystemExit("The server does not get ready.")
        time.sleep(0.1)


def _held(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (httpx.HTTPError, psutil.NoSuchProcess):
        return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(folder: Path, given: argparse.Namespace) -> None:
    """Start everything, take turns, print."""
    registry, port, home = f"http://127.0.0.1:{(number := free_port())}", free_port(), folder / "home"
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--port", str(number), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    with (folder / "log").open("wb") as log:
        mlflow = subprocess.Popen(command, env=quiet, stdout=log, stderr=log, start_new_session=True)
        server = subprocess.Popen([sys.executable, "-c", SERVE, str(home), str(port), registry], stdout=log, stderr=log)
        try:
            psutil.Process(server.pid).cpu_affinity(given.server_cores)
            psutil.Process().cpu_affinity(given.client_cores)
            until(lambda: httpx.get(f"{registry}/health").status_code == 200)
            store = Store(registry)
            for model in (graph(*QUICK), graph(*SLOW)):
                with store.run("bench", "made") as run:
                    store.register(run, contents_of(model))
            store.move("bench", "champion", 1)
            until(lambda: httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200)
            turns(store, psutil.Process(server.pid), port, home, given)
        finally:
            server.terminate()
            server.wait()
            os.killpg(mlflow.pid, signal.SIGKILL)
            mlflow.wait()


def turns(store: Store, server: psutil.Process, port: int, home: Path, given: argparse.Namespace) -> None:
    """Without and with the challenger, pair by pair; which comes first alternates."""
    body, ratios, costs = orjson.dumps([{"a": 0.5, "b": row / ROWS} for row in range(ROWS)]), [], []
    store.move("bench", "challenger", 2)
    set_share(store, home, 1.0)
    asyncio.run(ask(port, 3, body))
    for pair in range(given.pairs):
        found = {}
        for shadowed in ((False, True), (True, False))[pair % 2]:
            set_share(store, home, float(shadowed))
            before = spent(server)
            rate, slowest = asyncio.run(ask(port, given.seconds, body))
            found[shadowed] = rate, slowest, (spent(server) - before) / (rate * given.seconds) * 1000
        status = shadow_state.read(home / "serving" / "shadow" / "status.json", Status).get("bench")
        shed = f"{status.rows:,} rows shadowed, {status.dropped:,} dropped" if status else ""
        ratios.append(found[True][0] / found[False][0])
        costs.append(found[True][2] / found[False][2])
        shown = [f"{rate:,.0f}/s p99 {slowest:.1f} ms, CPU {cost:.3f} ms" for rate, slowest, cost in found.values()]
        print(
            f"{'without | with' if not pair % 2 else 'with | without'}: {' | '.join(shown)} | {ratios[-1]:.3f} {shed}"
        )
    low, high = min(ratios), max(ratios)
    print(
        f"requests/s with a slow challenger / without: median {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
    )
    print(f"the champion's processor time a request, with / without: median {statistics.median(costs):.3f}")


def set_share(store: Store, home: Path, share: float) -> None:
    """Shadow that share of the traffic, and wait until the server has followed."""
    store.client.set_registered_model_tag("bench", "noria.shadow_share", f"{share:g}")

    def followed() -> bool:
        status = shadow_state.read(home / "serving" / "shadow" / "status.json", Status).get("bench")
        return status is not None and (status.status, status.share) == ("shadowing", share)

    until(followed)
    time.sleep(0.5)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--server-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--client-cores", type=int, nargs="+", default=[1])
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {CLIENTS} connections, {ROWS} rows a request")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), given)


if __name__ == "__main__":
    main()
