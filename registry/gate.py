"""May the candidate replace the champion? Judged on the same newest labelled rows, with uncertainty. Pure.

    verdict = judge(Contest(labels, {"candidate": ..., "champion": ..., "naive": ...}), options, task=..., loss=...)
    text = report(verdict, unit="min")

The gain is 1 - (candidate's error / champion's error); its interval is a paired bootstrap over rows (Efron & Tibshirani
1993, ch. 16), so that what is hard for both cancels. Not here: scoring (the caller brings scores) and aliases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from noria.errors import DataError
from noria.metrics import EDGE, Loss, evaluate, row_losses
from noria.options import GateOptions
from noria.records import Evaluation, Interval, Verdict
from registry.resample import gain_interval, weighted_means
from registry.words import TITLES, change, gained, measure

SUBJECTS = ("candidate", "champion", "recalibrated", "boosted", "naive")
SHOWN_ONLY = {"boosted": "Boosted trees", "recalibrated": "The champion with a refitted offset"}
EVERYTHING = ""


@dataclass(frozen=True)
class Contest:
    """The same n rows, scored by every subject.

    `scores` has "candidate" and "naive", "champion" where there is one, and may have "boosted" and "recalibrated" (the
    champion with an offset fitted on earlier rows), which are shown and decide nothing. `slices`: name to mask [n].
    """

    labels: np.ndarray
    scores: Mapping[str, np.ndarray]
    slices: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown, lacking = set(self.scores) - set(SUBJECTS), {"candidate", "naive"} - set(self.scores)
        if unknown or lacking:
            raise DataError(f"A contest is between {', '.join(SUBJECTS)}; unknown: {unknown}, lacking: {lacking}.")
        for name, values in {**self.scores, **self.slices}.items():
            if values.shape != (len(self.labels),):
                raise DataError(
                    f"'{name}' has the shape {values.shape} for {len(self.labels)} labels; score the same rows."
                )
        if not np.isfinite(self.labels).all():
            raise DataError("Labels of a contest must be finite; leave unlabelled rows out.")


@dataclass(frozen=True)
class _Evidence:
    """Row losses by subject, resampled mean losses by slice and subject [r], and the evaluations of all of them."""

    losses: Mapping[str, np.ndarray]
    means: Mapping[str, Mapping[str, np.ndarray]]
    evaluations: Mapping[str, Evaluation]
    level: float

    def gain(self, over: str, group: str = EVERYTHING, mask: np.ndarray | slice = slice(None)) -> Interval:
        """How much smaller the candidate's error is than the other's, relative, in a group of rows."""
        own, other = self.losses["candidate"][mask].mean(), self.losses[over][mask].mean()
        value = float(1 - own / max(float(other), EDGE))
        return gain_interval(value, self.means[group]["candidate"], self.means[group][over], self.level)

    def error(self, subject: str) -> float:
        """Mean row loss."""
        return float(self.losses[subject].mean())


def judge(
    contest: Contest,
    options: GateOptions,
    *,
    task: Literal["regression", "binary"],
    loss: Loss,
    log: bool = False,
    seed: int = 0,
) -> Verdict:
    """Promote or refuse, with every reason. The same contest and seed give the same verdict.

    Without a champion, or with one whose scores are not numbers, the candidate must surely beat the naive baseline.
    """
    rows = len(contest.labels)
    if rows < options.minimum_rows:
        return Verdict(
            "refused", (f"Only {rows} labelled rows to judge on; at least {options.minimum_rows} are needed.",)
        )
    broken = {subject: int((~np.isfinite(scores)).sum()) for subject, scores in contest.scores.items()}
    if broken["candidate"] or broken["naive"]:
        subject = "candidate" if broken["candidate"] else "naive"
        return Verdict("refused", (f"The {subject}'s score is not a number on {broken[subject]} of {rows} rows.",))
    sound = {subject: scores for subject, scores in contest.scores.items() if not broken[subject]}
    contest = replace(contest, scores=sound)
    evidence = _evidence(contest, options, task=task, loss=loss, log=log, seed=seed)
    against, for_it = _baseline(evidence, options)
    gain = None
    if "champion" in sound:
        gain = evidence.gain("champion")
        worse, better = _champion(gain, options)
        against, for_it = [*worse, *against, *_slices(contest, evidence, options)], better
    else:
        for_it = [*for_it, _absent(broken.get("champion"))]
    shown = [_shown(subject, evidence) for subject in SHOWN_ONLY if subject in sound]
    reasons = against or for_it
    return Verdict("refused" if against else "promoted", (*reasons, *shown), gain, evidence.evaluations)


def _evidence(
    contest: Contest,
    options: GateOptions,
    *,
    task: Literal["regression", "binary"],
    loss: Loss,
    log: bool,
    seed: int,
) -> _Evidence:
    order = [subject for subject in SUBJECTS if subject in contest.scores]
    losses = {subject: row_losses(loss, contest.labels, contest.scores[subject]) for subject in order}
    slices = {name: mask.astype(bool) for name, mask in contest.slices.items() if mask.any()}
    groups = {EVERYTHING: np.ones(len(contest.labels), bool), **slices}
    means = weighted_means(losses, groups, seed=seed)
    edges = [(1 - options.level) / 2, (1 + options.level) / 2]
    evaluations = {}
    for subject in order:
        found = evaluate(contest.labels, contest.scores[subject], task=task, loss=loss, log=log, slices=slices)
        low, high = np.nanquantile(means[EVERYTHING][subject], edges)
        metrics = {"error": found.metrics["error"], "error_low": float(low), "error_high": float(high), **found.metrics}
        evaluations[subject] = replace(found, metrics=metrics)
    return _Evidence(losses, means, evaluations, options.level)


def _champion(gain: Interval, options: GateOptions) -> tuple[list[str], list[str]]:
    """What speaks against and for the candidate beside the champion."""
    size = change(gain.value)
    between = f"{options.level:.0%} interval {gain.low:+.1%} to {gain.high:+.1%}"
    if gain.value < options.margin:
        return [
            f"The candidate is {size} than the champion, and must be at least {options.margin:.1%} better ({between})."
        ], []
    if gain.low <= 0:
        return [f"The candidate is {size} than the champion, which may be chance ({between})."], []
    return [], [f"The candidate is {size} than the champion, and surely better ({between})."]


def _baseline(evidence: _Evidence, options: GateOptions) -> tuple[list[str], list[str]]:
    """The same beside the naive baseline: surely better for a first model, not worse for a successor."""
    gain = evidence.gain("naive")
    if "champion" in evidence.losses:
        if gain.value < -options.baseline_tolerance:
            return [f"The candidate is {change(gain.value)} than the naive baseline."], []
        return [], []
    if gain.low <= 0:
        return [f"The candidate is {change(gain.value)} than the naive baseline, which may be chance."], []
    return [], [f"The candidate is {change(gain.value)} than the naive baseline, and surely better."]


def _slices(contest: Contest, evidence: _Evidence, options: GateOptions) -> list[str]:
    """Slices that the candidate surely breaks."""
    found = []
    for name, mask in contest.slices.items():
        if int(mask.sum()) < max(options.slice_rows, 1):
            continue
        gain = evidence.gain("champion", name, mask.astype(bool))
        if gain.high < -options.slice_tolerance:
            found.append(
                f"The candidate breaks the slice '{name}' ({int(mask.sum())} rows): {change(gain.value)} than the "
                f"champion there, surely more than the {options.slice_tolerance:.0%} that are tolerated."
            )
    return found


def _absent(broken: int | None) -> str:
    if broken:
        return f"The champion's score is not a number on {broken} rows, so it is not compared with."
    return "There is no champion yet."


def _shown(subject: str, evidence: _Evidence) -> str:
    error, gain = evidence.error(subject), evidence.gain(subject).value
    return f"For comparison: {SHOWN_ONLY[subject]} had an error of {error:.3g}; the candidate is {change(gain)}."


def report(verdict: Verdict, unit: str = "") -> str:
    """The verdict as Markdown: the answer first, then who had which error, the slices and the reasons."""
    found = verdict.evaluations
    lines = [f"**{verdict.action.capitalize()}.** {verdict.reasons[0]}", ""]
    if found:
        own = found["candidate"].metrics["error"]
        rows = found["candidate"].rows
        lines += [f"| on the same {rows:,} rows | error | interval | the candidate is |", "| --- | ---: | ---: | --- |"]
        for subject, entry in found.items():
            metrics = entry.metrics
            interval = f"{metrics['error_low']:.3g} to {metrics['error_high']:.3g}"
            compared = "" if subject == "candidate" else gained(own, metrics["error"])
            lines.append(f"| {TITLES[subject]} | {measure(metrics['error'], unit)} | {interval} | {compared} |")
        lines.append("")
    lines += _slice_table(found)
    return "\n".join([*lines, *(f"- {reason}" for reason in verdict.reasons[1:])]).strip() + "\n"


def _slice_table(found: Mapping[str, Evaluation]) -> list[str]:
    if "champion" not in found or not found["candidate"].slices:
        return []
    lines = ["| slice | rows | candidate | champion | the candidate is |", "| --- | ---: | ---: | ---: | --- |"]
    for name, metrics in found["candidate"].slices.items():
        own, other = metrics["error"], found["champion"].slices[name]["error"]
        lines.append(f"| {name} | {metrics['rows']:,.0f} | {own:.3g} | {other:.3g} | {gained(own, other)} |")
    return [*lines, ""]
