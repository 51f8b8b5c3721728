"""Each check of `noria check` is seen to fail on a workload broken in one way; the starting point passes them all.

The checks of a trained model are in tests/integration/test_check_trained.py.
"""

import pickle
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from flows.new import write_workload
from noria.check import check
from noria.decision import Band, Bands
from noria.errors import DataError, WorkloadError
from noria.records import moment
from noria.schema import Column, Schema
from noria.workload import Rule, load

NOW = moment("2026-03-02")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The workload that `noria new` writes, as a class to subclass."""
    folder = tmp_path_factory.mktemp("new")
    write_workload("fresh_orders", folder)
    sys.path.insert(0, str(folder))
    yield type(load("fresh_orders:WORKLOAD"))
    sys.path.remove(str(folder))
    sys.modules.pop("fresh_orders", None)


@pytest.fixture
def variant(sound, monkeypatch):
    """Makes an instance with some attributes changed, in a class that pickles."""

    def make(**changes):
        changed = type("Changed", (sound,), {"__module__": __name__, "__qualname__": "Changed", **changes})
        monkeypatch.setattr(sys.modules[__name__], "Changed", changed, raising=False)
        return changed()

    return make


def said(workload):
    """The findings, as text."""
    return "\n".join(map(str, check(workload, now=NOW)))


def _columns(sound, **changes):
    return replace(
        sound.schema,
        columns=tuple(replace(column, **changes.get(column.name, {})) for column in sound.schema.columns),
    )


def test_the_starting_point_is_sound(sound):
    seen = []
    assert check("fresh_orders:WORKLOAD", now=NOW, progress=seen.append) == []
    assert seen[0] == "workload loads" and seen[-1] == "naive answers" and len(seen) > 15


def test_a_stage_waits_for_the_one_before(sound, variant):
    seen = []
    check(variant(task="ranking", until=datetime(2026, 1, 1)), now=NOW, progress=seen.append)
    assert "workload pickles" in seen and "data is read" not in seen


def test_it_is_not_written_twice(tmp_path):
    write_workload("once", tmp_path)
    with pytest.raises(WorkloadError, match="exists already"):
        write_workload("once", tmp_path)
    for name in ("No", "1st", "a-b", "json"):
        with pytest.raises(WorkloadError, match=f"'{name}'"):
            write_workload(name, tmp_path)


def test_what_does_not_load_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "leaky_orders.py").write_text(
        "from noria.schema import Column, Schema\nSchema((Column('y', 'number'),), event_time='at', target='y')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "target 'y' is among the columns" in said("leaky_orders:WORKLOAD")


STATED = {
    "must be 'regression' or 'binary'": lambda sound: {"task": "ranking"},
    "binary target has no logarithm": lambda sound: {"task": "binary"},
    "limits outside [0, 1)": lambda sound: {
        "task": "binary",
        "log_target": False,
        "bands": Bands((Band("high", 20.0),), otherwise="low"),
    },
    "has no zone": lambda sound: {"until": datetime(2026, 1, 1)},
    "'score' is a column that noria writes": lambda sound: {
        "schema": Schema((Column("score", "number", example=1),), event_time="ordered", target="minutes")
    },
    "'my column' is not a usable column name": lambda sound: {
        "schema": Schema((Column("my column", "number", example=1),), event_time="ordered", target="minutes")
    },
    "No column of the schema is a feature": lambda sound: {
        "schema": _columns(sound, ordered={"feature": False}, shop={"feature": False}, amount={"feature": False})
    },
    "example record is not valid": lambda sound: {"schema": _columns(sound, amount={"example": "much"})},
    "without an `example`: amount": lambda sound: {"schema": _columns(sound, amount={"example": None})},
    "changes on its way through JSON": lambda sound: {"schema": _columns(sound, shop={"example": _Odd("north")})},
    "`rules` does not pickle": lambda sound: {"rules": (Rule("lambda", ("amount",), lambda table: None),)},
}


class _Odd(str):
    """Equal to nothing."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        return False


@pytest.mark.parametrize("sentence", STATED)
def test_what_a_workload_states_is_checked(sentence, sound, variant):
    assert sentence in said(variant(**STATED[sentence](sound)))


def test_target_among_the_features(sound, variant):
    schema = _columns(sound)
    object.__setattr__(schema, "target", "amount")  # the constructor refuses; a schema made another way may not
    assert "The target 'amount' is among the columns" in said(variant(schema=schema))


def test_unpicklable(variant):
    workload = variant()
    workload.connection = (number for number in range(3))
    assert "The workload does not pickle" in said(workload)
    with pytest.raises(TypeError):
        pickle.dumps(workload)


def test_without_records(sound, variant):
    from_nothing = next(base for base in sound.__mro__ if base.__name__ == "Workload")
    assert "is not implemented" in said(variant(records=from_nothing.records))


def _changed(edit):
    """`records` of the sound workload, edited."""

    def build(sound):
        return {"records": lambda self, window: edit(sound.records(self, window), window)}

    return build


def _with(name, values):
    return lambda rows, window: rows.set_column(rows.column_names.index(name), name, values(rows))


DATA = {
    "nobody answered": lambda sound: {"records": _fails},
    "ZeroDivisionError": lambda sound: {"records": lambda self, window: 1 / 0},
    "must return a pyarrow Table": lambda sound: {"records": lambda self, window: [{"amount": 1}]},
    "gives no rows": _changed(lambda rows, window: rows.slice(0, 0)),
    "no column 'shop'": _changed(lambda rows, window: rows.drop_columns("shop")),
    "no column 'minutes', the target": _changed(lambda rows, window: rows.drop_columns("minutes")),
    "'amount' holds string": _changed(_with("amount", lambda rows: pa.array(["much"] * len(rows)))),
    "outside [": _changed(_with("ordered", lambda rows: pa.array([NOW + timedelta(days=9)] * len(rows)))),
    "its two halves have": _changed(lambda rows, window: rows.slice(1)),
    "rows break 'amount: below 0'": lambda sound: {"rules": ()} | _changed(_with("amount", _negated))(sound),
    "Column 'shop' is missing in all": _changed(_with("shop", lambda rows: pa.nulls(len(rows), pa.string()))),
    "The rules reject all": lambda sound: {"rules": (Rule("nothing", ("amount",), _none),)},
    "must return one boolean a row": lambda sound: {"rules": (Rule("numbers", ("amount",), _numbers),)},
    "Rule 'fare' never applies": lambda sound: {"rules": (Rule("fare", ("fare",), _none),)},
    "holds values other than 0 and 1": lambda sound: {"task": "binary", "log_target": False},
    "same value in every row": _changed(_with("minutes", lambda rows: pa.array(np.ones(len(rows))))),
    "needs positive targets": _changed(_with("minutes", lambda rows: pc.subtract(rows.column("minutes"), 10.0))),
    "training needs 10000000": lambda sound: {"training": replace(sound.training, minimum_rows=10_000_000)},
    "follows the target exactly": _changed(_with("amount", lambda rows: pc.multiply(rows.column("minutes"), 2.0))),
    "Slice 'half' must be a boolean": lambda sound: {"slices": lambda self, table: {"half": np.ones(3, bool)}},
    "one score a row": lambda sound: {"naive": lambda self, table: lambda rows: np.ones(3)},
    "scores that are not finite": lambda sound: {"naive": lambda self, table: lambda rows: np.full(len(rows), np.nan)},
}


def _fails(self, window):
    raise DataError("The shop's database: nobody answered.")


def _negated(rows):
    return pc.subtract(rows.column("amount"), 500.0)


def _none(table):
    return pc.greater(table.column("amount"), 1e9)


def _numbers(table):
    return table.column("amount")


@pytest.mark.parametrize("sentence", DATA)
def test_the_data_is_checked(sentence, sound, variant):
    findings = said(variant(**DATA[sentence](sound)))
    assert sentence in findings, findings


def test_the_shipped_workloads_state_nothing_wrong(monkeypatch):
    """Without data; with it, `noria check` is run on them where the cache is filled."""
    monkeypatch.setenv("NORIA_CACHE", str(Path(__file__).parent / "nowhere"))
    for name in ("taxi", "spam"):
        workload = load(f"workloads.{name}:WORKLOAD")
        monkeypatch.setattr(type(workload), "records", _fails)
        assert said(workload) == "data is read: The shop's database: nobody answered."
