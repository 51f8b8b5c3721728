"""The lake: four Delta tables a workload, on a folder or an object store. The only user of deltalake.

    records      raw rows with event time, and the label where it came along
    predictions  prediction_id, event_time, version, raw inputs, score, action, latency_ms
    labels       prediction_id, label, arrived (append only; the newest wins)
    shadow       prediction_id, event_time, version, champion, score, action, latency_ms: a challenger's answers

Appends are atomic and safe beside other writers; a killed append leaves the old version readable. Nothing that trains
or watches reads `shadow`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal
from urllib.request import url2pathname

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import ColumnProperties, CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from noria.durable import commit_file, settle
from noria.errors import LakeError
from noria.records import DatasetRef, Window
from noria.schema import ARROW, Schema
from noria.widen import widened

Table = Literal["records", "predictions", "labels", "shadow"]
TABLES: tuple[Table, ...] = ("records", "predictions", "labels")
"""The tables that training data comes from."""
COMPACT_EVERY = 50
"""Small files that a table may gather before an append compacts it."""
CHECKPOINT_EVERY = 10
CONFIGURATION = {"delta.checkpointInterval": str(CHECKPOINT_EVERY)}
"""Of a new table. Opening one reads every commit since its last checkpoint, all at once and each in a thread: with
deltalake's 100 an append of few rows takes twice the processor time, and the process has 50 threads more."""
ATTEMPTS = 20
"""Times that an append is tried when other writers change the table's form meanwhile."""


@dataclass(frozen=True)
class Lake:
    """The tables of one workload below `root` (a path or a URL that deltalake understands)."""

    root: str
    workload: str
    schema: Schema

    def address(self, table: Table) -> str:
        """Where a table lies."""
        return f"{self.root}/{self.workload}/{table}"

    def append(
        self, table: Table, rows: pa.Table, *, batch: tuple[str, int] | None = None, after: int | None = None
    ) -> bool:
        """Append rows in one atomic commit.

        `batch` names them (source, increasing number): a batch that was appended before is not appended again, so a
        writer that was killed may repeat itself. Where they are several batches in one, `after` is the last number
        before them: some of them are in the lake already when it has moved. Returns whether rows were written.

        Raises:
            LakeError: the table's columns cannot take the rows as they are; nothing was written.
        """
        if not len(rows) and batch is None:
            return False
        if table == "labels":  # as tables are read, the newest commit first: so the first of equal times is the last
            rows = rows.take(pa.array(range(len(rows) - 1, -1, -1), pa.int64()))
        failed = 0
        while True:
            opened = self._open(table)
            if batch is not None:
                last = _appended(opened, batch[0])
                if last >= batch[1] or after not in (None, last):
                    return False
            columns = pa.schema(opened.schema().to_arrow() if opened else rows.schema)
            fitting = widened(rows, columns, self.address(table))
            try:
                self._commit(table, opened, fitting, batch)
                return True
            except DeltaError as error:
                # Another writer made the table, gave it a column or wrote this very batch since it was opened.
                made = opened is None and self._open(table) is not None
                failed += 1
                if failed == ATTEMPTS or not (made or isinstance(error, CommitFailedError)):
                    raise

    def _commit(self, table: Table, opened: DeltaTable | None, rows: pa.Table, batch: tuple[str, int] | None) -> None:
        """On top of the version that was opened (the check for a batch holds for no other), or as the first one.

        A first commit that may be tried again becomes a second one that makes the table anew (deltalake 1.6).
        """
        named, form = [Transaction(*batch)] if batch else None, _form(rows.schema)
        if opened is None:
            first = CommitProperties(app_transactions=named, max_commit_retries=0)
            write_deltalake(
                self.address(table), rows, mode="error", configuration=CONFIGURATION, commit_properties=first,
                writer_properties=form,
            )  # fmt: skip
        else:
            further = CommitProperties(app_transactions=named)
            write_deltalake(
                opened, rows, mode="append", schema_mode="merge", commit_properties=further, writer_properties=form
            )

    def appended(self, table: Table, source: str) -> int:
        """The number of the last batch that `source` appended; -1 when there is none."""
        return _appended(self._open(table), source)

    def sync(self, table: Table, after: int = -1) -> int:
        """Bring the table's versions behind `after`, which this returned the last time, onto the disk itself, where the
        lake is a folder: so they outlive a power cut. Returns the last one. The first time, those that an ended writer
        may have left are taken along."""
        address = self.address(table)
        local = url2pathname(address.removeprefix("file://")) if address.startswith("file://") else address
        if "://" in local:
            return -1
        folder, last = Path(local), -1
        if not commit_file(folder, after).exists():
            opened = self._open(table)
            last = opened.version() if opened else -1
            after = max(last - CHECKPOINT_EVERY, -1)
        return settle(folder, after, last)

    def compact(self, *tables: Table) -> None:
        """Merge small files where they have become many; readers and earlier versions are not disturbed."""
        for table in tables or (*TABLES, "shadow"):
            opened = self._open(table)
            if opened and len(opened.file_uris()) >= COMPACT_EVERY:
                with suppress(CommitFailedError):  # another writer is compacting it
                    opened.optimize.compact(writer_properties=_form(pa.schema(opened.schema().to_arrow())))

    def versions(self) -> dict[str, int]:
        """The current Delta version of each table; -1 where there is no table yet."""
        opened = {table: self._open(table) for table in TABLES}
        return {table: found.version() if found else -1 for table, found in opened.items()}

    def records(self, window: Window, version: int | None = None) -> pa.Table:
        """Raw records whose event time is in the window, oldest first."""
        return self._read("records", version, window, self.schema.event_time)

    def predictions(self, window: Window, version: int | None = None) -> pa.Table:
        """Logged predictions whose event time is in the window, oldest first; one row a prediction id."""
        rows = self._read("predictions", version, window, "event_time")
        return _unique(rows, "prediction_id") if len(rows) else rows

    def labels(self, as_of: datetime, version: int | None = None) -> pa.Table:
        """The newest label of each prediction id that arrived by `as_of`."""
        rows = self._read("labels", version, None, "arrived")
        if not len(rows):
            return rows
        rows = rows.filter(pc.less_equal(rows.column("arrived"), pa.scalar(as_of, ARROW["timestamp"])))
        return _unique(rows.sort_by([("arrived", "descending")]), "prediction_id")

    def shadow(self, window: Window, challenger: int) -> pa.Table:
        """What that version answered, as a shadow, to requests of the window; oldest first, one row a prediction id."""
        rows = self._read("shadow", None, window, "event_time")
        rows = rows.filter(pc.equal(rows.column("version"), challenger))
        return _unique(rows, "prediction_id") if len(rows) else rows

    def judged(self, window: Window, as_of: datetime, versions: dict[str, int] | None = None) -> pa.Table:
        """Predictions of the window joined with their labels: the predictions' columns and `label`."""
        chosen = versions or {}
        rows = self.predictions(window, chosen.get("predictions"))
        labels = self.labels(as_of, chosen.get("labels"))
        if not len(rows) or not len(labels):
            return rows.slice(0, 0).append_column("label", pa.array([], pa.float64()))
        joined = rows.join(labels.select(["prediction_id", "label"]), "prediction_id", join_type="inner")
        return joined.sort_by([("event_time", "ascending"), ("prediction_id", "ascending")])

    def dataset(self, window: Window, as_of: datetime) -> tuple[DatasetRef, pa.Table]:
        """Labelled rows of a window as known at `as_of` (records with a label, and predictions joined with theirs),
        and the reference that reads the same rows back for ever."""
        versions = self.versions()
        rows = self._labelled(window, as_of, versions)
        return DatasetRef(self.workload, window, as_of, versions, len(rows), _fingerprint(rows)), rows

    def read(self, ref: DatasetRef) -> pa.Table:
        """The rows that a reference names.

        Raises:
            LakeError: the lake no longer holds exactly these rows.
        """
        rows = self._labelled(ref.window, ref.as_of, dict(ref.versions))
        if _fingerprint(rows) != ref.fingerprint:
            raise LakeError(
                f"The lake no longer holds the {ref.rows} rows of {ref.workload} {ref.window} (found {len(rows)}); "
                "were the tables vacuumed or restored from a backup?"
            )
        return rows

    def _labelled(self, window: Window, as_of: datetime, versions: dict[str, int]) -> pa.Table:
        target, time = self.schema.target, self.schema.event_time
        recorded = self.records(window, versions["records"])
        if target in recorded.column_names:
            recorded = recorded.filter(pc.is_valid(recorded.column(target)))
        else:
            recorded = recorded.slice(0, 0)
        judged = self.judged(window, as_of, versions)
        if time not in judged.column_names and "event_time" in judged.column_names:
            judged = judged.append_column(time, judged.column("event_time"))
        wanted = [name for name in dict.fromkeys([*self.schema.names, time]) if name in judged.column_names]
        served = judged.select(wanted).append_column(target, judged.column("label"))
        known = [part for part in (recorded, served) if len(part)]
        if not known:
            return self.schema.arrow().empty_table()
        rows = pa.concat_tables(known, promote_options="permissive")
        return rows.take(pc.sort_indices(rows, [(name, "ascending") for name in _sortable(rows, time)]))

    def _open(self, table: Table, version: int | None = None) -> DeltaTable | None:
        try:
            return DeltaTable(self.address(table), version=version)
        except TableNotFoundError:
            return None

    def _read(self, table: Table, version: int | None, window: Window | None, time: str) -> pa.Table:
        opened = None if version == -1 else self._open(table, version)
        if opened is None:
            return self._empty(table)
        filters = [(time, ">=", window.start), (time, "<", window.end)] if window else None
        rows = opened.to_pyarrow_table(filters=filters)
        return rows.sort_by([(time, "ascending")])

    def _empty(self, table: Table) -> pa.Table:
        """A table that nobody wrote yet reads as no rows, with its columns."""
        text, number, time = pa.string(), pa.float64(), ARROW["timestamp"]
        if table == "labels":
            return pa.schema({"prediction_id": text, "label": number, "arrived": time}).empty_table()
        logged = [("prediction_id", text), ("event_time", time), ("version", pa.int64()), ("score", number),
                  ("action", text), ("latency_ms", number)]  # fmt: skip
        if table == "shadow":
            return pa.schema([*(pa.field(*entry) for entry in logged), pa.field("champion", pa.int64())]).empty_table()
        raw = self.schema.arrow()
        if table == "records":
            return raw.empty_table()
        inputs = [raw.field(name) for name in self.schema.names]
        return pa.schema([*(pa.field(*entry) for entry in logged), *inputs]).empty_table()


def _form(columns: pa.Schema) -> WriterProperties:
    """How files are written. Looking for repeated values, which ids and tensors do not have, is half of the work of
    writing them; statistics of lists are of no use to a reader."""
    plain = [column.name for column in columns if not pa.types.is_nested(column.type)]
    return WriterProperties(
        compression="SNAPPY",
        default_column_properties=ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE"),
        column_properties={
            name: ColumnProperties(dictionary_enabled=name != "prediction_id", statistics_enabled="PAGE")
            for name in plain
        },
    )


def _appended(opened: DeltaTable | None, source: str) -> int:
    number = opened.transaction_version(source) if opened else None
    return -1 if number is None else int(number)


def _unique(rows: pa.Table, key: str) -> pa.Table:
    """The first row of each key, in the table's order."""
    numbered = rows.select([key]).append_column("_row", pa.array(range(len(rows)), pa.int64()))
    first = numbered.group_by(key).aggregate([("_row", "min")]).column("_row_min").combine_chunks()
    return rows.take(first.take(pc.sort_indices(first)))


def _sortable(rows: pa.Table, time: str) -> Sequence[str]:
    """Column order that makes the rows' order depend on nothing but the rows."""
    return [time, *sorted(name for name in rows.column_names if name != time)]


def _fingerprint(rows: pa.Table) -> str:
    digest = hashlib.sha256()
    names = sorted(rows.column_names)
    ordered = rows.select(names).combine_chunks()
    digest.update(str(ordered.schema.remove_metadata()).encode())
    for batch in ordered.to_batches(max_chunksize=65_536):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        digest.update(sink.getvalue())
    return digest.hexdigest()
