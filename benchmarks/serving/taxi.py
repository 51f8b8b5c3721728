"""A workload of the taxi model's size, made here without training: its graph, its bundle, rows, and a request.

Seven raw columns (timestamp, integers, number, strings), five embeddings, two hidden layers of 64.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import onnx
import orjson
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from benchmarks.serving.bodies import Body
from noria.decision import Bands
from noria.records import DatasetRef, Evaluation, Window
from noria.runtime import open_session, score
from noria.schema import Column, Schema
from registry.bundle import Contents, Facts
from registry.proof import Proof

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


def contents() -> Contents:
    """What a bundle of the graph consists of."""
    model, table, start = graph(), rows_of(500), datetime(2020, 1, 1, tzinfo=UTC)
    scores = pa.array(score(open_session(model, "cpu"), SCHEMA.tensors(table)).astype(float))
    reference = table.append_column("minutes", scores).append_column("score", scores)
    window = Window(start, start + timedelta(days=180))
    return Contents(
        model=model, facts=Facts("taxi", "regression", "absolute_error"), schema=SCHEMA, bands=Bands(),
        proof=Proof.make(model, SCHEMA, table), reference=reference.append_column("split", pa.array(["train"] * 500)),
        dataset=DatasetRef("taxi", window, window.end, {}, 500, "0" * 64),
        evaluations={"candidate": Evaluation(10, {"error": 1.0}), "naive": Evaluation(10, {"error": 2.0})},
    )  # fmt: skip


def records_of(count: int) -> Body:
    """A request to `/predict/taxi`."""
    records = [{**row, "pickup": row["pickup"].isoformat()[:19]} for row in rows_of(count).to_pylist()]
    return Body(orjson.dumps({"records": records}))
