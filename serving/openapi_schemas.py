"""JSON Schemas of requests and answers that are the same for every model. Not here: a workload's own records, and the
paths (`serving.openapi`)."""

from __future__ import annotations

from typing import Any

from serving.datatypes import NUMPY

Schema = dict[str, Any]


def an_object(**properties: Schema) -> Schema:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def a_list(items: Schema) -> Schema:
    """A list of such items."""
    return {"type": "array", "items": items}


TEXT: Schema = {"type": "string"}
DATATYPE: Schema = {"enum": list(NUMPY)}
SIZES = a_list({"type": "integer", "minimum": 0})
PARAMETERS: Schema = {"type": "object"}


def _tensor(sizes: Schema = SIZES, **more: Schema) -> Schema:
    found = an_object(name=TEXT, datatype=DATATYPE, shape=sizes)
    return {**found, "properties": {**found["properties"], **more}}


TENSOR = _tensor(data={"type": "array"}, parameters=PARAMETERS)
OUTPUT: Schema = {"type": "object", "properties": {"name": TEXT, "parameters": PARAMETERS}, "required": ["name"]}
REQUEST: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": ["string", "null"]},
        "inputs": a_list(TENSOR),
        "outputs": a_list(OUTPUT),
        "parameters": PARAMETERS,
    },
    "required": ["inputs"],
}
"""An inference request of the Open Inference Protocol v2."""

ERROR = an_object(error=TEXT)
INFERRED = an_object(model_name=TEXT, model_version=TEXT, outputs=a_list(TENSOR))
_ANY_SIZES = a_list({"type": "integer", "minimum": -1})
DESCRIBED = an_object(
    name=TEXT,
    versions=a_list(TEXT),
    platform=TEXT,
    inputs=a_list(_tensor(_ANY_SIZES)),
    outputs=a_list(_tensor(_ANY_SIZES)),
)
PREDICTED = an_object(
    workload=TEXT,
    version={"type": "integer"},
    predictions=a_list(
        an_object(id=TEXT, prediction={"type": ["number", "null"]}, action={"type": ["string", "null"]})
    ),
)
ACCEPTED = an_object(workload=TEXT, accepted={"type": "integer", "minimum": 1})
MODEL_READY = an_object(name=TEXT, ready={"type": "boolean"})
SERVER = an_object(name=TEXT, version=TEXT, extensions=a_list(TEXT))
LIVE = an_object(live={"type": "boolean"})
READY = an_object(ready={"type": "boolean"})
_NUMBER_OR_NONE: Schema = {"type": ["integer", "null"]}
STATUS = an_object(
    ready={"type": "boolean"},
    workloads={
        "type": "object",
        "additionalProperties": an_object(
            version=_NUMBER_OR_NONE, pending={"type": "integer"}, segments={"type": "integer"}
        ),
    },
    log=an_object(lost={"type": "integer"}, failure={"type": ["string", "null"]}),
)
