"""v2 tensors as the inputs of a plain model: name, datatype and shape must be the graph's own.

JSON values must be of the datatype's own kind: numbers are never made of strings or of true, whole numbers never of
2.5. null is NaN in a floating tensor and nothing elsewhere. Not here: the request around the tensors
(`serving.tensors`), the raw columns of a workload (`serving.columns`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from struct import error, pack
from typing import Any

import numpy as np

from serving.columns import DECIMAL, FORMATS, NUMBERS, NUMBERS_AND_NULL, WHOLE, Given
from serving.datatypes import NUMPY
from serving.model import Model, Tensor
from serving.protocol import limit_rows
from serving.wire import Refusal, Rows

KINDS: dict[str, set[type]] = {
    "BOOL": {bool},
    "BYTES": {str},
    **dict.fromkeys(DECIMAL, NUMBERS),
    **{name: {int} for name in WHOLE},
}
"""Python's types of the JSON values that a datatype takes."""


def exact_rows(given: Mapping[str, Given], model: Model) -> Rows:
    """The rows of a plain model. Raises Refusal 400 where a tensor does not fit, 413 for too many rows."""
    tensors: dict[str, np.ndarray] = {}
    count = -1 if model.batched else 1
    for tensor in model.inputs:
        sent = given.get(tensor.name)
        if sent is None:
            raise Refusal(400, f"The input '{tensor.name}' is missing; send {_names(model.inputs)}.")
        datatype, shape, data = sent
        if datatype != tensor.datatype:
            raise Refusal(
                400, f"The input '{tensor.name}' has the datatype {datatype[:20]}; the model takes {tensor.datatype}."
            )
        _check_shape(tensor, shape)
        tensors[tensor.name] = data if data.__class__ is np.ndarray else array_of(tensor, shape, data)
        if model.batched:
            if count not in (-1, shape[0]):
                raise Refusal(400, "The inputs differ in their number of rows, the first number of each shape.")
            count = shape[0]
    if len(given) != len(tensors):
        name = next(name for name in given if name not in tensors)
        raise Refusal(400, f"There is no input '{name[:100]}'; there are: {_names(model.inputs)}.")
    if count < 1:
        raise Refusal(400, "There are no rows; send at least one.")
    limit_rows(count, "rows")
    return Rows(tensors, count)


def _check_shape(tensor: Tensor, shape: Sequence[int]) -> None:
    fits = len(shape) == len(tensor.shape)
    if fits:
        for size, wanted in zip(shape, tensor.shape, strict=True):
            if wanted not in (-1, size):
                fits = False
    if not fits:
        raise Refusal(
            400,
            f"The input '{tensor.name}' has the shape {str(list(shape))[:60]}; the model takes "
            f"{list(tensor.shape)}, where -1 is any size.",
        )


def array_of(tensor: Tensor, shape: Sequence[int], data: list[Any]) -> np.ndarray:
    """JSON values as the tensor: null is NaN in a floating one and nothing elsewhere."""
    datatype = tensor.datatype
    kinds, wanted = {*map(type, data)}, KINDS[datatype]
    if not kinds <= wanted:
        if wanted is not NUMBERS or not kinds <= NUMBERS_AND_NULL:
            raise Refusal(400, f"The input '{tensor.name}' has a value that is no {datatype}.")
        data = [math.nan if value is None else value for value in data]
    if datatype == "BYTES":
        return np.array(data, np.object_).reshape(shape)
    try:
        # Quicker than np.array for short lists, and it raises where a value is outside the type.
        packed = pack(f"<{len(data)}{FORMATS[datatype]}", *data)
    except (OverflowError, error):
        raise Refusal(400, f"The input '{tensor.name}' has a value outside {datatype}.") from None
    return np.frombuffer(packed, NUMPY[datatype]).reshape(shape)


def _names(tensors: Sequence[Tensor]) -> str:
    return ", ".join(one.name for one in tensors)
