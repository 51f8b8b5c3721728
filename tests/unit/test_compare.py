"""Champion and challenger compared: the right figures on rows whose answer is known, and no claim without evidence."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from flows.shadow import table, window_of
from monitoring.compare import Rules, compare
from noria.errors import SettingsError
from noria.records import Window

NOON = datetime(2020, 3, 2, 12, tzinfo=UTC)
WEEK = Window(datetime(2020, 3, 1, tzinfo=UTC), datetime(2020, 3, 8, tzinfo=UTC))
RULES = Rules("absolute_error")


def rows(scores, *, version, actions=None, latency=1.0, first=0, champion=None):
    count = len(scores)
    found = {
        "prediction_id": pa.array([f"p{first + number}" for number in range(count)], pa.string()),
        "event_time": pa.array([NOON] * count, pa.timestamp("us", tz="UTC")),
        "version": pa.array([version] * count, pa.int64()),
        "score": pa.array(scores, pa.float64()),
        "action": pa.array(actions or [None] * count, pa.string()),
        "latency_ms": pa.array([latency] * count, pa.float64()),
    }
    return pa.table(found | ({"champion": pa.array([champion] * count, pa.int64())} if champion else {}))


def labels(values, first=0):
    times = pa.array([NOON] * len(values), pa.timestamp("us", tz="UTC"))
    ids = pa.array([f"p{first + number}" for number in range(len(values))], pa.string())
    return pa.table({"prediction_id": ids, "label": pa.array(values, pa.float64()), "arrived": times})


def run(champion, challenger, known, **changes):
    given = {"workload": "trips", "versions": (1, 2), "window": WEEK, "rules": RULES, **changes}
    return compare(champion, challenger, known, **given)


def test_figures_of_rows_that_are_known():
    champion = rows([1.0, 2.0, 3.0, 4.0, 9.0], version=1, actions=["a", "a", "b", "b", "b"], latency=2.0)
    challenger = rows([1.5, 2.0, 3.0, 8.0], version=2, actions=["a", "b", "b", "b"], latency=0.5, champion=1)
    found = run(champion, challenger, labels([]))
    assert (found.rows, found.same_action) == (4, 0.75)
    assert found.difference_mean == pytest.approx(4.5 / 4)
    assert found.difference_max == 4.0
    assert found.difference_p95 == pytest.approx(np.quantile([0.5, 0, 0, 4], 0.95))
    assert found.rank_correlation == pytest.approx(1.0)
    assert (found.champion_ms, found.challenger_ms) == (2.0, 0.5)
    assert (found.labelled, found.gain, found.verdict) == (0, None, "unknown")
    assert "it is not known which errs less" in found.conclusion
    assert "same action in 75.0%" in found.conclusion


def test_ranks_that_turn_round_and_scores_that_never_change():
    champion = rows([1.0, 2.0, 3.0], version=1)
    assert run(champion, rows([3.0, 2.0, 1.0], version=2), labels([])).rank_correlation == pytest.approx(-1.0)
    found = run(champion, rows([2.0, 2.0, 2.0], version=2), labels([]))
    assert (found.rank_correlation, found.same_action) == (None, None)


def test_other_versions_and_other_requests_do_not_count():
    champion = pa.concat_tables([rows([1.0], version=1), rows([5.0], version=3, first=1)])
    challenger = pa.concat_tables(
        [rows([2.0, 2.0], version=2), rows([9.0], version=4), rows([7.0], version=2, first=50)]
    )
    found = run(champion, challenger, labels([]))
    assert (found.rows, found.difference_max) == (1, 1.0)


def test_nothing_to_compare_is_said():
    found = run(rows([1.0], version=1), rows([], version=2), labels([1.0]))
    assert (found.rows, found.verdict) == (0, "nothing")
    assert "shadowed no answer of version 1" in found.conclusion


@pytest.mark.parametrize(("scale", "verdict"), [(0.5, "better"), (1.0, "alike"), (2.0, "worse")])
def test_errors_are_judged_on_the_same_rows_with_an_interval(scale, verdict):
    generator, count = np.random.default_rng(0), 2000
    truth = generator.normal(10, 3, count)
    champion = rows(truth + generator.normal(0, 1, count), version=1)
    challenger = rows(truth + generator.normal(0, scale, count), version=2)
    found = run(champion, challenger, labels(truth[:1500]))
    assert (found.rows, found.labelled, found.verdict) == (2000, 1500, verdict)
    assert found.champion_error.value == pytest.approx(0.798, abs=0.05)  # E|N(0, 1)|
    assert found.challenger_error.value == pytest.approx(0.798 * scale, abs=0.1)
    assert found.gain.low < 1 - scale < found.gain.high
    assert found.gain.value == pytest.approx(1 - found.challenger_error.value / found.champion_error.value)
    assert "1,500 with a label" in found.conclusion
    assert "Other weeks may differ" in found.conclusion


def test_few_labels_say_nothing_about_errors():
    truth = np.arange(99.0)
    found = run(rows(truth + 5, version=1), rows(truth, version=2), labels(truth))
    assert (found.labelled, found.verdict, found.gain) == (99, "unknown", None)
    assert "99 of them have a label and 100 are needed" in found.conclusion


def test_it_can_be_printed_and_read_by_scripts():
    truth = np.arange(200.0)
    found = run(rows(truth + 5, version=1), rows(truth + 1, version=2), labels(truth))
    data = json.loads(json.dumps(found.to_json()))
    assert (data["verdict"], data["gain"]["value"]) == ("better", pytest.approx(0.8))
    assert data["window"]["start"] == "2020-03-01T00:00:00+00:00"
    shown = table(found, "min")
    assert shown.row_count == 6
    assert "1 (1 to 1) min" in list(shown.columns[2].cells)


def test_windows_are_lengths_of_time():
    assert window_of("36h", NOON).start == datetime(2020, 3, 1, 0, tzinfo=UTC)
    assert window_of("2w", NOON).start == datetime(2020, 2, 17, 12, tzinfo=UTC)
    for wrong in ("", "7", "d", "-1d", "0d", "1.5d", "7 d"):
        with pytest.raises(SettingsError, match="is no length of time"):
            window_of(wrong, NOON)
