"""The contract's defaults, cleaning, and loading by import string."""

import sys
from datetime import timedelta
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from noria.errors import DataError, WorkloadError
from noria.records import DatasetRef, Evaluation, Window, moment
from noria.schema import Column, Schema
from noria.workload import Rule, Workload, load


class Plain(Workload):
    name = "plain"
    task = "regression"
    schema = Schema((Column("x", "number"),), event_time="at", target="y")
    rules: ClassVar = (
        Rule("x above 1", ("x",), lambda table: pc.greater(table.column("x"), 1)),
        Rule("x above 2", ("x",), lambda table: pc.greater(table.column("x"), 2)),
        Rule("fare", ("fare",), lambda table: pc.greater(table.column("fare"), 0)),
    )


class Binary(Plain):
    task = "binary"


ROWS = pa.table({"x": [0.0, 1.5, 3.0, None], "y": [1.0, 0.0, 1.0, 1.0]})


def test_the_first_rule_wins_and_missing_is_kept():
    kept, rejected = Plain().clean(ROWS)
    assert kept.column("x").to_pylist() == [3.0, None]
    assert rejected == {"x above 1": 1, "x above 2": 1}


def test_the_default_baseline_is_median_or_prior():
    assert Plain().naive(ROWS)(ROWS).tolist() == [1.0] * 4
    assert Binary().naive(ROWS)(ROWS).tolist() == [0.75] * 4


def test_the_loss_follows_the_task():
    assert (Plain().loss, Binary().loss) == ("absolute_error", "log_loss")


def _module(folder, text):
    (folder / "my_workload.py").write_text(text)
    return "my_workload:WORKLOAD"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("", "has no 'WORKLOAD'"),
        ("WORKLOAD = 3", "not an instance"),
        ("from noria.workload import Workload\nclass A(Workload): pass\nWORKLOAD = A()", "does not set `name`"),
        (
            "from noria.schema import *\nfrom noria.workload import Workload\nclass A(Workload):\n    name = 'A b'\n"
            "    task = 'binary'\n    schema = Schema((Column('x', 'text'),), 'at', 'y')\nWORKLOAD = A()",
            "not a usable name",
        ),
    ],
)
def test_what_cannot_be_loaded_is_said(text, sentence, tmp_path, monkeypatch, forget):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WorkloadError, match=sentence):
        load(_module(tmp_path, text))


@pytest.fixture
def forget():
    """Modules that a test imported from its own folder."""
    yield
    sys.modules.pop("my_workload", None)


@pytest.mark.parametrize("path", ["taxi", "workloads/taxi.py:WORKLOAD", "a:b:c", ""])
def test_an_import_string_has_one_form(path):
    with pytest.raises(WorkloadError, match="module:NAME"):
        load(path)


def test_a_window_is_half_open_and_ordered():
    now = moment("2020-03-02")
    assert Window.last(timedelta(weeks=1), now).start == moment("2020-02-24T00:00:00+00:00")
    with pytest.raises(DataError, match="before it ends"):
        Window(now, now)
    with pytest.raises(DataError, match="zone"):
        Window(now.replace(tzinfo=None), now)


def test_records_read_back_from_json():
    window = Window(moment("2020-01-01"), moment("2020-02-01"))
    ref = DatasetRef("taxi", window, moment("2020-02-08"), {"records": 3, "labels": -1}, 10, "ab")
    assert DatasetRef.from_json(ref.to_json()) == ref
    found = Evaluation(3, {"mae": 1.0}, {"north": {"mae": 2.0}})
    assert Evaluation.from_json(found.to_json()) == found


def test_scores_have_one_entry_a_row():
    assert isinstance(Plain().naive(ROWS)(ROWS.slice(0, 2)), np.ndarray)
    assert len(Plain().naive(ROWS)(ROWS.slice(0, 2))) == 2
