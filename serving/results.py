"""The outputs of a v2 answer, over HTTP and gRPC: which there are, which are wanted, and the JSON around their values.

A workload answers `score`, `action` and `prediction_id`; a plain model its graph's own, and `prediction_id` where it is
asked for by name. Not here: requests (`serving.tensors`, `serving.rpc_infer`), values (`serving.outcome`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.forms import VALUE, form_of
from serving.model import Form, Model
from serving.outcome import PREDICTION_ID, Scored
from serving.wire import Refusal


def columns(model: Model, wanted: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Name and datatype of the outputs that are wanted; None: all."""
    types = model.types
    return [(name, types.get(name, "BYTES")) for name in (types if wanted is None else wanted)]


def shape(scored: Scored, name: str) -> tuple[int, ...]:
    """The shape of an output."""
    outcome = scored.outcome
    if name not in outcome.outputs:
        return (len(scored.ids),)
    size: tuple[int, ...] = outcome.outputs[name].shape
    return (scored.end - scored.start, *size[1:]) if outcome.shared else size


def form(scored: Scored, wanted: Mapping[str, bool] | None, *, has_id: bool) -> Form:
    """The JSON of answers that differ only in their id, their values, and the sizes of those that follow as bytes."""
    model = scored.model
    outcome = scored.outcome
    key = (has_id, wanted and tuple(wanted.items()), scored.end - scored.start, outcome.shared, outcome.inner)
    return model.forms.get(key) or model.forms.keep(key, _form(scored, wanted, has_id=has_id))


def _form(scored: Scored, wanted: Mapping[str, bool] | None, *, has_id: bool) -> Form:
    model = scored.model
    content: dict[str, Any] = {"model_name": model.workload, "model_version": str(model.version)}
    if has_id:
        content["id"] = VALUE
    content["outputs"] = outputs = []
    values = [(name, datatype, bool(wanted and wanted[name])) for name, datatype in columns(model, wanted)]
    for name, datatype, as_bytes in values:
        value = {"parameters": {"binary_data_size": VALUE}} if as_bytes else {"data": VALUE}
        outputs.append({"name": name, "datatype": datatype, "shape": shape(scored, name), **value})
    return form_of(content), values


def output_names(model: Model) -> list[str]:
    """Outputs that may be asked for."""
    return [*dict.fromkeys([*model.types, PREDICTION_ID])]


def tells_ids(wanted: Mapping[str, Any] | None, model: Model) -> bool:
    """Whether an answer with these outputs has the prediction ids in it."""
    return PREDICTION_ID in (wanted or model.types)


def check_output(name: str, wanted: Mapping[str, Any], model: Model) -> None:
    """Raises Refusal 400 for an output that does not exist or was asked for before."""
    known = output_names(model)
    if name not in known:
        raise Refusal(400, f"There is no output '{name[:100]}'; there are: {', '.join(known)}.")
    if name in wanted:
        raise Refusal(400, f"The output '{name}' is asked for twice.")
