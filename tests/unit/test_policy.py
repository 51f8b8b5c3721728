"""The policy as a table: evidence in, decision out."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from monitoring.policy import Evidence, backoff, decide, quality_alarms
from noria.options import PolicyOptions
from noria.records import ColumnDrift, DriftReport, Interval, Quality, Window

NOW = datetime(2020, 3, 30, tzinfo=UTC)
DAY, WEEK = timedelta(days=1), timedelta(weeks=1)
OPTIONS = PolicyOptions()

GOOD = Quality(
    rows=2000,
    error=Interval(3.2, 3.1, 3.3),
    reference_error=3.1,
    bias=Interval(0.02, 0.0, 0.04),
    reference_bias=0.0,
    reference_spread=0.3,
    relative=Interval(0.21, 0.20, 0.22),
    reference_relative=0.21,
    reference_rows=6000,
)
BAD = replace(GOOD, relative=Interval(0.42, 0.40, 0.44))
BIASED = replace(GOOD, bias=Interval(-0.3, -0.32, -0.28))
CALM = ColumnDrift("distance", 0.03, 0.1, 0.4, False, 0.0, 0.0)
MOVED = ColumnDrift("zone", 0.31, 0.1, 1e-9, True, 0.0, 0.0)


def report(quality: Quality | None = GOOD, verdict: str = "ok", **changes: Any) -> DriftReport:
    columns = (CALM, MOVED) if verdict == "drift" else (CALM,)
    known: dict[str, Any] = {"violations": {}, "columns": columns, "prediction": None, "reasons": ("As said.",)}
    return DriftReport(
        "taxi",
        3,
        Window(NOW - WEEK, NOW),
        2000,
        quality=quality,
        verdict=verdict,
        **{**known, **changes},  # type: ignore[arg-type]
    )


def evidence(seen: DriftReport, **changes: Any) -> Evidence:
    known: dict[str, Any] = {"now": NOW, "promoted_at": NOW - 52 * WEEK, "reason": "initial"}
    return Evidence(seen, **{**known, **changes})


OLD = NOW - 10 * WEEK
RETURNED: dict[str, Any] = {"promoted_at": NOW - WEEK, "reason": "quality", "last_verdict": "promoted"}
CASES = {
    # name: (report, what else is known, options, action, cause, words of the reasons)
    "all is well": (report(), {}, {}, "hold", "", "reference has 3.1"),
    "all is well, but inputs moved": (report(verdict="drift"), {}, {}, "hold", "", "zone drifted: distance 0.31"),
    "worse": (report(BAD, "quality"), {}, {}, "retrain", "quality", "relative error 0.42 [0.4, 0.44]"),
    "biased": (report(BIASED, "quality"), {}, {}, "retrain", "quality", "0.3 further below the predictions"),
    "worse, on a window with few rows": (report(BAD, "unknown"), {}, {}, "retrain", "quality", "2,000 labelled rows"),
    "worse, while a retrain runs": (report(BAD, "quality"), {"running": True}, {}, "hold", "", "under way"),
    "worse, in the cool-down": (
        report(BAD, "quality"), {"last_request": NOW - DAY}, {"cooldown": 3 * DAY}, "hold", "", "asked for 1 day ago",
    ),
    "worse, cool-down over": (
        report(BAD, "quality"), {"last_request": NOW - 3 * DAY}, {"cooldown": 3 * DAY}, "retrain", "quality", "",
    ),
    "schema fault before all alarms": (report(BAD, "schema"), {}, {}, "ask", "", "A person must look"),
    "refused yesterday": (
        report(BAD, "quality"), {"last_request": NOW - DAY, "last_verdict": "refused", "refusals": 1}, {},
        "hold", "", "brought no better model",
    ),
    "refused a week ago": (
        report(BAD, "quality"), {"last_request": NOW - WEEK, "last_verdict": "refused", "refusals": 1}, {},
        "retrain", "quality", "",
    ),
    "refused three times, a week ago": (
        report(BAD, "quality"), {"last_request": NOW - WEEK, "last_verdict": "refused", "refusals": 3}, {},
        "hold", "", "The last 3 retrains",
    ),
    "failed twice, two weeks ago": (
        report(BAD, "quality"), {"last_request": NOW - 2 * WEEK, "last_verdict": "failed", "refusals": 2}, {},
        "retrain", "quality", "",
    ),
    "on probation": (
        report(), RETURNED | {"last_request": NOW - WEEK},
        {}, "retrain", "probation", "promoted 7 days ago because of quality",
    ),
    "on probation, without labels yet": (
        report(None), {"promoted_at": NOW - WEEK, "reason": "probation", "last_verdict": "promoted"}, {},
        "retrain", "probation", "",
    ),
    "probation ended by a refusal": (
        report(), {"promoted_at": NOW - WEEK, "reason": "quality", "last_verdict": "refused", "refusals": 1}, {},
        "hold", "", "",
    ),
    "probation ended by time": (
        report(), {"promoted_at": NOW - 8 * WEEK, "reason": "quality", "last_verdict": "promoted"}, {}, "hold", "", "",
    ),
    "no probation after a promotion by hand": (
        report(), {"promoted_at": NOW - WEEK, "reason": "manual", "last_verdict": "promoted"}, {}, "hold", "", "",
    ),
    "no probation after age": (
        report(), {"promoted_at": NOW - WEEK, "reason": "age", "last_verdict": "promoted"}, {}, "hold", "", "",
    ),
    "old": (report(), {}, {"maximum_age": 26 * WEEK}, "retrain", "age", "364 days old"),
    "not old": (report(), {"promoted_at": NOW - 26 * WEEK}, {"maximum_age": 26 * WEEK}, "hold", "", ""),
    "drift, labels may come": (
        report(None, "drift", serving_since=NOW - WEEK), {}, {}, "unknown", "", "Labels may still come",
    ),
    "drift, nothing served": (report(None, "drift"), {}, {}, "unknown", "", "zone drifted"),
    "drift, labels never came": (
        report(None, "drift", serving_since=OLD), {}, {}, "retrain", "drift", "whether it harms, 70 days",
    ),
    "drift, labels never came, refused of late": (
        report(None, "drift", serving_since=OLD), {"last_request": NOW - DAY, "last_verdict": "refused", "refusals": 1},
        {}, "hold", "", "zone drifted",
    ),
    "drift alone is no reason here": (
        report(None, "drift", serving_since=OLD), {}, {"retrain_on_drift": False}, "unknown", "", "does not retrain",
    ),
    "calm, but no labels": (report(None), {}, {}, "hold", "", "Quality is not known yet"),
    "no rows": (report(None, "unknown", columns=()), {}, {}, "unknown", "", "As said."),
    "no rows, but good quality": (report(GOOD, "unknown", columns=()), {}, {}, "hold", "", "reference has 3.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decisions(name: str) -> None:
    seen, known, options, action, cause, words = CASES[name]
    decision = decide(evidence(seen, **known), replace(OPTIONS, **options))
    assert (decision.action, decision.cause) == (action, cause), decision
    assert decision.reasons and all(reason.endswith(".") for reason in decision.reasons)
    assert words in " ".join(decision.reasons)


@pytest.mark.parametrize(
    ("change", "alarms"),
    [
        ({}, 0),
        ({"relative": Interval(0.29, 0.283, 0.30)}, 0),
        ({"relative": Interval(0.29, 0.284, 0.30)}, 1),
        ({"relative": None, "error": Interval(4.4, 4.18, 4.6)}, 0),
        ({"relative": None, "error": Interval(4.4, 4.19, 4.6)}, 1),
        # A target with a log scale is judged per unit: longer trips alone are no alarm.
        ({"error": Interval(9.0, 8.9, 9.1)}, 0),
        ({"bias": Interval(0.2, 0.18, 0.22)}, 1),
        ({"bias": Interval(-0.2, -0.22, -0.18)}, 1),
        ({"bias": Interval(0.14, 0.12, 0.16)}, 0),
        # The same move is not sure when the reference itself rests on 40 rows.
        ({"bias": Interval(0.2, 0.18, 0.22), "reference_rows": 40}, 0),
        ({"reference_error": float("nan"), "relative": None}, 0),
        ({"reference_spread": float("nan"), "bias": Interval(9, 8, 10)}, 0),
        ({"relative": Interval(0.5, 0.4, 0.6), "bias": Interval(-0.3, -0.32, -0.28)}, 2),
    ],
)
def test_quality_alarms(change: dict[str, Any], alarms: int) -> None:
    options = PolicyOptions(error_tolerance=0.35, bias_tolerance=0.5)
    assert len(quality_alarms(replace(GOOD, **change), options)) == alarms


def test_backoff_doubles_and_ends() -> None:
    assert [backoff(refusals, OPTIONS) / WEEK for refusals in (0, 1, 2, 3, 4, 5, 1000)] == [0, 1, 2, 4, 8, 8, 8]


def test_an_alarm_that_stays_is_asked_for_less_and_less() -> None:
    """One year of weekly watches with an alarm that no retrain mends."""
    asked: list[datetime] = []
    for week in range(52):
        now = NOW + week * WEEK
        seen = evidence(report(BAD, "quality"), now=now, last_request=asked[-1] if asked else None, refusals=len(asked))
        if decide(seen, OPTIONS).action == "retrain":
            asked.append(now)
    assert [(moment - NOW) // WEEK for moment in asked] == [0, 1, 3, 7, 15, 23, 31, 39, 47]


def test_same_evidence_same_decision() -> None:
    seen = evidence(report(BAD, "quality"))
    assert decide(seen, OPTIONS) == decide(seen, OPTIONS)
