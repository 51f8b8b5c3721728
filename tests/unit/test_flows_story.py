"""The report of a run: what its headline counts, and that the page opens whatever happened."""

import json
from itertools import pairwise

import pytest

from flows.demo import weeks_between
from flows.story import draw, mean_error, render, summarise, write_story
from noria.errors import NoriaError


def week(end, rows=100, *, frozen=2.0, loop=1.0, decision="hold", version=1):
    return {
        "week_end": end, "rows": rows, "frozen_error": frozen, "loop_error": loop, "verdict": "ok",
        "decision": decision, "version": version, "reasons": ["The error is 2 <b>minutes</b>."],
    }  # fmt: skip


def retrain(verdict="promoted", serving_from="2020-03-10T06:00:00+00:00", version=2):
    return {
        "requested": "2020-03-09T00:00:00+00:00", "reason": "The error rose.", "verdict": verdict, "version": version,
        "serving_from": serving_from, "because": "It is better.",
    }  # fmt: skip


def story(**changes):
    return {
        "workload": "taxi", "unit": "minutes", "notes": "",
        "weeks": [
            week("2020-03-01", frozen=2.0, loop=2.0),
            week("2020-03-08", frozen=4.0, loop=4.0, decision="retrain"),
            week("2020-03-15", 300, frozen=4.0, loop=2.0, version=2),
            week("2020-03-22", 100, frozen=8.0, loop=2.0, version=2),
        ],
        "retrains": [retrain()],
        "first_model": {"error": 2.0, "naive_error": 4.0, "boosted_error": 2.1},
        "requests": {"sent": 700, "failed": 0, "last_failure": ""},
        "predictions_logged": 600, "labels_joined": 500, "addresses": {"MLflow": "http://127.0.0.1:5000"},
        "versions": {"ray": "2.60"}, "seconds": {"start": 20.0, "total": 100.0}, "peak_memory_bytes": 2**31, **changes,
    }  # fmt: skip


NEVER = {"retrains": [retrain("refused", None)]}
AT_THE_END = {"retrains": [retrain("promoted", None)]}
QUIET = {"retrains": [], "weeks": [week("2020-03-01"), week("2020-03-08")]}
EMPTY = {"retrains": [], "weeks": [week("2020-03-01", 0, frozen=0.0, loop=0.0)]}
TOLD = {"retrains": [retrain("failed", None, version=None)]}


def test_headline_counts_from_the_first_retrained_answer():
    facts = summarise(story())
    assert facts["after"] == "2020-03-10"
    assert facts["first_alarm"] == "2020-03-08"
    assert (facts["promoted"], facts["attempts"]) == (1, 1)
    # 300 rows of 4 and 100 of 8; 400 rows of 2.
    assert (facts["frozen_after"], facts["loop_after"]) == (5.0, 2.0)
    assert facts["frozen"] == pytest.approx((200 + 400 + 1200 + 800) / 600)


@pytest.mark.parametrize(
    "changes", [NEVER, AT_THE_END, QUIET, EMPTY, TOLD], ids=["never", "end", "quiet", "empty", "failed"]
)
def test_without_a_retrained_answer_nothing_is_compared(changes):
    assert summarise(story(**changes))["after"] is None


def test_weeks_without_rows_weigh_nothing():
    assert mean_error([week("a", 0, loop=0.0), week("b", 10, loop=3.0)], "loop_error") == 3.0
    assert mean_error([week("a", 0)], "loop_error") is None
    assert mean_error([], "loop_error") is None


@pytest.mark.parametrize("changes", [{}, NEVER, AT_THE_END, QUIET, EMPTY, TOLD, {"weeks": [], "retrains": []}])
def test_the_page_opens_whatever_happened(changes, tmp_path):
    told = story(**changes)
    page = write_story(told, tmp_path / "story").read_text()
    assert {path.name for path in page_folder(tmp_path)} == {"report.html", "report.png", "report.json"}
    assert json.loads((tmp_path / "story" / "report.json").read_text()) == told
    words = page.replace("None was asked for.", "").replace(picture_of(page), "")
    assert "None" not in words and "9999" not in words
    assert "<b>minutes</b>" not in page, "what a reason says is text, not markup"


def picture_of(page):
    return page.split("base64,")[1].split('"')[0]


def page_folder(tmp_path):
    return list((tmp_path / "story").iterdir())


def test_a_promotion_that_nobody_saw_is_not_called_a_refusal():
    assert "nothing beat the champion" not in render(story(**AT_THE_END), b"")
    assert "nothing beat the champion" in render(story(**NEVER), b"")


def test_picture_marks_promotions_and_refusals():
    figure = draw(story(retrains=[retrain(), retrain("refused", None)]))
    (axes,) = figure.axes
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"retrained and promoted", "retrained, refused by the gate"}
    assert axes.get_ylabel() == "mean error (minutes)"


def test_weeks_run_from_monday_to_sunday():
    weeks = weeks_between("2020-03-11", "2020-03-22")
    assert [f"{one.start:%a %Y-%m-%d}" for one in weeks] == ["Mon 2020-03-09", "Mon 2020-03-16"]
    assert all(before.end == after.start for before, after in pairwise(weeks))
    assert len(weeks_between("2019-12-02", "2020-06-28")) == 30
    assert len(weeks_between("2020-03-11", "2020-03-11")) == 1


@pytest.mark.parametrize(
    ("start", "end"), [("soon", "2020-01-01"), ("2020-01-01", "2019-01-01"), ("2018-06-01", "2020-01-01"), ("", "")]
)
def test_other_weeks_get_a_sentence(start, end):
    with pytest.raises(NoriaError, match="--from"):
        weeks_between(start, end)
