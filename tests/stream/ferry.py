"""The tests' own workload: minutes that a ferry takes, invented, with a shift that a model can learn in seconds.

Not below the rooms and not shipped: the stack of the tests loads it by import string from this folder, as it would load
anybody's.
"""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.decision import Band, Bands
from noria.options import GateOptions, PolicyOptions, TrainingOptions
from noria.records import Window
from noria.schema import Column, Schema
from noria.workload import Workload

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)
"""A Monday; there are no rows before it."""
SHIFT = datetime(2024, 3, 11, tzinfo=UTC)
"""From here on the north pier is closed for repair: everything takes twice as long, and north longer still."""
END = datetime(2024, 4, 8, tzinfo=UTC)
A_DAY = 80
"""Crossings of a day."""
WEEK = timedelta(weeks=1)
FIRST = Window(BEGIN, BEGIN + 8 * WEEK)
"""What the first model learns from."""
PIERS = ["north", "south", "east"]


class Ferry(Workload):
    name = "ferry"
    task = "regression"
    log_target = True
    unit = "minutes"
    notes = "Invented crossings."
    until = END
    bands = Bands((Band("late", 40.0),), otherwise="on time")
    schema = Schema(
        (
            Column("departed", "timestamp", required=True, example="2024-01-01T09:30:00"),
            Column("pier", "string", example="north", description="Where it goes"),
            Column("cars", "number", low=0, high=100, example=12, description="Cars on board"),
        ),
        event_time="departed",
        target="minutes",
    )
    training = TrainingOptions(
        windows=(8 * WEEK, 2 * WEEK, WEEK), minimum_rows=200, epochs=8, hidden=(16,), batch_size=32
    )
    gate = GateOptions(minimum_rows=60)
    # One retrain after the shift is what the tests follow; probation would ask for more at every watch.
    policy = PolicyOptions(probation=timedelta(0))

    def records(self, window: Window) -> pa.Table:
        """Crossings that departed in the window; the same ones each time."""
        first, last = max(window.start, BEGIN).date(), min(window.end, END).date()
        days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
        rows = pa.concat_tables([_crossings(day) for day in days] or [_crossings(BEGIN.date()).slice(0, 0)])
        times, end = rows.column("departed"), min(window.end, END)
        return rows.filter(pc.and_(pc.greater_equal(times, window.start), pc.less(times, end)))

    def slices(self, table: pa.Table) -> dict[str, np.ndarray]:
        north = pc.equal(pc.fill_null(table.column("pier"), ""), "north").to_numpy(zero_copy_only=False)
        return {"north": north, "elsewhere": ~north}


def _crossings(day):
    draw = np.random.default_rng(day.toordinal())
    pier, cars = draw.choice(PIERS, A_DAY), draw.integers(0, 61, A_DAY).astype(float)
    minutes = (15 + 5 * (pier == "north") + 0.2 * cars) * draw.lognormal(0, 0.1, A_DAY)
    if day >= SHIFT.date():
        minutes *= np.where(pier == "north", 3.0, 2.0)
    seconds = np.sort(draw.integers(0, 86_400, A_DAY)).astype("timedelta64[s]")
    return pa.table(
        {
            "departed": pa.array(np.datetime64(day, "us") + seconds, pa.timestamp("us", tz="UTC")),
            "pier": pa.array(pier.tolist(), mask=draw.random(A_DAY) < 0.02),
            "cars": pa.array(cars, mask=draw.random(A_DAY) < 0.02),
            "minutes": pa.array(minutes),
        }
    )


WORKLOAD = Ferry()
