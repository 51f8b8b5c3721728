"""What `noria new NAME` writes: a commented workload to start from, which trains and passes `noria check` as it is."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from string import Template

from noria.errors import WorkloadError

TEMPLATE = Template('''\
"""$title: what is predicted, from what, and for whom. (Say it here: a colleague reads it first.)

Try it:  noria check $name:WORKLOAD      finds mistakes in seconds
         noria train $name:WORKLOAD      trains, registers and judges a version
"""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.records import Window
from noria.schema import Column, Schema
from noria.workload import Rule, Workload


def amount_is_positive(table):
    """A cleaning rule: True where a row is kept. Module level, so that it travels to training workers."""
    return pc.greater(table.column("amount"), 0)


class $kind(Workload):
    name = "$name"  # of the registered model, the lake's tables and the server's route

    # What a record looks like. Kinds: number, integer (an id), string (a level), text (free text), timestamp.
    # Any value may be missing unless `required`; the server refuses what is outside low..high.
    schema = Schema(
        (
            Column("ordered", "timestamp", required=True, example="2026-03-02T09:30:00"),
            Column("shop", "string", example="north", description="Where it was bought"),
            Column("amount", "number", low=0, high=1000, example=12.5, description="What was paid"),
        ),
        event_time="ordered",  # when it happened: windows, splits and drift go by it
        target="minutes",  # known later; never one of the columns
    )
    task = "regression"  # or "binary": the target is 0 or 1, the score a probability
    unit = "minutes"
    log_target = True  # for positive targets whose errors are relative
    notes = "Made-up orders; replace `records` with your data."

    # Rows that a rule does not keep go to quarantine, counted under the rule's name.
    rules = (Rule("amount above 0", ("amount",), amount_is_positive),)

    # Everything else has a default that you can override one at a time: bands (score to action), network (your own
    # torch module), training, gate, drift, policy, schedules; see noria/workload.py and noria/options.py.

    def records(self, window: Window) -> pa.Table:
        """Raw rows with window.start <= event time < window.end: read your database, files or lake here.

        This stand-in invents 200 orders a day, the same ones each time that it is asked.
        """
        first, last = window.start.date(), (window.end + timedelta(days=1)).date()
        days = [first + timedelta(days=number) for number in range((last - first).days)]
        rows = pa.concat_tables(_orders_of(day) for day in days)
        times = rows.column("ordered")
        return rows.filter(pc.and_(pc.greater_equal(times, window.start), pc.less(times, window.end)))

    def slices(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Groups of rows that a new version must not make worse, whatever it gains elsewhere."""
        shops = pc.fill_null(table.column("shop"), "").to_numpy(zero_copy_only=False)
        return {"north": shops == "north", "elsewhere": shops != "north"}


def _orders_of(day):
    draw = np.random.default_rng(day.toordinal())
    shop = draw.choice(["north", "south", "east"], 200)
    amount = draw.gamma(3.0, 10.0, 200)
    minutes = (5 + 4 * (shop == "north") + 0.2 * amount) * draw.lognormal(0, 0.2, 200)
    seconds = np.sort(draw.integers(0, 86_400, 200))
    ordered = np.datetime64(day, "us") + seconds.astype("timedelta64[s]")
    return pa.table(
        {
            "ordered": pa.array(ordered, pa.timestamp("us", tz="UTC")),
            "shop": pa.array(shop.tolist()),
            "amount": pa.array(np.minimum(amount, 1000.0)),
            "minutes": pa.array(minutes),
        }
    )


WORKLOAD = $kind()
''')


def write_workload(name: str, folder: Path) -> Path:
    """Write `folder/<name>.py`, a workload to start from, and return its path.

    Raises:
        WorkloadError: the name is not usable, or the file exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise WorkloadError(f"'{name}' is not a usable name: lower-case letters, digits and _, a letter first.")
    path = folder / f"{name}.py"
    if not path.exists() and find_spec(name) is not None:
        raise WorkloadError(f"'{name}' is the name of an installed module, which would hide yours; choose another.")
    words = name.split("_")
    text = TEMPLATE.substitute(name=name, title=" ".join(words).capitalize(), kind="".join(map(str.capitalize, words)))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise WorkloadError(f"{path} exists already; choose another name or remove it.") from None
    return path
