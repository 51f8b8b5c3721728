"""The limits, measured where nothing is in between: a function called again and again in this process.

    python -m benchmarks.serving.inprocess run MODEL ROWS SECONDS       session.run alone
    python -m benchmarks.serving.inprocess row MODEL SECONDS            decode + run + encode of one JSON row
    python -m benchmarks.serving.inprocess predict ROWS SECONDS         decode + run + encode of taxi records

Prints one line of JSON, as `benchmarks.serving.load` does for a server. Meant to be pinned to the server's core.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import orjson

from benchmarks.serving import bodies, models, taxi
from benchmarks.serving.bodies import Answered
from benchmarks.serving.load import Loaded
from noria.runtime import open_session, score

WARM = 0.3


def run_of(path: Path, count: int) -> Callable[[], object]:
    """`session.run` on rows that lie ready."""
    session, rows = models.session(path), models.rows_of(path.parent.parent.name, count)
    return lambda: session.run(None, {"x": rows})


def row_of(path: Path) -> Callable[[], object]:
    """One JSON row in, one JSON answer out, as the floor does it."""
    session, body = models.session(path), bodies.V2.write(models.rows_of(path.parent.parent.name, 1)).content

    def call() -> bytes:
        tensor = orjson.loads(body)["inputs"][0]
        x = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        scores = session.run(None, {"x": x})[0]
        output = {"name": "y", "shape": list(scores.shape), "datatype": "FP32", "data": scores.ravel().tolist()}
        return orjson.dumps({"model_name": "small", "outputs": [output]})

    assert not bodies.wrong(bodies.V2, Answered(200, {}, call()), models.expected(path, models.rows_of("small", 1)))
    return call


def predict_of(count: int) -> Callable[[], object]:
    """Records decoded by the schema, scored, written as `/predict` answers them; no ids are made, nothing is logged."""
    session, body = open_session(taxi.graph(), "cpu"), taxi.records_of(count).content
    names = [f"{row:032x}" for row in range(count)]

    def call() -> bytes:
        scores = score(session, taxi.SCHEMA.parse(orjson.loads(body)["records"]))
        predictions = [
            {"id": name, "prediction": value, "action": None}
            for name, value in zip(names, scores.tolist(), strict=True)
        ]
        return orjson.dumps({"workload": "taxi", "version": 1, "predictions": predictions})

    return call


def measure(call: Callable[[], object], seconds: float) -> Loaded:
    """Calls a second; latencies in milliseconds."""
    warm = time.perf_counter() + WARM
    while time.perf_counter() < warm:
        call()
    latencies: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        call()
        latencies.append(time.perf_counter() - now)
    taken = time.perf_counter() - began
    middle, slow = np.percentile(np.array(latencies) * 1000, [50, 99])
    return Loaded(len(latencies) / taken, float(middle), float(slow), len(latencies), 0, 0)


def main(what: str, *given: str) -> None:
    """Measure one limit and print it."""
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "run": lambda: run_of(Path(given[0]), int(given[1])),
        "row": lambda: row_of(Path(given[0])),
        "predict": lambda: predict_of(int(given[0])),
    }
    print(json.dumps(asdict(measure(makers[what](), float(given[-1])))))


if __name__ == "__main__":
    main(*sys.argv[1:])
