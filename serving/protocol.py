"""What goes over the wire for people: JSON records in, predictions out, labels in. Pure functions of bytes.

Everything that a client can get wrong becomes a `Refusal` with the status it deserves and a sentence that names field
and row. Not here: the Open Inference Protocol (`serving.tensors`), HTTP, and the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from noria.column import EARLIEST, FORMS, LATEST, MISSING_INTEGER, Tensors, parse_time
from noria.errors import SchemaError
from noria.schema import Schema
from serving.limits import check_depth, check_values
from serving.model import Model
from serving.outcome import Scored
from serving.wire import Answer, Refusal, Rows

MOST_ROWS = 10_000
"""Rows (or labels) accepted in one request."""


class Predict:
    """Decoded records."""

    __slots__ = ("rows",)
    tells_ids = True

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def answer(self, scored: Scored) -> Answer:
        """An id, a prediction and an action a row, in the order of the records."""
        scores = scored.scores().tolist()
        predictions = [
            {"id": name, "prediction": value, "action": action}
            for name, value, action in zip(scored.ids, scores, scored.actions, strict=True)
        ]
        model = scored.model
        content = {"workload": model.workload, "version": model.version, "predictions": predictions}
        return Answer(200, orjson.dumps(content), len(predictions))


def parse_json(body: bytes) -> Any:
    """The JSON value of a body. Raises Refusal 400, or 413 for too many values."""
    check_depth(body)
    return _parse(body)


def _parse(body: bytes) -> Any:
    """The same, however deep it is nested: up to the 1,024 levels that orjson goes."""
    check_values(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not body.strip():
            raise Refusal(400, "The body is empty; send JSON.") from None
        hint = " (NaN is not JSON; send null where a value is missing.)" if b"NaN" in body else ""
        raise Refusal(400, f"The body is not JSON: {error}.{hint}") from None


def records_schema(model: Model) -> Schema:
    """The schema of a workload. Raises Refusal 404 for a plain model, which has no records."""
    if model.bundle is None:
        name = model.workload
        raise Refusal(404, f"{name} is a plain model; ask it with POST /v2/models/{name}/infer.")
    return model.bundle.schema


def decode_predict(body: bytes, model: Model) -> Predict:
    """`{"records": [...]}`, a list of records, or one record.

    Raises:
        Refusal: 400 not JSON, 404 a plain model, 413 too many rows, 422 a record breaks the schema.
    """
    schema = records_schema(model)
    try:
        return Predict(read_records(body, schema))
    except SchemaError as error:
        raise Refusal(422, str(error)) from None


def read_records(body: bytes, schema: Schema) -> Rows:
    """The rows of such a body. Raises Refusal, and SchemaError naming field and row.

    Good records are flat: how deep a body is nested is looked at only where something is wrong with it.
    """
    try:
        return _read_records(_parse(body), schema)
    except (Refusal, SchemaError, RecursionError):
        check_depth(body)
        raise


def _read_records(content: Any, schema: Schema) -> Rows:
    if isinstance(content, dict):
        if "records" in content and "records" not in schema.names:
            unknown = sorted(set(content) - {"records"})
            if unknown:
                raise Refusal(422, f"Beside 'records' there is '{unknown[0]}'; nothing else belongs there.")
            content = content["records"]
        else:
            content = [content]
    if not isinstance(content, list):
        raise Refusal(422, 'Send {"records": [{column: value}, ...]}, a list of such objects, or one of them.')
    limit_rows(len(content), "records")
    tensors = schema.parse(content)
    return Rows(tensors, len(content), _times(content, tensors, schema))


def limit_rows(count: int, what: str) -> None:
    """Raises Refusal 413 above the most rows of a request."""
    if count > MOST_ROWS:
        raise Refusal(413, f"There are {count} {what}; send at most {MOST_ROWS} in one request.")


def event_times(seconds: np.ndarray) -> np.ndarray:
    """Epoch seconds [n] as microseconds; where one is missing, now. Raises SchemaError outside the years 1-9999."""
    missing = seconds == MISSING_INTEGER
    outside = ~missing & ((seconds < EARLIEST) | (seconds > LATEST))
    if outside.any():
        row = int(np.argmax(outside))
        raise SchemaError(f"Row {row}: the event time {seconds[row]} is outside the years 1 to 9999.", row=row)
    return np.where(missing, time.time_ns() // 1000, np.where(missing, 0, seconds) * 1_000_000)


def _times(records: Sequence[dict[str, Any]], tensors: Tensors, schema: Schema) -> np.ndarray:
    name = schema.event_time
    if name in tensors:
        return event_times(tensors[name])
    seconds = [MISSING_INTEGER if record.get(name) is None else _second(record[name], name, row)
               for row, record in enumerate(records)]  # fmt: skip
    return event_times(np.array(seconds, np.int64))


def _second(value: Any, name: str, row: int) -> int:
    try:
        seconds = parse_time(value)
    except (ValueError, OverflowError):
        seconds = LATEST + 1
    if not EARLIEST <= seconds <= LATEST:
        shown = repr(value)[:60]
        raise SchemaError(
            f"Row {row}: '{name}' is {shown}; it must be {FORMS['timestamp']}, in the years 1 to 9999.", name, row
        )
    return seconds


def decode_feedback(body: bytes, task: str) -> tuple[list[str], list[float], np.ndarray]:
    """Ids, labels and arrival times (microseconds [n]) of `{"labels": [{"id", "label", "time"}]}` or of the bare list.

    Raises:
        Refusal: 400 not JSON, 413 too many. SchemaError: an entry is not a label; names field and row.
    """
    content = parse_json(body)
    if isinstance(content, dict):
        content = content.get("labels")
    if not isinstance(content, list):
        raise Refusal(422, 'Send {"labels": [{"id": prediction id, "label": number, "time": optional}, ...]}.')
    if not content:
        raise Refusal(422, "There are no labels; send at least one.")
    limit_rows(len(content), "labels")
    for row, entry in enumerate(content):
        _check_label(entry, row, task)
    seconds = [MISSING_INTEGER if entry.get("time") is None else _second(entry["time"], "time", row)
               for row, entry in enumerate(content)]  # fmt: skip
    labels = [float(entry["label"]) for entry in content]
    return [entry["id"] for entry in content], labels, event_times(np.array(seconds, np.int64))


def _check_label(entry: Any, row: int, task: str) -> None:
    if not isinstance(entry, dict):
        raise SchemaError(f"Row {row} is not an object; send labels as {{id, label, time}}.", row=row)
    unknown = sorted(set(entry) - {"id", "label", "time"})
    if unknown:
        sentence = f"Row {row} has the unknown field '{unknown[0]}'; known are: id, label, time."
        raise SchemaError(sentence, unknown[0], row)
    name, label = entry.get("id"), entry.get("label")
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise SchemaError(f"Row {row}: 'id' must be the id that a prediction was answered with.", "id", row)
    if isinstance(label, bool) or not isinstance(label, int | float) or abs(label) > 1e300:
        raise SchemaError(f"Row {row}: 'label' is {repr(label)[:60]}; it must be a number.", "label", row)
    if task == "binary" and label not in (0, 1):
        raise SchemaError(f"Row {row}: 'label' is {label:g}; it must be 0 or 1.", "label", row)
