"""From evidence to a decision: retrain, hold, ask a person, or unknown. Pure; the same evidence decides the same.

The order is the policy: what is under way first, then what only a person can mend, then how good the model *is*, and
only where that is unknown, how its inputs look. Every reason is a sentence with its numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from noria.options import PolicyOptions
from noria.records import Decision, DriftReport, Quality

Reason = Literal["initial", "quality", "drift", "age", "probation", "manual"]
ALARMS: tuple[Reason, ...] = ("quality", "drift", "probation")
"""Promotions for these reasons followed a change, whose end the new champion may not have seen."""
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Evidence:
    """All that a decision depends on."""

    report: DriftReport
    now: datetime
    promoted_at: datetime
    """When the champion became champion."""
    reason: Reason
    """Why it was trained."""
    last_request: datetime | None = None
    last_verdict: Literal["promoted", "refused", "failed"] | None = None
    """What came of the last request; None while nothing has."""
    running: bool = False
    """A retrain of this workload is under way."""
    refusals: int = 0
    """Requests in a row, since the last promotion, that ended in `refused` or `failed`."""


def decide(evidence: Evidence, options: PolicyOptions) -> Decision:
    """What to do about a workload now."""
    report = evidence.report
    if evidence.running:
        return Decision("hold", ("A retrain is under way.",))
    if waiting := _waiting(evidence, options):
        return Decision("hold", (waiting,))
    if report.verdict == "schema":
        return Decision("ask", (*report.reasons, "A person must look: retraining would learn the fault."))
    if report.quality and (alarms := quality_alarms(report.quality, options)):
        return _unless_backing_off(evidence, options, Decision("retrain", alarms, "quality"))
    if trial := _probation(evidence, options):
        return Decision("retrain", (trial,), "probation")
    if old := _age(evidence, options):
        return _unless_backing_off(evidence, options, Decision("retrain", (old,), "age"))
    return _without_alarm(evidence, options)


def quality_alarms(quality: Quality, options: PolicyOptions) -> tuple[str, ...]:
    """What is surely wrong with the error or the bias, as sentences; none when nothing is."""
    return tuple(sentence for sentence in (_error_alarm(quality, options), _bias_alarm(quality, options)) if sentence)


def _error_alarm(quality: Quality, options: PolicyOptions) -> str:
    relative = quality.relative is not None and quality.reference_relative > 0
    found = quality.relative if relative and quality.relative else quality.error
    reference = quality.reference_relative if relative else quality.reference_error
    limit = reference * (1 + options.error_tolerance)
    if not found.low > limit:
        return ""
    name = "relative error" if relative else "error"
    return (
        f"The {name} {found.value:.3g} [{found.low:.3g}, {found.high:.3g}] on {quality.rows:,} labelled rows is surely "
        f"above {limit:.3g}, which is {1 + options.error_tolerance:g} x the reference {reference:.3g}."
    )


def _bias_alarm(quality: Quality, options: PolicyOptions) -> str:
    spread = quality.reference_spread
    if not spread > 0:
        return ""
    moved = quality.bias.value - quality.reference_bias
    # The reference's mean residual is an estimate as well; after training on a short window a rough one.
    own = quality.bias.high - quality.bias.value if moved < 0 else quality.bias.value - quality.bias.low
    rough = NORMAL_95 * spread / math.sqrt(quality.reference_rows) if quality.reference_rows else 0.0
    sure = abs(moved) - math.hypot(own, rough)
    if not sure > options.bias_tolerance * spread:
        return ""
    side = "below" if moved < 0 else "above"
    return (
        f"Truths lie {abs(moved):.3g} further {side} the predictions than on the reference (mean residual "
        f"{quality.bias.value:.3g} against {quality.reference_bias:.3g}): surely more than {options.bias_tolerance:g} "
        f"of its spread {spread:.3g}."
    )


def _waiting(evidence: Evidence, options: PolicyOptions) -> str:
    """Whether the cool-down after the last request is still on."""
    if evidence.last_request is None or evidence.now - evidence.last_request >= options.cooldown:
        return ""
    since = _days(evidence.now - evidence.last_request)
    return f"The last retrain was asked for {since} ago; the cool-down is {_days(options.cooldown)}."


def _unless_backing_off(evidence: Evidence, options: PolicyOptions, decision: Decision) -> Decision:
    """`decision`, unless retrains for it were refused of late: then hold, still saying why."""
    wait = backoff(evidence.refusals, options)
    if evidence.last_request is None or evidence.now - evidence.last_request >= wait:
        return decision
    how_many = "The last retrain" if evidence.refusals == 1 else f"The last {evidence.refusals} retrains"
    reason = f"{how_many} brought no better model; the next is asked for {_days(wait)} after the last request."
    return Decision("hold", (*decision.reasons, reason))


def backoff(refusals: int, options: PolicyOptions) -> timedelta:
    """How long to wait after so many refusals in a row: doubling, up to the longest."""
    if refusals <= 0:
        return timedelta(0)
    doublings: int = 2 ** min(refusals - 1, 20)
    return min(options.backoff * doublings, options.longest_backoff)


def _probation(evidence: Evidence, options: PolicyOptions) -> str:
    age = evidence.now - evidence.promoted_at
    if evidence.reason not in ALARMS or evidence.last_verdict != "promoted" or age >= options.probation:
        return ""
    return (
        f"On probation: the champion was promoted {_days(age)} ago because of {evidence.reason}, and may have learnt "
        "only part of the change; the gate ends this by refusing a candidate."
    )


def _age(evidence: Evidence, options: PolicyOptions) -> str:
    age = evidence.now - evidence.promoted_at
    if options.maximum_age is None or age <= options.maximum_age:
        return ""
    return f"The champion is {_days(age)} old; the most allowed is {_days(options.maximum_age)}."


def _without_alarm(evidence: Evidence, options: PolicyOptions) -> Decision:
    report = evidence.report
    if report.quality:
        return Decision("hold", (describe(report.quality), *_drift_sentences(report)))
    drifted = _drift_sentences(report)
    if report.verdict == "unknown":
        return Decision("unknown", report.reasons)
    if not drifted:
        return Decision("hold", ("Quality is not known yet; the inputs and predictions look like the reference.",))
    if not options.retrain_on_drift:
        return Decision("unknown", (*drifted, "Quality is unknown, and this workload does not retrain on drift alone."))
    served = evidence.now - report.serving_since if report.serving_since else timedelta(0)
    if served < options.label_patience:
        return Decision("unknown", (*drifted, f"Labels may still come: this version has answered for {_days(served)}."))
    reason = f"No labels tell whether it harms, {_days(served)} after this version's first answer."
    return _unless_backing_off(evidence, options, Decision("retrain", (*drifted, reason), "drift"))


def describe(quality: Quality) -> str:
    """The error and its reference, in one sentence."""
    shown = f"The error is {quality.error.value:.3g} [{quality.error.low:.3g}, {quality.error.high:.3g}]"
    return f"{shown} on {quality.rows:,} labelled rows; the reference has {quality.reference_error:.3g}."


def _drift_sentences(report: DriftReport) -> tuple[str, ...]:
    drifted = [*report.columns, *([report.prediction] if report.prediction else [])]
    drifted = sorted((one for one in drifted if one.drifted), key=lambda one: -one.distance)
    return tuple(
        f"{one.column} drifted: distance {one.distance:.2f}, threshold {one.threshold:.2f}." for one in drifted
    )


def _days(length: timedelta) -> str:
    days = length / timedelta(days=1)
    if days < 1:
        return f"{days * 24:.3g} hours"
    return "1 day" if days == 1 else f"{days:.3g} days"
