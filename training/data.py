"""From raw labelled rows to the three parts a model is made of: train, validation and test, in order of time.

Not here: where rows come from (`noria.lake`, the workload), what columns mean to a model (`training.preprocess`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.errors import DataError
from noria.workload import Workload

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Tables of labelled rows; no row of an earlier part is younger than a row of a later one."""

    train: pa.Table
    validation: pa.Table
    test: pa.Table

    def __iter__(self) -> Iterator[tuple[str, pa.Table]]:
        """Name and table of each part, in order."""
        return iter((name, getattr(self, name)) for name in PARTS)


@dataclass(frozen=True)
class Prepared:
    """What a window of raw rows became."""

    split: Split
    quarantine: dict[str, int]
    """Rows rejected by each cleaning rule, and by having no label."""
    duplicates: int
    """Rows of validation and test removed because an earlier part holds the same features and label."""
    rows: int
    """Rows that came in."""


def labelled(table: pa.Table, workload: Workload) -> tuple[pa.Table, dict[str, int]]:
    """Conforming, clean, labelled rows in order of time, and what was rejected, by rule.

    Raises:
        SchemaError: the data does not have the schema's columns.
        DataError: labels that the task cannot have.
    """
    rows, rejected = workload.clean(workload.schema.conform(table))
    target, time = workload.schema.target, workload.schema.event_time
    if target not in rows.column_names:
        raise DataError(
            f"The data of '{workload.name}' has no column '{target}', the target; nothing can be learnt from it."
        )
    known = rows.filter(pc.and_(pc.is_finite(rows.column(target)), pc.is_valid(rows.column(time))))
    rejected["no label or event time"] = len(rows) - len(known)
    _check_labels(known, workload)
    return known.take(pc.array_sort_indices(known.column(time).combine_chunks())), rejected


def prepare(table: pa.Table, workload: Workload, *, held_out: int | None = None) -> Prepared:
    """Clean, order by time and split; a later part loses the rows that an earlier one already holds.

    With `held_out`, validation and test hold at most that many rows each, and up to a fifth of a short window.

    Raises:
        DataError: fewer rows than `workload.training.minimum_rows`, or labels that the task cannot have.
    """
    rows, rejected = labelled(table, workload)
    least = workload.training.minimum_rows
    if len(rows) < max(least, len(PARTS)):
        why = ", ".join(f"{count} {rule}" for rule, count in rejected.items() if count) or "none was rejected"
        raise DataError(
            f"'{workload.name}' has {len(rows)} usable labelled rows of {len(table)} ({why}); training needs {least}. "
            "Take a longer window or lower TrainingOptions.minimum_rows."
        )
    shares = workload.training.split
    if held_out is not None:
        share = min(held_out, len(rows) // 5) / len(rows)
        shares = (1 - 2 * share, share, share)
    first, second = _borders(rows.column(workload.schema.event_time), shares)
    part = np.repeat(np.arange(3), [first, second - first, len(rows) - second])
    features = [column.name for column in workload.schema.columns if column.feature]
    keep = _first_seen(rows.select([*features, workload.schema.target]), part)
    parts = [rows.filter(pa.array(keep & (part == index))) for index in range(3)]
    if not all(len(one) for one in parts):
        raise DataError(
            f"After duplicates were removed a part of the split of '{workload.name}' is empty; is the data repeated?"
        )
    return Prepared(Split(*parts), rejected, int((~keep).sum()), len(table))


def _borders(times: pa.ChunkedArray, shares: tuple[float, float, float]) -> tuple[int, int]:
    """Where validation and test begin; rows of one moment stay together where that leaves no part empty."""
    moments = times.cast(pa.int64()).to_numpy()
    rows = len(moments)
    exact = [
        max(1, min(rows - 2, round(rows * shares[0]))),
        max(2, min(rows - 1, round(rows * (shares[0] + shares[1])))),
    ]
    early, late = (int(np.searchsorted(moments, moments[border], side="left")) for border in exact)
    return (early, late) if 0 < early < late else (exact[0], exact[1])


def _first_seen(rows: pa.Table, part: np.ndarray) -> np.ndarray:
    """Mask [n]: no earlier part holds an equal row. Repeats inside one part are real and stay."""
    names = rows.column_names
    numbered = rows.append_column("_row", pa.array(np.arange(len(rows)))).append_column("_part", pa.array(part))
    groups = numbered.group_by(names).aggregate([("_row", "list"), ("_part", "min")])
    lists = groups.column("_row_list").combine_chunks()
    earliest = np.repeat(groups.column("_part_min").to_numpy(), pc.list_value_length(lists).to_numpy())
    first = np.empty(len(rows), np.int64)
    first[lists.flatten().to_numpy()] = earliest
    return np.asarray(part == first)


def _check_labels(rows: pa.Table, workload: Workload) -> None:
    labels = rows.column(workload.schema.target).to_numpy()
    if workload.task == "binary" and not np.isin(labels, (0.0, 1.0)).all():
        odd = labels[~np.isin(labels, (0.0, 1.0))][0]
        raise DataError(
            f"'{workload.name}' is a binary task, but its target '{workload.schema.target}' holds {odd:g}; use 0 and 1."
        )
    if workload.log_target and (labels <= 0).any():
        raise DataError(
            f"'{workload.name}' fits the logarithm of '{workload.schema.target}', and {int((labels <= 0).sum())} "
            "values are at or below zero; reject them with a rule or set log_target = False."
        )
