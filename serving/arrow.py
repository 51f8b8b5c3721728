"""Records as an Arrow IPC stream, and the predictions as one: a column at a time, without a Python value a row.

Columns are cast as the lake casts them; null is missing; a time may also be whole seconds since 1970, as in the other
encodings. Compressed buffers are refused: what they expand to is known only after it is there (HTTP's own compression
has a limit). Not here: JSON records (`serving.protocol`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.column import ARROW, MISSING_INTEGER, Column, cast, to_tensor
from noria.errors import SchemaError
from noria.schema import Schema
from serving.model import Model
from serving.outcome import Scored
from serving.protocol import MOST_ROWS, event_times, records_schema
from serving.wire import Answer, Refusal, Rows

CONTENT_TYPE = b"application/vnd.apache.arrow.stream"
ANSWER = (("id", pa.string()), ("prediction", pa.float32()), ("action", pa.string()))


class Records:
    """Decoded records."""

    __slots__ = ("rows",)
    tells_ids = True

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def answer(self, scored: Scored) -> Answer:
        """A stream of one batch: id, prediction, action; workload and version in the schema's metadata."""
        model = scored.model
        schema = pa.schema(ANSWER, {"workload": model.workload, "version": str(model.version)})
        columns = [
            pa.array(scored.ids, pa.string()),
            pa.array(scored.scores(), pa.float32()),
            pa.array(scored.actions, pa.string()),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return Answer(200, sink.getvalue().to_pybytes(), self.rows.count, CONTENT_TYPE)


def decode_arrow(body: bytes, model: Model) -> Records:
    """Rows of an Arrow IPC stream.

    Raises:
        Refusal: 400 not such a stream, 404 a plain model, 413 too many rows, 422 a column breaks the schema.
    """
    schema = records_schema(model)
    try:
        table = _read(body, schema)
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which the check refuses
            tensors = {column.name: _tensor(column, table) for column in schema.columns}
        schema.check(tensors)
        when = tensors.get(schema.event_time)
        if when is None and schema.event_time in table.column_names:
            when = _tensor(Column(schema.event_time, "timestamp"), table)
        times = None if when is None else event_times(when)
    except SchemaError as error:
        raise Refusal(422, str(error)) from None
    return Records(Rows(tensors, len(table), times))


def _read(body: bytes, schema: Schema) -> pa.Table:
    """The stream's batches as one table, its bytes not copied. Refused before a row is looked at: what is too much."""
    if not body:
        raise Refusal(400, "The body is empty; send an Arrow IPC stream.")
    count, batches = 0, []
    try:
        for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
            _refuse_compressed(message)
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            _check_names(reader.schema.names, schema)
            for batch in reader:
                count += batch.num_rows
                if count > MOST_ROWS:
                    raise Refusal(413, f"There are more than {MOST_ROWS} rows; send at most so many in one request.")
                batch.validate(full=True)
                batches.append(batch)
            table = pa.Table.from_batches(batches, reader.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Refusal(400, f"The body is not an Arrow IPC stream that can be read: {_line(error)}.") from None
    if not count:
        raise Refusal(422, "There are no rows; send at least one.")
    return table


def _check_names(names: list[str], schema: Schema) -> None:
    if len(set(names)) != len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise SchemaError(f"The column '{name}' is there twice.", name)
    for name in names:
        if name not in schema.names and name != schema.event_time:
            raise SchemaError(f"There is the unknown column '{name}'; known are: {', '.join(schema.names)}.", name)


def _tensor(column: Column, table: pa.Table) -> np.ndarray:
    """One column as the graph's tensor [n]; a column that is not there is missing in every row."""
    kind = ARROW[column.kind]
    if column.name not in table.column_names:
        return to_tensor(column, pa.nulls(len(table), kind))
    values = table.column(column.name)
    try:
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if column.kind == "timestamp":
            return _seconds(values, column)
        tensor = to_tensor(column, cast(values, kind))
    except (pa.ArrowException, ValueError) as error:
        raise SchemaError(
            f"Column '{column.name}' holds {table.column(column.name).type}, the schema wants {kind}: {_line(error)}",
            column.name,
        ) from None
    return tensor


def _seconds(values: pa.ChunkedArray, column: Column) -> np.ndarray:
    if pa.types.is_integer(values.type):
        return np.asarray(pc.fill_null(values.cast(pa.int64()), MISSING_INTEGER).combine_chunks())
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    if pa.types.is_timestamp(values.type):
        # Nanoseconds are cut: only the second counts.
        return to_tensor(column, values.cast(ARROW["timestamp"], safe=False))
    return to_tensor(column, cast(values, ARROW["timestamp"]))


def _refuse_compressed(message: pa.Message) -> None:
    """Raises Refusal 400 for a batch with compressed buffers.

    A message is a flatbuffer, format/Message.fbs: Message{version, header_type, header, bodyLength}, and
    RecordBatch{length, nodes, buffers, compression}, which a DictionaryBatch{id, data, isDelta} holds as its data.
    """
    if message.type not in ("record batch", "dictionary"):
        return
    data = message.metadata.to_pybytes()
    table = _follow(data, _follow(data, 0), 2)
    if message.type == "dictionary":
        table = _follow(data, table, 1)
    if _field(data, table, 3):
        raise Refusal(400, "The Arrow buffers are compressed; send them as they are (gzip of the whole body is taken).")


def _follow(data: bytes, table: int, field: int | None = None) -> int:
    """Where the table lies that a field (or, without one, the position itself) points at."""
    place = table if field is None else _field(data, table, field)
    return place + int.from_bytes(data[place : place + 4], "little")


def _field(data: bytes, table: int, field: int) -> int:
    """Where a table's field lies; 0: it is not there."""
    layout = table - int.from_bytes(data[table : table + 4], "little", signed=True)
    size = int.from_bytes(data[layout : layout + 2], "little")
    entry = 4 + 2 * field
    offset = int.from_bytes(data[layout + entry : layout + entry + 2], "little") if entry < size else 0
    return table + offset if offset else 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
