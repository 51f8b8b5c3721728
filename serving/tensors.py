"""Inference requests of the Open Inference Protocol v2 over HTTP: JSON, with tensors in it or as bytes behind it.

A workload takes its raw columns (`serving.columns`) and answers `score`, `action` and `prediction_id`; a plain model
takes and answers its graph's own tensors, and `prediction_id` where it is asked for by name. Source of the protocol:
github.com/kserve/open-inference-protocol, specification/protocol. Not here: gRPC (`serving.rpc`), model repositories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

import orjson

from noria.errors import SchemaError
from noria.schema import Schema
from serving import binary
from serving.columns import Given, to_rows
from serving.forms import LONGEST_HEAD, frame_of, head_of, values_at
from serving.limits import check_values
from serving.model import COLUMN_TYPES, Model, Tensor
from serving.outcome import Scored
from serving.plain import array_of, exact_rows
from serving.protocol import parse_json
from serving.results import check_output, form, tells_ids
from serving.wire import Answer, Refusal, Rows

EXTENSIONS = ["binary_tensor_data"]
"""What the server says it has beside the protocol."""
FORM = 'An inference request is {"inputs": [{"name", "datatype", "shape", "data"}, ...]}.'
MOST_DIMENSIONS = 16
LARGEST_EMPTY = 2**16
"""What the sizes beside the zeros of a shape may make together: such a tensor brings no data that would bound what a
graph makes of it, and a sum over the empty dimension makes as much."""


class Infer:
    """A decoded v2 request over HTTP."""

    __slots__ = ("id", "rows", "tells_ids", "wanted")

    def __init__(self, rows: Rows, name: str | None, wanted: dict[str, bool] | None, tells_ids: bool) -> None:
        self.rows = rows
        self.id = name
        self.tells_ids = tells_ids
        self.wanted = wanted
        """Outputs to answer, and whether as bytes; None: all, as JSON."""

    def answer(self, scored: Scored) -> Answer:
        """The inference response."""
        json, columns = form(scored, self.wanted, has_id=self.id is not None)
        texts: list[bytes] = [] if self.id is None else [orjson.dumps(self.id)]
        chunks: list[bytes] = []
        for name, datatype, as_bytes in columns:
            if as_bytes:
                chunk = scored.raw(name, datatype)
                chunks.append(chunk)
                texts.append(b"%d" % len(chunk))
            else:
                texts.append(scored.text(name, datatype))
        head = json % tuple(texts)
        if not chunks:
            return Answer(200, head, self.rows.count)
        headers = ((binary.HEADER, b"%d" % len(head)),)
        return Answer(200, b"".join((head, *chunks)), self.rows.count, binary.CONTENT_TYPE, headers)


def decode_infer(body: bytes, model: Model, json_length: int | None = None) -> Infer:
    """A request over HTTP; `json_length` is what the header Inference-Header-Content-Length says, None without it.

    Raises:
        Refusal: 400 it is not the protocol or does not fit the model, 413 too many rows.
    """
    known = _known(body, model, json_length)
    if known is not None:
        return known
    tail = None
    if json_length is not None:
        body, tail = binary.split(body, json_length)
    content = parse_json(body)
    inputs = content.get("inputs") if isinstance(content, dict) else None
    if not isinstance(inputs, list):
        raise Refusal(400, FORM)
    name = content.get("id")
    if name is not None and not isinstance(name, str):
        raise Refusal(400, "'id' must be a string.")
    rows = read_rows(model, _given(inputs, tail))
    wanted = None
    if "outputs" in content or "parameters" in content:
        wanted = _wanted(content, model)
    told = tells_ids(wanted, model)
    if name is None and not told and model.bundle is None:
        _keep(body, content, rows, wanted, model)
    return Infer(rows, name, wanted, told)


def _known(body: bytes, model: Model, json_length: int | None) -> Infer | None:
    """A request of a form that was read before; None: it is another one, or wrong."""
    if json_length is not None:
        head = model.heads.get(body[:json_length]) if json_length <= LONGEST_HEAD else None
        if head is None or head.size != len(body) - json_length:
            return None
        return Infer(Rows(head.tensors(body, json_length), head.rows), None, head.wanted, tells_ids=False)
    start = values_at(body)
    frame = model.frames.get(body[:start]) if 0 < start <= LONGEST_HEAD else None
    if frame is None:
        return None
    check_values(body)
    values = frame.values(body, start)
    if values is None:
        return None
    (tensor,) = model.inputs
    rows = Rows({tensor.name: array_of(tensor, frame.shape, values)}, frame.rows)
    return Infer(rows, None, frame.wanted, tells_ids=False)


def _keep(body: bytes, content: Any, rows: Rows, wanted: dict[str, bool] | None, model: Model) -> None:
    """Remember the JSON of a request to a plain model that was read, where the next one needs no more than values."""
    inputs = content["inputs"]
    if all("data" not in entry for entry in inputs):
        head = head_of([entry["name"] for entry in inputs], rows.tensors, rows.count, wanted)
        if head is not None and len(body) <= LONGEST_HEAD:
            model.heads.keep(body, head)
    elif len(inputs) == 1 and model.inputs[0].datatype != "BYTES":
        frame = frame_of(body, content, rows.tensors[model.inputs[0].name].shape, rows.count, wanted)
        if frame is not None:
            model.frames.keep(*frame)


def read_rows(model: Model, given: Mapping[str, Given]) -> Rows:
    """The rows of inputs as they were sent, by name. Raises Refusal 400 or 413."""
    if model.bundle is None:
        return exact_rows(given, model)
    try:
        return to_rows(given, model.bundle.schema)
    except SchemaError as error:
        raise Refusal(400, str(error)) from None


def _given(inputs: list[Any], tail: memoryview | None) -> dict[str, Given]:
    """The inputs by name: JSON data flat, bytes as arrays."""
    given: dict[str, Given] = {}
    for entry in inputs:
        if entry.__class__ is not dict:
            raise Refusal(400, "Every input is an object with name, datatype, shape and data.")
        name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
        if name.__class__ is not str or datatype.__class__ is not str:
            raise Refusal(400, "Every input is an object with name, datatype, shape and data.")
        if name in given:
            raise Refusal(400, f"The input '{name}' is there twice.")
        if shape.__class__ is not list:
            raise Refusal(400, f"The input '{name}' has no shape; it is a list of whole numbers.")
        count = elements(name, shape)
        data = entry.get("data")
        if data.__class__ is list and "parameters" not in entry:
            if data and data[0].__class__ is list:
                data = _flat(name, shape, data)
            if len(data) != count:
                raise Refusal(400, f"The input '{name}' has {len(data)} values and the shape says {count}.")
        else:
            data, tail = _sent(entry, count, tail)
        given[name] = (datatype, shape, data)
    if tail:
        raise Refusal(400, f"Behind the tensors there are {len(tail)} bytes that belong to none.")
    return given


def elements(name: str, shape: list[Any]) -> int:
    """How many elements an input of this shape has. Raises Refusal 400."""
    if len(shape) > MOST_DIMENSIONS:
        raise Refusal(400, f"The input '{name}' has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are served.")
    count = 1
    for size in shape:
        if size.__class__ is not int or size < 0:
            raise Refusal(400, f"The input '{name}' has a wrong shape; it is a list of whole numbers from 0.")
        count *= size
    if count == 0 and prod([size for size in shape if size]) > LARGEST_EMPTY:
        raise Refusal(
            400, f"The input '{name}' is empty; the other numbers of its shape may make {LARGEST_EMPTY} at most."
        )
    return count


def _sent(entry: dict[str, Any], count: int, tail: memoryview | None) -> tuple[Any, memoryview | None]:
    """The data of an input that is not plain JSON, and the bytes behind it."""
    name, shape, data = entry["name"], entry["shape"], entry.get("data")
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refusal(400, f"The parameters of the input '{name}' must be an object.")
    if "shared_memory_region" in parameters:
        raise Refusal(400, f"The input '{name}' is in shared memory, which is not served; send its data.")
    size = parameters.get("binary_data_size")
    if size is None:
        if not isinstance(data, list):
            raise Refusal(400, f"The input '{name}' has no data; send it as a list of {count} values.")
        flat = _flat(name, shape, data) if data and isinstance(data[0], list) else data
        if len(flat) != count:
            raise Refusal(400, f"The input '{name}' has {len(flat)} values and the shape says {count}.")
        return flat, tail
    if data is not None:
        raise Refusal(400, f"The input '{name}' has both data and binary_data_size; send one of them.")
    if tail is None:
        raise Refusal(400, f"The input '{name}' is sent as bytes; add the header Inference-Header-Content-Length.")
    if size.__class__ is not int or not 0 <= size <= len(tail):
        shown = str(size)[:40]
        raise Refusal(400, f"The input '{name}' has the binary_data_size {shown}; the body has {len(tail)} bytes left.")
    return binary.read(name, entry["datatype"], shape, tail[:size]), tail[size:]


def _flat(name: str, shape: list[int], data: list[Any]) -> list[Any]:
    """Nested lists in the tensor's own shape, row by row."""
    for level, size in enumerate(shape[1:], 1):
        if not all(part.__class__ is list and len(part) == size for part in data):
            raise Refusal(400, f"The data of the input '{name}' is nested otherwise than its shape at level {level}.")
        data = list(chain.from_iterable(data))
    return data


def _wanted(content: dict[str, Any], model: Model) -> dict[str, bool] | None:
    """Outputs that are asked for, and whether as bytes; None: all, as JSON."""
    parameters, outputs = content.get("parameters", {}), content.get("outputs", [])
    if not isinstance(parameters, dict):
        raise Refusal(400, "'parameters' must be an object.")
    if not isinstance(outputs, list):
        raise Refusal(400, "'outputs' must be a list of objects with a name.")
    every = _flag(parameters, "binary_data_output", False)
    if not outputs:
        return {one.name: True for one in model.outputs} if every else None
    wanted: dict[str, bool] = {}
    for entry in outputs:
        name = entry.get("name") if isinstance(entry, dict) else None
        asked = entry.get("parameters", {}) if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(asked, dict):
            raise Refusal(400, "Every output that is asked for is an object with a name.")
        check_output(name, wanted, model)
        for unserved in ("classification", "shared_memory_region"):
            if asked.get(unserved):
                raise Refusal(400, f"The output '{name}' is asked for with {unserved}, which is not served.")
        wanted[name] = _flag(asked, "binary_data", every)
    return wanted


def _flag(parameters: dict[str, Any], name: str, otherwise: bool) -> bool:
    value = parameters.get(name, otherwise)
    if not isinstance(value, bool):
        raise Refusal(400, f"The parameter '{name}' must be true or false.")
    return value


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
