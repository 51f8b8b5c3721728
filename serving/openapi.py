"""The OpenAPI description of what the server answers now: one set of paths a workload, filled from its schema."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version as installed
from math import prod
from typing import Any

from noria.column import Column
from serving import tensors
from serving.datatypes import NUMPY
from serving.model import Model
from serving.protocol import MOST_ROWS

TYPES: dict[str, dict[str, Any]] = {
    "number": {"type": "number"},
    "integer": {"type": "integer", "format": "int64"},
    "string": {"type": "string"},
    "text": {"type": "string"},
    "timestamp": {
        "type": ["string", "integer"],
        "description": "ISO 8601 (UTC where it names no zone) or seconds since 1970",
    },
}
TENSOR = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "datatype": {"enum": list(NUMPY)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "array"},
        "parameters": {"type": "object"},
    },
    "required": ["name", "datatype", "shape"],
}
OUTPUT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
    "required": ["name"],
}
REQUEST: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": TENSOR},
        "outputs": {"type": "array", "items": OUTPUT},
        "parameters": {"type": "object"},
    },
    "required": ["inputs"],
}
"""An inference request of the Open Inference Protocol v2."""
ARROW_STREAM = (
    "application/vnd.apache.arrow.stream",
    "An Arrow IPC stream: the columns by name; answered with the columns id, prediction and action.",
)
OCTETS = (
    "application/octet-stream",
    "The JSON, as long as the header Inference-Header-Content-Length says, and the tensors' bytes behind it.",
)
LONGEST_EXAMPLE = 1000
ERROR_STATUSES = {
    "400": "The body is not what its content type says; in the Open Inference Protocol, whatever is wrong with it.",
    "413": "Too many bytes or rows.",
    "404": "There is no such model or version.",
    "415": "The content type is not one that is read.",
    "422": "A record breaks the schema; the sentence names field and row.",
    "503": "No version of the workload is ready, or too many requests wait.",
    "504": "The deadline of the request passed.",
}


def describe(models: Iterable[Model]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for model in models:
        paths |= _paths(model)
    plain = {"200": {"description": "OK"}}
    for path, summary in FIXED.items():
        paths[path] = {"get": {"summary": summary, "tags": ["server"], "responses": plain}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "noria", "version": installed("noria"), "description": "Predictions of the champions."},
        "paths": paths,
    }


FIXED = {
    "/status": "What serves, since when, and how much of the log is not in the lake yet",
    "/metrics": "Counters for Prometheus",
    "/v2": "The server, in the Open Inference Protocol",
    "/v2/health/live": "Whether the process answers",
    "/v2/health/ready": "Whether every workload that should serve does",
}


def column_schema(column: Column) -> dict[str, Any]:
    """One column as JSON Schema."""
    found = dict(TYPES[column.kind])
    if not column.required:
        kind = found["type"]
        found["type"] = [*(kind if isinstance(kind, list) else [kind]), "null"]
    about = column.description or found.get("description")
    limits = {"description": about, "minimum": column.low, "maximum": column.high}
    return {**found, **{name: value for name, value in limits.items() if value is not None}}


def _paths(model: Model) -> dict[str, Any]:
    name = model.workload
    described = {"summary": "Inputs and outputs", "tags": [name], "responses": {"200": {"description": "OK"}}}
    about = {f"/v2/models/{name}": {"get": described}}
    if model.bundle is None:
        path = f"/v2/models/{name}/infer"
        return about | {path: _post(name, "Run the model on tensors", REQUEST, plain_example(model), OCTETS)}
    schema, example = model.bundle.schema, model.bundle.proof.records[0]
    columns = schema.columns
    if schema.event_time not in schema.names:
        columns = (*columns, Column(schema.event_time, "timestamp", description="when it happened; without it, now"))
    record = {
        "type": "object",
        "properties": {column.name: column_schema(column) for column in columns},
        "required": [column.name for column in columns if column.required],
        "additionalProperties": False,
    }
    records = {"type": "array", "items": record, "minItems": 1, "maxItems": MOST_ROWS}
    label = {
        "type": "object",
        "properties": {"id": {"type": "string"}, "label": {"type": "number"}, "time": TYPES["timestamp"]},
        "required": ["id", "label"],
    }
    return about | {
        f"/predict/{name}": _post(
            name, f"Predict {schema.target}", _object("records", records), {"records": [example]}, ARROW_STREAM
        ),
        f"/feedback/{name}": _post(
            name,
            "Tell what really happened, by prediction id",
            _object("labels", {"type": "array", "items": label, "minItems": 1, "maxItems": MOST_ROWS}),
            {"labels": [{"id": "0" * 32, "label": 1}]},
        ),
        f"/v2/models/{name}/infer": _post(
            name, "Predict, in the Open Inference Protocol", REQUEST, tensors.example(schema, example), OCTETS
        ),
    }


def _object(name: str, inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: inner}, "required": [name]}


def plain_example(model: Model) -> dict[str, Any]:
    """A request of a plain model: one row of zeros, 1 for every other free size."""
    inputs = []
    for one in model.inputs:
        shape = [1 if size == -1 else size for size in one.shape]
        zero = {"BYTES": "", "BOOL": False}.get(one.datatype, 0)
        data = [zero] * min(prod(shape), LONGEST_EXAMPLE)
        inputs.append({"name": one.name, "datatype": one.datatype, "shape": shape, "data": data})
    return {"inputs": inputs}


def _post(
    tag: str, summary: str, schema: dict[str, Any], example: dict[str, Any], other: tuple[str, str] | None = None
) -> dict[str, Any]:
    """A POST that takes JSON, and beside it bytes of another content type, which is answered in kind."""
    error = {"type": "object", "properties": {"error": {"type": "string"}}}
    responses: dict[str, Any] = {"200": {"description": "OK"}}
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if other is not None:
        octets = {"type": "string", "format": "binary", "description": other[1]}
        content[other[0]] = {"schema": octets}
        responses["200"]["content"] = {"application/json": {}, other[0]: {"schema": octets}}
    for status, text in ERROR_STATUSES.items():
        responses[status] = {"description": text, "content": {"application/json": {"schema": error}}}
    return {
        "post": {
            "summary": summary,
            "tags": [tag],
            "requestBody": {"required": True, "content": content},
            "responses": responses,
        }
    }
