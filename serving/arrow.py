"""Records as an Arrow IPC stream, and the predictions as one: a column at a time, without a Python value a row.

Columns are cast as the lake casts them; null is missing; a time may also be whole seconds since 1970, as in the other
encodings. Compressed buffers are refused: what they expand to is known only after it is there (HTTP's own compression
has a limit). Columns may share bytes (a dictionary, string views), so what they hold is measured before anything is
cast. Not here: JSON records (`serving.protocol`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from noria.column import ARROW, MISSING_INTEGER, Column, cast, to_tensor
from noria.errors import SchemaError
from noria.schema import Schema
from serving.limits import DEFAULTS
from serving.model import Model
from serving.outcome import Scored
from serving.protocol import MOST_ROWS, event_times, records_schema
from serving.wire import Answer, Refusal, Rows

CONTENT_TYPE = b"application/vnd.apache.arrow.stream"
ANSWER = (("id", pa.string()), ("prediction", pa.float32()), ("action", pa.string()))
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


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


def decode_arrow(body: bytes, model: Model, most: int = DEFAULTS.inflated_bytes) -> Records:
    """Rows of an Arrow IPC stream whose columns hold `most` bytes, or as many as the body.

    Raises:
        Refusal: 400 not such a stream, 404 a plain model, 413 too many rows or bytes, 422 a column breaks the schema.
    """
    schema = records_schema(model)
    try:
        table = _read(body, schema, max(most, len(body)))
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


def _read(body: bytes, schema: Schema, most: int) -> pa.Table:
    """The stream's batches as one table, its bytes not copied. Refused before a row is looked at: what is too much."""
    if not body:
        raise Refusal(400, "The body is empty; send an Arrow IPC stream.")
    count, held, batches = 0, 0, []
    try:
        for number, message in enumerate(pa.ipc.MessageReader.open_stream(pa.py_buffer(body))):
            if number > MOST_ROWS:
                raise Refusal(413, f"There are more than {MOST_ROWS} batches; send the rows in fewer.")
            held += _check_message(message)
            _limit(held, most)
        held = 0
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            _check_columns(reader.schema, schema)
            for batch in reader:
                count += batch.num_rows
                if count > MOST_ROWS:
                    raise Refusal(413, f"There are more than {MOST_ROWS} rows; send at most so many in one request.")
                held = _measure(batch, held, most)
                batches.append(batch)
            table = pa.Table.from_batches(batches, reader.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Refusal(400, f"The body is not an Arrow IPC stream that can be read: {_line(error)}.") from None
    if not count:
        raise Refusal(422, "There are no rows; send at least one.")
    return table


def _check_columns(sent: pa.Schema, schema: Schema) -> None:
    """Refuses columns that the schema does not have, or has once, and types that no column has; a body may name any
    number of them."""
    known = {schema.event_time: ARROW["timestamp"], **{column.name: ARROW[column.kind] for column in schema.columns}}
    seen: set[str] = set()
    for name in sent.names:
        if name not in known:
            shown = ", ".join(schema.names)
            raise SchemaError(f"There is the unknown column '{name[:100]}'; known are: {shown}.", name)
        if name in seen:
            raise SchemaError(f"The column '{name}' is there twice.", name)
        seen.add(name)
    for field in sent:
        if not _is_flat(field.type):
            shown = str(field.type)[:100]
            raise SchemaError(f"Column '{field.name}' holds {shown}, the schema wants {known[field.name]}.", field.name)


def _is_flat(kind: pa.DataType) -> bool:
    """A value a row, or a dictionary of such values: what a column of a schema can be cast from."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
        if types.is_dictionary(kind) or _is_view(kind):  # PyArrow casts neither
            return False
    return not (types.is_nested(kind) or types.is_run_end_encoded(kind) or isinstance(kind, pa.BaseExtensionType))


def _measure(batch: pa.RecordBatch, held: int, most: int) -> int:
    """The bytes that a batch holds where no two values share any, and `held` before it; then it may be cast.

    A few bytes may stand for many: columns lie over each other, each batch brings a dictionary that grew by a delta,
    indices and views name one long string ten thousand times. What a batch holds is also what validating it takes.
    """
    columns = [column.storage if isinstance(column, pa.ExtensionArray) else column for column in batch.columns]
    for column in columns:
        held += column.get_total_buffer_size() + _viewed(column)
    if held <= most:
        batch.validate(full=True)
        held += sum(map(_named, columns))
    _limit(held, most)
    return held


def _limit(held: int, most: int) -> None:
    if held > most:
        raise Refusal(413, f"The columns hold more than {most:,} bytes when they are expanded; send fewer rows.")


def _viewed(column: pa.Array) -> int:
    """The bytes that the views of a column name: each has 16 bytes itself, and begins with its length."""
    if not _is_view(column.type) or not len(column):
        return 0
    views = np.frombuffer(column.buffers()[1], np.uint32, 4 * len(column), 16 * column.offset)
    return int(views[::4].sum(dtype=np.int64))


def _named(column: pa.Array) -> int:
    """The bytes that the indices of a valid column name; numbers are few."""
    if not types.is_dictionary(column.type):
        return 0
    kind = column.type.value_type
    if types.is_primitive(kind) or types.is_decimal(kind) or types.is_null(kind):
        return 0
    return int(pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0)


def _is_view(kind: pa.DataType) -> bool:
    return bool(types.is_string_view(kind) or types.is_binary_view(kind))


def _tensor(column: Column, table: pa.Table) -> np.ndarray:
    """One column as the graph's tensor [n]; a column that is not there is missing in every row."""
    kind = ARROW[column.kind]
    if column.name not in table.column_names:
        return to_tensor(column, pa.nulls(len(table), kind))
    values = table.column(column.name)
    try:
        if types.is_dictionary(values.type):
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
    if types.is_integer(values.type):
        return np.asarray(pc.fill_null(values.cast(pa.int64()), MISSING_INTEGER).combine_chunks())
    if types.is_timestamp(values.type):
        # Not cast: microseconds of a far time do not fit, and nanoseconds before 1970 would round towards zero.
        units = pc.fill_null(values.cast(pa.int64()), 0).to_numpy()
        return np.where(values.is_null().to_numpy(), MISSING_INTEGER, units // PER_SECOND[values.type.unit])
    return to_tensor(column, cast(values, ARROW["timestamp"]))


def _check_message(message: pa.Message) -> int:
    """The bytes of a batch's buffers: reading it copies each where the client's bytes are in the other order. Raises
    Refusal 400 where they are compressed.

    A message is a flatbuffer, format/Message.fbs: Message{version, header_type, header, bodyLength}, and
    RecordBatch{length, nodes, buffers, compression}, which a DictionaryBatch{id, data, isDelta} holds as its data.
    """
    if message.type not in ("record batch", "dictionary"):
        return 0
    data = message.metadata.to_pybytes()
    table = _follow(data, _follow(data, 0), 2)
    if message.type == "dictionary":
        table = _follow(data, table, 1)
    if _field(data, table, 3):
        raise Refusal(400, "The Arrow buffers are compressed; send them as they are (gzip of the whole body is taken).")
    if not _field(data, table, 2):
        return 0
    buffers = _follow(data, table, 2)  # how many there are, and of each where it lies and its length
    count = int.from_bytes(data[buffers : buffers + 4], "little")
    return sum(max(size, 0) for size in np.frombuffer(data, "<i8", 2 * count, buffers + 4)[1::2].tolist())


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
