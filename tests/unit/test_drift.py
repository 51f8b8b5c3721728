"""The drift check: what it must find, what it must leave alone, and how often it cries wolf."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import jensenshannon

from monitoring.binning import SCORE
from monitoring.drift import calibrate, distance, measure, split
from noria.options import DriftOptions
from noria.records import ColumnDrift, Window, moment
from noria.schema import Column, Schema
from noria.settings import load_settings
from workloads.taxi import TRIPS
from workloads.taxi import WORKLOAD as TAXI

WEEK = 7 * 86_400
OPTIONS = DriftOptions()
SCHEMA = Schema(
    (
        Column("amount", "number"),
        Column("items", "number"),
        Column("zone", "integer"),
        Column("kind", "string"),
        Column("at", "timestamp"),
        Column("note", "text"),
        Column("constant", "number"),
        Column("empty", "string"),
    ),
    event_time="at",
    target="y",
)
WORDS = np.array(["please", "call", "me", "later", "today", "parcel", "door", "ring", "left", "right"])


def stream(weeks: int, seed: int, *, rows: int = 600, wander: float = 0.03, first: int = 0) -> list[pa.Table]:
    """Calm weeks: every week has its own level, mix of kinds and daily rhythm, drawn around what is usual."""
    made = []
    for week in range(first, first + weeks):
        one = np.random.default_rng([seed, week])
        level, tilt = one.normal(0, wander), one.normal(0, wander)
        mix = np.array([0.5, 0.3, 0.15, 0.05]) * np.exp(one.normal(0, 2 * wander, 4))
        seconds = np.sort(one.integers(0, WEEK, rows)) + WEEK * week + 1_514_764_800
        amount = one.lognormal(1 + level, 0.5, rows)
        zones = np.exp(-np.arange(60) / 15) * np.exp(one.normal(0, 2 * wander, 60))
        made.append(
            pa.table(
                {
                    "amount": pa.array(amount, mask=one.random(rows) < 0.02),
                    "items": one.poisson(2 * np.exp(tilt), rows).astype(float),
                    "zone": one.choice(60, rows, p=zones / zones.sum()),
                    "kind": one.choice(["a", "b", "c", "d"], rows, p=mix / mix.sum()),
                    "at": pa.array(seconds * 1_000_000, pa.timestamp("us", tz="UTC")),
                    "note": [" ".join(words) for words in one.choice(WORDS, (rows, 5))],
                    "constant": np.ones(rows),
                    "empty": pa.nulls(rows, pa.string()),
                    SCORE: amount * one.lognormal(tilt / 2, 0.2, rows),
                }
            )
        )
    return made


@pytest.fixture(scope="module")
def reference() -> pa.Table:
    return pa.concat_tables(stream(26, 0))


@pytest.fixture(scope="module")
def thresholds(reference: pa.Table) -> dict[str, object]:
    return calibrate(reference, SCHEMA, OPTIONS)


@pytest.fixture(scope="module")
def week() -> pa.Table:
    return stream(1, 0, first=30)[0]


def drifted(found: tuple[ColumnDrift, ...]) -> set[str]:
    return {one.column for one in found if one.drifted}


def replaced(table: pa.Table, name: str, values: object) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def test_calibration_is_json_and_repeats(reference: pa.Table, thresholds: dict[str, object]) -> None:
    assert json.loads(json.dumps(thresholds, allow_nan=False)) is not None
    assert calibrate(reference, SCHEMA, OPTIONS) == thresholds
    names = set(thresholds["columns"])
    assert {"at (hour)", "at (weekday)", "note (words)", "note (rare words)", SCORE} <= names
    assert "at" not in names


def test_calm_week_is_calm_after_json(thresholds: dict[str, object], week: pa.Table) -> None:
    found = measure(week, json.loads(json.dumps(thresholds)), OPTIONS)
    assert drifted(found) == set()
    columns, prediction = split(found)
    assert prediction is not None and prediction.column == SCORE and len(columns) == len(found) - 1


def test_false_alarms_keep_the_budget_of_calm_windows() -> None:
    """200 calm windows after 10 references. Budget 5%: at most 8% (two standard errors) may alarm even without the
    least distance, which leaves next to none."""
    schema = Schema(SCHEMA.columns[:5], event_time="at", target="y")
    strict, sure, large = DriftOptions(minimum_distance=0.0), 0, 0
    for seed in range(1, 11):
        known = calibrate(pa.concat_tables(stream(26, seed, rows=300)), schema, strict)
        for one in stream(20, seed, rows=300, first=26):
            distances = [column.distance for column in measure(one, known, strict) if column.drifted]
            sure += bool(distances)
            large += any(distance >= OPTIONS.minimum_distance for distance in distances)
    assert sure <= 0.08 * 200
    assert large <= 0.02 * 200


def test_iid_thresholds_would_alarm_where_these_do_not() -> None:
    """What the calibration is for: weeks that wander by more than sampling noise."""
    rows = {"rows": 2000, "wander": 0.1}
    weeks = stream(26, 3, **rows)
    options = DriftOptions(minimum_distance=0.0)
    known = calibrate(pa.concat_tables(weeks), SCHEMA, options)
    shuffled = pa.concat_tables(weeks).take(np.random.default_rng(0).permutation(26 * 2000))
    times = pa.concat_tables(weeks).column("at")
    iid = calibrate(replaced(shuffled, "at", times.combine_chunks()), SCHEMA, options)
    calm = stream(10, 3, first=26, **rows)
    assert sum(bool(drifted(measure(one, iid, options))) for one in calm) == 10
    assert sum(bool(drifted(measure(one, known, options))) for one in calm) <= 1


def test_real_calm_weeks_stay_calm_and_the_lockdown_does_not() -> None:
    """88 weeks of taxi trips after a reference of 2018-01..06; the four alarms in 2019-02 are a fault of the data."""
    path = load_settings().downloads / TRIPS
    if not path.exists():
        pytest.skip(f"{path} is not there; `noria check workloads.taxi:WORKLOAD` downloads it")
    trips, _ = TAXI.clean(TAXI.records(Window(moment("2018-01-01"), moment("2020-07-01"))))
    times = trips.column("pickup_datetime").cast(pa.int64()).to_numpy() // 1_000_000
    known = calibrate(trips.slice(0, np.searchsorted(times, moment("2018-07-01").timestamp())), TAXI.schema, TAXI.drift)
    found = {}
    for start in range(int(moment("2018-07-02").timestamp()), int(moment("2020-06-22").timestamp()), WEEK):
        first, last = np.searchsorted(times, [start, start + WEEK])
        found[start] = drifted(measure(trips.slice(first, last - first), known, TAXI.drift))
    calm = [bool(columns) for start, columns in found.items() if start < moment("2020-03-09").timestamp()]
    lockdown = [bool(columns) for start, columns in found.items() if start >= moment("2020-03-16").timestamp()]
    assert len(calm) == 88 and sum(calm) <= 0.05 * len(calm)
    assert len(lockdown) == 14 and all(lockdown)


def test_missing_share_alarms(thresholds: dict[str, object], week: pa.Table) -> None:
    mask = np.random.default_rng(0).random(len(week)) < 0.6
    gone = pa.array(week.column("amount").to_numpy(), mask=mask)
    found = {one.column: one for one in measure(replaced(week, "amount", gone), thresholds, OPTIONS)}
    assert found["amount"].drifted and found["amount"].missing > 0.55 and found["amount"].missing_reference < 0.05
    assert drifted(tuple(found.values())) == {"amount"}


def test_one_destroyed_column_in_twenty_alarms() -> None:
    schema = Schema(tuple(Column(f"c{index}", "number") for index in range(20)), event_time="at", target="y")

    def table(weeks: int, seed: int) -> pa.Table:
        one, rows = np.random.default_rng(seed), 300 * weeks
        columns = {f"c{index}": one.normal(size=rows) for index in range(20)}
        seconds = np.sort(one.integers(0, WEEK * weeks, rows))
        return pa.table({**columns, "at": pa.array(seconds * 1_000_000, pa.timestamp("us", tz="UTC"))})

    known = calibrate(table(12, 0), schema, OPTIONS)
    current = table(1, 1)
    assert drifted(measure(current, known, OPTIONS)) == set()
    for values in (np.zeros(300), np.full(300, np.nan), np.random.default_rng(2).normal(3, 1, 300)):
        assert drifted(measure(replaced(current, "c7", values), known, OPTIONS)) == {"c7"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", np.full(600, 2.0)),
        ("constant", pa.nulls(600, pa.float64())),
        ("empty", ["suddenly here"] * 600),
        ("kind", ["never seen"] * 600),
        ("zone", np.arange(1000, 1600)),
        ("note", ["completely different vocabulary in the notes"] * 600),
        ("note", [""] * 600),
        ("items", np.full(600, 40.0)),
        (SCORE, np.full(600, 0.1)),
    ],
)
def test_destroyed_columns_of_every_kind_alarm(
    thresholds: dict[str, object], week: pa.Table, name: str, values: object
) -> None:
    found = drifted(measure(replaced(week, name, values), thresholds, OPTIONS))
    assert {one.partition(" (")[0] for one in found} == {name}


def test_night_traffic_alarms_as_hour_not_as_time(thresholds: dict[str, object], week: pa.Table) -> None:
    micros = week.column("at").cast(pa.int64()).to_numpy()
    day = 86_400_000_000
    night = pa.array(micros // day * day + micros % day // 6, pa.timestamp("us", tz="UTC"))
    assert drifted(measure(replaced(week, "at", night), thresholds, OPTIONS)) == {"at (hour)"}


def test_a_column_that_the_window_lacks_is_missing_throughout(thresholds: dict[str, object], week: pa.Table) -> None:
    found = {one.column: one for one in measure(week.drop_columns(["kind"]), thresholds, OPTIONS)}
    assert found["kind"].drifted and found["kind"].missing == 1.0


def test_fewer_rows_ask_for_more_distance(thresholds: dict[str, object], week: pa.Table) -> None:
    options = DriftOptions(minimum_rows=10, minimum_distance=0.0)
    many = {one.column: one.threshold for one in measure(week, thresholds, options)}
    few = {one.column: one.threshold for one in measure(week.slice(0, 60), thresholds, options)}
    assert all(few[name] > many[name] for name in ("amount", "zone", "kind", SCORE))


def test_verdict_threshold_and_p_value_agree(thresholds: dict[str, object], week: pa.Table) -> None:
    options = DriftOptions(minimum_distance=0.0)
    for scale in (1.0, 1.1, 1.3, 2.0):
        changed = replaced(week, "amount", np.nan_to_num(week.column("amount").to_numpy(), nan=1.0) * scale)
        for one in measure(changed, thresholds, options):
            assert one.drifted == (one.distance >= one.threshold)


def test_scores_of_other_versions_are_not_compared(thresholds: dict[str, object], week: pa.Table) -> None:
    broken = replaced(week, SCORE, np.full(600, 0.1))
    assert SCORE not in drifted(measure(broken, thresholds, OPTIONS, answered=week))
    assert split(measure(broken, thresholds, OPTIONS, answered=week.slice(0, 20)))[1] is None


@pytest.mark.parametrize(("weeks", "note"), [(8, "periods of the watched"), (4, "1/2"), (2, "1/7"), (1, "1/7")])
def test_short_references_say_so_and_still_work(weeks: int, note: str) -> None:
    known = calibrate(pa.concat_tables(stream(weeks, 5)), SCHEMA, OPTIONS)
    assert note in known["note"] and known["periods"] >= 6
    alarms = [bool(drifted(measure(one, known, OPTIONS))) for one in stream(20, 5, first=10)]
    assert sum(alarms) <= 2
    broken = replaced(stream(1, 5, first=10)[0], "kind", ["never seen"] * 600)
    assert "kind" in drifted(measure(broken, known, OPTIONS))


def test_rows_of_one_moment_are_cut_into_parts() -> None:
    table = stream(1, 6)[0]
    moment = pa.array([1_600_000_000_000_000] * len(table), pa.timestamp("us", tz="UTC"))
    known = calibrate(replaced(table, "at", moment), SCHEMA, OPTIONS)
    assert "equal parts" in known["note"]
    assert measure(table, known, OPTIONS)


def test_too_small_a_reference_compares_nothing() -> None:
    known = calibrate(stream(1, 7)[0].slice(0, 50), SCHEMA, OPTIONS)
    assert known["columns"] == {} and "too few" in known["note"]
    assert measure(stream(1, 7)[0], known, OPTIONS) == ()


def test_holes_in_the_reference_are_bridged() -> None:
    weeks = stream(30, 8)
    known = calibrate(pa.concat_tables([*weeks[:10], weeks[12].slice(0, 20), *weeks[18:]]), SCHEMA, OPTIONS)
    assert known["periods"] == 22
    assert drifted(measure(stream(1, 8, first=40)[0], known, OPTIONS)) == set()


def test_windows_of_a_day() -> None:
    options = DriftOptions(window=timedelta(days=1))
    known = calibrate(pa.concat_tables(stream(8, 9, rows=3500)), SCHEMA, options)
    assert known["periods"] == 56
    days = stream(1, 9, rows=3500, first=8)[0]
    calm = [bool(drifted(measure(days.slice(day * 500, 500), known, options))) for day in range(7)]
    assert sum(calm) <= 1


def test_numbers_read_in_single_precision_are_the_same_numbers() -> None:
    """A tied value such as 2.3 must not change its bin because the log holds what the model read of it."""
    schema = Schema((Column("miles", "number"),), event_time="at", target="y")
    one = np.random.default_rng(0)
    seconds = pa.array(np.sort(one.integers(0, WEEK * 10, 5000)) * 1_000_000, pa.timestamp("us", tz="UTC"))
    table = pa.table({"miles": np.round(one.exponential(2, 5000), 1), "at": seconds})
    read = replaced(table, "miles", table.column("miles").to_numpy().astype(np.float32).astype(np.float64))
    assert measure(read, calibrate(table, schema, OPTIONS), OPTIONS)[0].distance < 1e-6


def test_distance_is_a_distance() -> None:
    assert distance(np.array([5, 5]), np.array([50, 50])) == pytest.approx(0.0, abs=1e-9)
    assert distance(np.array([7, 0]), np.array([0, 3])) == pytest.approx(1.0)
    assert distance(np.array([0, 0]), np.array([1, 3])) == 0.0
    counts = np.array([3, 7, 0, 2]), np.array([5, 5, 1, 0])
    assert distance(*counts) == pytest.approx(jensenshannon(*counts, base=2))
