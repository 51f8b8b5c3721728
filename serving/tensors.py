"""The JSON form of the Open Inference Protocol v2: each raw column is an input tensor of shape [n] or [n, 1].

Missing values: null, or "" in a BYTES tensor. Outputs: `score`, `action` and `prediction_id`. Source of the protocol:
github.com/kserve/open-inference-protocol, specification/protocol. Not here: binary tensors, gRPC, model repositories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from noria.column import MISSING, NUMPY, Column, parse_column, parse_value
from noria.errors import SchemaError
from noria.schema import Schema
from serving.model import COLUMN_TYPES, Model, Tensor
from serving.protocol import event_times, limit_rows, parse_json
from serving.wire import Refusal, Rows

WHOLE = frozenset({"INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"})
DECIMAL = frozenset({"FP16", "FP32", "FP64"})
ACCEPTED = {
    "number": WHOLE | DECIMAL,
    "integer": WHOLE,
    "string": frozenset({"BYTES"}),
    "text": frozenset({"BYTES"}),
    "timestamp": frozenset({"INT64", "BYTES"}),
}


def metadata(model: Model) -> dict[str, Any]:
    """What `GET /v2/models/{name}` answers."""

    def tensors(entries: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in entries]

    return {
        "name": model.workload,
        "versions": [str(model.version)],
        "platform": "onnxruntime_onnx",
        "inputs": tensors(model.inputs),
        "outputs": tensors(model.outputs),
    }


def example(schema: Schema, record: Mapping[str, Any]) -> dict[str, Any]:
    """A request of one row."""
    inputs = []
    for column in schema.columns:
        value = record.get(column.name)
        datatype = "BYTES" if isinstance(value, str) else COLUMN_TYPES[column.kind]
        inputs.append({"name": column.name, "datatype": datatype, "shape": [1], "data": [value]})
    return {"inputs": inputs}


def decode_infer(body: bytes, schema: Schema) -> tuple[Rows, str | None]:
    """Rows of an inference request, and its id.

    Raises:
        Refusal: 400 not JSON or not the protocol, 413 too many rows. SchemaError: a tensor breaks the schema.
    """
    content = parse_json(body)
    inputs = content.get("inputs") if isinstance(content, dict) else None
    if not isinstance(inputs, list):
        raise Refusal(400, 'An inference request is {"inputs": [{"name", "datatype", "shape", "data"}, ...]}.')
    name = content.get("id")
    if name is not None and not isinstance(name, str):
        raise Refusal(400, "'id' must be a string.")
    given = _by_name(inputs, schema)
    size = _size(given)
    time = Column(schema.event_time, "timestamp")
    columns = (*schema.columns, *(() if schema.event_time in schema.names else (time,)))
    tensors = {column.name: _column(column, given.get(column.name), size) for column in columns}
    seconds = tensors[schema.event_time]
    if schema.event_time not in schema.names:
        del tensors[schema.event_time]
    schema.check(tensors)
    return Rows(tensors, size, event_times(seconds)), name


def encode_infer(
    workload: str,
    version: int,
    request: str | None,
    *,
    ids: Sequence[str],
    scores: np.ndarray,
    actions: Sequence[str | None],
) -> bytes:
    """The inference response."""
    answer: dict[str, Any] = {"model_name": workload, "model_version": str(version)}
    if request is not None:
        answer["id"] = request
    shape = [len(ids)]
    answer["outputs"] = [
        {"name": "score", "datatype": "FP32", "shape": shape, "data": scores},
        {"name": "action", "datatype": "BYTES", "shape": shape, "data": [action or "" for action in actions]},
        {"name": "prediction_id", "datatype": "BYTES", "shape": shape, "data": ids},
    ]
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _by_name(inputs: Sequence[Any], schema: Schema) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {}
    known = {*schema.names, schema.event_time}
    for entry in inputs:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise Refusal(400, "Every input is an object with name, datatype, shape and data.")
        if name not in known:
            raise SchemaError(f"There is no input '{name}'; there are: {', '.join(schema.names)}.", name)
        if name in given:
            raise SchemaError(f"The input '{name}' is there twice.", name)
        given[name] = entry
    return given


def _size(given: dict[str, dict[str, Any]]) -> int:
    """The number of rows that all inputs agree on."""
    if not given:
        raise Refusal(422, "There are no inputs; send one tensor a column.")
    sizes = {}
    for name, entry in given.items():
        match entry.get("shape"):
            case [int(rows)] | [int(rows), 1] if rows >= 0:
                sizes[name] = rows
            case _:
                raise SchemaError(f"The input '{name}' must have the shape [n] or [n, 1].", name)
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {rows}" for name, rows in sizes.items())
        raise Refusal(422, f"The inputs differ in their number of rows: {shown}.")
    size = int(next(iter(sizes.values())))
    if size == 0:
        raise Refusal(422, "There are no rows; send at least one.")
    limit_rows(size, "rows")
    return size


def _column(column: Column, entry: dict[str, Any] | None, size: int) -> np.ndarray:
    """One input as the graph's tensor [n]; a column that was not sent is missing in every row."""
    kind = column.kind
    if entry is None:
        return np.full(size, MISSING[kind], NUMPY[kind])
    datatype, data = entry.get("datatype"), entry.get("data")
    if not isinstance(datatype, str) or datatype not in ACCEPTED[kind]:
        wanted = ", ".join(sorted(ACCEPTED[kind]))
        sentence = f"The input '{column.name}' has the datatype {str(datatype)[:20]}; it must be one of {wanted}."
        raise SchemaError(sentence, column.name)
    if not isinstance(data, list):
        raise SchemaError(f"The input '{column.name}' has no data; send it as a list of {size} values.", column.name)
    if data and isinstance(data[0], list):
        data = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in data]
    if len(data) != size:
        raise SchemaError(f"The input '{column.name}' has {len(data)} values and the shape says {size}.", column.name)
    quick = parse_column(column, data)
    return _careful(column, data) if quick is None else quick


def _careful(column: Column, data: list[Any]) -> np.ndarray:
    """Value by value, as records are read: ISO times, and the sentence that names the row of a wrong one."""
    optional = Column(column.name, column.kind)
    values = [parse_value(optional, value, row) for row, value in enumerate(data)]
    return np.array(values, NUMPY[column.kind])
