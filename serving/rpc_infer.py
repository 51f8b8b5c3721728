"""Inference over gRPC: a ModelInferRequest's tensors in, a ModelInferResponse's out.

Tensors come as typed contents or as raw bytes (`serving.binary`), and the answer has the form of the request; FP16 has
no typed form and is always raw. Not here: the calls (`serving.rpc`), the messages (`serving.messages`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from serving import binary
from serving.columns import Given
from serving.datatypes import NUMPY
from serving.messages import MESSAGES
from serving.model import Model
from serving.outcome import Scored
from serving.results import check_output, columns, shape, tells_ids
from serving.tensors import elements, read_rows
from serving.wire import Answer, Refusal, Rows

CONTENTS = {
    "BOOL": "bool_contents",
    **{f"INT{bits}": "int_contents" for bits in (8, 16, 32)},
    **{f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)},
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of typed contents that a datatype's values are in."""


class Infer:
    """A decoded request."""

    __slots__ = ("id", "raw", "rows", "tells_ids", "wanted")

    def __init__(self, rows: Rows, name: str, wanted: dict[str, bool] | None, raw: bool, tells_ids: bool) -> None:
        self.rows, self.id, self.wanted, self.raw, self.tells_ids = rows, name, wanted, raw, tells_ids

    def answer(self, scored: Scored) -> Answer:
        """A serialised ModelInferResponse."""
        model = scored.model
        response = MESSAGES["ModelInferResponse"](
            model_name=model.workload, model_version=str(model.version), id=self.id
        )
        found = columns(model, self.wanted)
        raw = self.raw or any(datatype not in CONTENTS for _, datatype in found)
        for name, datatype in found:
            output = response.outputs.add(name=name, datatype=datatype, shape=shape(scored, name))
            if raw:
                response.raw_output_contents.append(scored.raw(name, datatype))
                continue
            values: list[Any]
            if datatype == "BYTES":
                values = [value.encode("utf-8", "surrogatepass") for value in scored.strings(name)]
            else:
                values = scored.array(name).ravel().tolist()
            getattr(output.contents, CONTENTS[datatype]).extend(values)
        return Answer(200, response.SerializeToString(), self.rows.count)


def decode_infer(request: Any, model: Model) -> Infer:
    """The rows of a ModelInferRequest. Raises Refusal 400 or 413."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise Refusal(400, f"There are {len(request.inputs)} inputs and {len(raw)} raw contents; send one an input.")
    given: dict[str, Given] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in given:
            raise Refusal(400, f"The input '{tensor.name}' is there twice.")
        shape = list(tensor.shape)
        count = elements(tensor.name, shape)
        if raw:
            if tensor.HasField("contents"):
                raise Refusal(400, f"The input '{tensor.name}' has both contents and raw contents; send one of them.")
            values: Any = binary.read(tensor.name, tensor.datatype, shape, raw[index])
        else:
            values = _typed(tensor, shape, count)
        given[tensor.name] = (tensor.datatype, shape, values)
    rows = read_rows(model, given)
    wanted: dict[str, bool] = {}
    for output in request.outputs:
        check_output(output.name, wanted, model)
        for unserved in ("classification", "shared_memory_region"):
            if unserved in output.parameters:
                raise Refusal(400, f"The output '{output.name}' is asked for with {unserved}, which is not served.")
        wanted[output.name] = True
    return Infer(rows, request.id, wanted or None, bool(raw), tells_ids(wanted, model))


def _typed(tensor: Any, shape: list[int], count: int) -> Any:
    """Typed contents: floating ones as an array, the others as a list, whose values are looked at as JSON's are."""
    name, datatype = tensor.name, tensor.datatype
    if datatype not in CONTENTS:
        raise Refusal(400, f"The input '{name}' has the datatype {datatype[:20]}, which has no typed contents.")
    values = getattr(tensor.contents, CONTENTS[datatype])
    if len(values) != count:
        raise Refusal(400, f"The input '{name}' has {len(values)} {CONTENTS[datatype]} and the shape says {count}.")
    if datatype in ("FP32", "FP64"):
        return np.array(values, NUMPY[datatype]).reshape(shape)
    if datatype != "BYTES":
        return list(values)
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise Refusal(400, f"The input '{name}' has a string that is not UTF-8.") from None
