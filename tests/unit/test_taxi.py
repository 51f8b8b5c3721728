"""The taxi workload: on a few trips that the test writes, and on all of them where the cache holds them."""

import pickle
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from noria.records import Window, moment
from noria.settings import load_settings
from noria.source import convert
from workloads.taxi import CORE, TRIPS, WORKLOAD, ZonePairSpeed, read_folder

HEADER = (
    "vendor_id,pickup_datetime,dropoff_datetime,passenger_count,trip_distance,rate_code_id,pickup_location_id,"
    "dropoff_location_id,fare_amount,congestion_surcharge,tip_amount"
)
GOOD = "2,2018-01-11 18:24:44,2018-01-11 18:35:14,1,1.65,1,230,237,8.5,,2.06"
BAD = {
    "pick-up outside the month of its file": GOOD.replace("2018-01-11", "2017-12-31"),
    "fare not above 0": GOOD.replace("8.5", "-8.5"),
    "duration outside 1-180 minutes": GOOD.replace("18:35:14", "18:24:50"),
    "distance outside 0-60 miles": GOOD.replace("1.65", "0.0"),
    "speed outside 0.5-80 miles an hour": GOOD.replace("1.65", "59.0"),
    "rate code 99": GOOD.replace("1.65,1", "1.65,99"),
    "exact duplicate": GOOD,
}
ALL = Window(moment("2000-01-01"), moment("2100-01-01"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A cache that holds one good trip, one more with missing values, and one for each rule."""
    rows = [GOOD, ",2018-01-12 09:00:00,2018-01-12 09:10:00,,2.5,,132,1,30.0,,", *BAD.values()]
    source = tmp_path / "source"
    source.mkdir()
    (source / "yellow_tripdata_sample_2018-01.csv").write_text("\n".join([HEADER, *rows]))
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path))
    convert(tmp_path / TRIPS, lambda: read_folder(source), "pickup_datetime")
    return WORKLOAD.records(ALL)


@pytest.fixture(scope="module")
def every():
    """All trips, where the cache holds them."""
    path = load_settings().downloads / TRIPS
    if not path.is_file():
        pytest.skip(f"{path} is not there; `noria check workloads.taxi:WORKLOAD` downloads it")
    return WORKLOAD.records(ALL)


def test_each_rule_rejects_its_trip(small):
    kept, rejected = WORKLOAD.clean(small)
    assert rejected == dict.fromkeys(BAD, 1)
    assert len(kept) == 2
    assert kept.column("minutes").to_pylist() == [10.5, 10.0]


def test_missing_values_come_as_missing(small):
    kept, _ = WORKLOAD.clean(small)
    assert [kept.column(name).null_count for name in ("vendor_id", "passenger_count", "rate_code_id")] == [1, 1, 1]
    assert WORKLOAD.schema.violations(kept) == {}


def test_a_window_takes_its_start_and_not_its_end(small):
    window = Window(moment("2018-01-11T18:24:44"), moment("2018-01-12T09:00:00"))
    assert set(WORKLOAD.records(window).column("pickup_datetime").to_pylist()) == {window.start}


def test_slices_cover_every_row_once(small):
    kept, _ = WORKLOAD.clean(small)
    masks = WORKLOAD.slices(kept.select(list(WORKLOAD.schema.names)))
    assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1, 1]
    assert masks["manhattan core"].tolist() == [True, False]
    assert masks["airport"].tolist() == [False, True]


def test_zone_pair_speed_falls_back():
    trips = pa.table(
        {
            "pickup_location_id": [1, 1, 1, 2],
            "dropoff_location_id": [2, 2, 3, 3],
            "trip_distance": [2.0, 4.0, 6.0, 1.0],
            "minutes": [10.0, 10.0, 10.0, 10.0],
        }
    )
    asked = pa.table(
        {
            "pickup_location_id": [1, 1, 9, 1, None],
            "dropoff_location_id": [2, 9, 9, 2, None],
            "trip_distance": [3.0, 3.0, 3.0, None, 3.0],
        }
    )
    scorer = pickle.loads(pickle.dumps(ZonePairSpeed.fit(trips)))
    pair, zone, anywhere = 3 / 0.3, 3 / 0.4, 3 / 0.3
    np.testing.assert_allclose(scorer(asked), [pair, zone, anywhere, 10.0, anywhere])


def test_the_rules_reject_what_was_measured(every):
    kept, rejected = WORKLOAD.clean(every)
    assert list(rejected.values()) == [10, 985, 4396, 1913, 103, 5, 0]
    assert len(kept) / len(every) == pytest.approx(0.979, abs=0.001)
    assert WORKLOAD.schema.violations(kept) == {}


def test_the_core_is_where_the_surcharge_is_paid(every):
    """The city's congestion zone can be read off the data: each zone's inner trips say where it lies."""
    paid = every.filter(pc.greater_equal(every.column("pickup_datetime"), pa.scalar(moment("2019-03-01"))))
    ends = [paid.column(f"{end}_location_id").to_numpy() for end in ("pickup", "dropoff")]
    surcharge = pc.greater(pc.fill_null(paid.column("congestion_surcharge"), 0), 0).to_numpy()
    for zone in range(1, 264):  # 264 and 265 are 'unknown'
        inner = (ends[0] == zone) & (ends[1] == zone)
        if inner.sum() >= 5:
            assert (surcharge[inner].mean() > 0.5) == (zone in CORE), zone


def test_a_week_reads_quickly(every):
    window = Window(moment("2020-03-02"), moment("2020-03-09"))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        WORKLOAD.records(window)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.05


def test_the_cache_can_be_deleted(small, tmp_path):
    shutil.rmtree(tmp_path / "source")
    assert len(WORKLOAD.records(ALL)) == len(small)
