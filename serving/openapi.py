"""The OpenAPI description of what the server answers now: one set of paths a model, filled from its schema.

Not here: what is the same for every model (`serving.openapi_schemas`), and what only operators may ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version as installed
from math import prod
from typing import Any

from noria.column import Column
from registry.bundle import Bundle
from serving import openapi_schemas as schemas
from serving import tensors
from serving.model import Model
from serving.openapi_schemas import a_list, an_object
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
    "408": "The body did not arrive in time.",
    "415": "The content type is not one that is read.",
    "422": "A record breaks the schema; the sentence names field and row.",
    "503": "No version of the workload is ready, too many requests wait, or labels do not reach the disk.",
    "504": "The deadline of the request passed.",
}
"""Of the routes that take a body."""
ABOUT_STATUSES = {"404": ERROR_STATUSES["404"], "503": "No version of the workload is ready."}
"""Of what is told about a model."""
EVERYWHERE = {
    "401": "Keys are on, and the request has none that is known.",
    "403": "The key does not have the role that this needs.",
    "421": "The server does not answer for this host.",
    "429": "The key has asked too often; Retry-After says when it may again.",
}


def describe(models: Iterable[Model]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for model in models:
        paths |= _paths(model)
    for path, summary in FIXED.items():
        paths[path] = _get("server", summary, FIXED_ANSWERS.get(path))
    paths["/v2/health/ready"]["get"]["responses"]["503"] = _answer("Something is not ready.", schemas.READY)
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
FIXED_ANSWERS = {
    "/status": schemas.STATUS,
    "/v2": schemas.SERVER,
    "/v2/health/live": schemas.LIVE,
    "/v2/health/ready": schemas.READY,
}
"""/metrics is text."""
VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 1}}


def column_schema(column: Column) -> dict[str, Any]:
    """One column as JSON Schema."""
    found = TYPES[column.kind] if column.required else _or_null(TYPES[column.kind])
    about = column.description or found.get("description")
    limits = {"description": about, "minimum": column.low, "maximum": column.high}
    return {**found, **{name: value for name, value in limits.items() if value is not None}}


def _paths(model: Model) -> dict[str, Any]:
    name = model.workload
    found = {} if model.bundle is None else _for_people(name, model.bundle)
    if model.bundle is None:
        summary, example = "Run the model on tensors", plain_example(model)
    else:
        example = tensors.example(model.bundle.schema, model.bundle.proof.records[0])
        summary = "Predict, in the Open Inference Protocol"
    place = f"/v2/models/{name}"
    parameters = [{**VERSION, "example": model.version}]
    for path, more in ((place, {}), (f"{place}/versions/{{version}}", {"parameters": parameters})):
        found |= {
            path: _get(name, "Inputs and outputs", schemas.DESCRIBED, ABOUT_STATUSES) | more,
            f"{path}/ready": _get(name, "Whether it answers", schemas.MODEL_READY, ABOUT_STATUSES) | more,
            f"{path}/infer": _post(name, summary, (schemas.REQUEST, schemas.INFERRED), example, OCTETS) | more,
        }
    return found


def _for_people(name: str, bundle: Bundle) -> dict[str, Any]:
    """Records in, predictions out; labels in."""
    schema = bundle.schema
    columns = schema.columns
    if schema.event_time not in schema.names:
        columns = (*columns, Column(schema.event_time, "timestamp", description="when it happened; without it, now"))
    record = {
        "type": "object",
        "properties": {column.name: column_schema(column) for column in columns},
        "required": [column.name for column in columns if column.required],
        "additionalProperties": False,
    }
    label = {
        "type": "object",
        "properties": {
            "id": {"type": "string", "minLength": 1, "maxLength": 100},
            "label": {"type": "number"},
            "time": _or_null(TYPES["timestamp"]),
        },
        "required": ["id", "label"],
        "additionalProperties": False,
    }
    records, labels = _several(record), _several(label)
    return {
        f"/predict/{name}": _post(
            name,
            f"Predict {schema.target}",
            ({"anyOf": [_only("records", records), records, record]}, schemas.PREDICTED),
            {"records": [bundle.proof.records[0]]},
            ARROW_STREAM,
        ),
        f"/feedback/{name}": _post(
            name,
            "Tell what really happened, by prediction id",
            ({"anyOf": [an_object(labels=labels), labels]}, schemas.ACCEPTED),
            {"labels": [{"id": "0" * 32, "label": 1}]},
        ),
    }


def _several(items: dict[str, Any]) -> dict[str, Any]:
    return {**a_list(items), "minItems": 1, "maxItems": MOST_ROWS}


def _only(name: str, inner: dict[str, Any]) -> dict[str, Any]:
    return {**an_object(**{name: inner}), "additionalProperties": False}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema["type"]
    return {**schema, "type": [*(kind if isinstance(kind, list) else [kind]), "null"]}


def plain_example(model: Model) -> dict[str, Any]:
    """A request of a plain model: one row of zeros, 1 for every other free size."""
    inputs = []
    for one in model.inputs:
        shape = [1 if size == -1 else size for size in one.shape]
        zero = {"BYTES": "", "BOOL": False}.get(one.datatype, 0)
        data = [zero] * min(prod(shape), LONGEST_EXAMPLE)
        inputs.append({"name": one.name, "datatype": one.datatype, "shape": shape, "data": data})
    return {"inputs": inputs}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _refusals(statuses: Mapping[str, str]) -> dict[str, Any]:
    return {status: _answer(text, schemas.ERROR) for status, text in {**statuses, **EVERYWHERE}.items()}


def _get(tag: str, summary: str, schema: dict[str, Any] | None, statuses: Mapping[str, str] = {}) -> dict[str, Any]:
    """A GET; without a schema it answers text."""
    text = {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    responses = {"200": text if schema is None else _answer("OK", schema), **_refusals(statuses)}
    return {"get": {"summary": summary, "tags": [tag], "responses": responses}}


def _post(
    tag: str,
    summary: str,
    schema: tuple[dict[str, Any], dict[str, Any]],
    example: dict[str, Any],
    other: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """A POST that takes JSON, and beside it bytes of another content type, which is answered in kind.

    `schema` is the request's and the answer's.
    """
    asked: dict[str, Any] = {"application/json": {"schema": schema[0], "example": example}}
    responses = {"200": _answer("OK", schema[1]), **_refusals(ERROR_STATUSES)}
    if other is not None:
        octets = {"schema": {"type": "string", "format": "binary", "description": other[1]}}
        asked[other[0]] = responses["200"]["content"][other[0]] = octets
    return {
        "post": {
            "summary": summary,
            "tags": [tag],
            "requestBody": {"required": True, "content": asked},
            "responses": responses,
        }
    }
