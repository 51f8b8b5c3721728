"""Rows as the columns of a table that is there already take them: widened where nothing is lost by it, else refused.

Delta Lake's writer casts what it is given to the table's types, and cuts off what does not fit: 0.75 becomes 0 in a
column of integers. Not here: tables (`noria.lake`).
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from noria.errors import LakeError

REMEDY = "Log these rows under another model name, or move the table away."


def widened(rows: pa.Table, columns: pa.Schema, table: str) -> pa.Table:
    """`rows` in the types of the table's `columns`, as far as it has them.

    Raises:
        LakeError: a column does not fit, or two differ in capital letters only.
    """
    spelled: dict[str, str] = {}
    for name in (*columns.names, *rows.column_names):
        if spelled.setdefault(name.lower(), name) != name:
            raise LakeError(
                f"The columns '{spelled[name.lower()]}' and '{name}' of {table} differ in capital letters only, which "
                f"the lake does not tell apart. {REMEDY}"
            )
    for index, name in enumerate(rows.column_names):
        if name not in columns.names or rows.column(index).type == columns.field(name).type:
            continue
        column = _widened(rows.column(index), columns.field(name).type)
        if column is None:
            raise LakeError(
                f"The column '{name}' of {table} holds {columns.field(name).type}, and the rows have "
                f"{rows.column(index).type} there. {REMEDY}"
            )
        rows = rows.set_column(index, name, column)
    return rows


def _widened(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    """The values in another type; None where that would change them."""
    if _is_list(kind) and not _is_list(column.type):
        values = column.combine_chunks()
        starts = pa.array(range(len(values) + 1), pa.int32())
        column = pa.chunked_array([pa.ListArray.from_arrays(starts, values)])
    elif _is_list(column.type) and not _is_list(kind):
        # Logs before shapes were noted made one value a row of lists of one.
        if not pc.all(pc.equal(pc.list_value_length(column), 1), skip_nulls=False).as_py():
            return None
        column = pc.list_flatten(column)
    if not _holds(kind, column.type):
        return None
    try:
        return column.cast(kind)
    except pa.ArrowException:
        return None


def _holds(wide: pa.DataType, narrow: pa.DataType) -> bool:
    """Whether a type has every value of another; casting still looks at those of integers as double precision."""
    if _is_list(wide) and _is_list(narrow):
        return _holds(wide.value_type, narrow.value_type)
    if types.is_dictionary(narrow):
        narrow = narrow.value_type
    if wide.id == narrow.id or types.is_null(narrow):
        return True
    if types.is_integer(narrow) and types.is_floating(wide):
        return bool(wide.bit_width == 64 or narrow.bit_width < wide.bit_width)
    if (types.is_integer(narrow) and types.is_integer(wide)) or (types.is_floating(narrow) and types.is_floating(wide)):
        return bool(narrow.bit_width <= wide.bit_width)
    return _is_text(wide) and _is_text(narrow)


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
