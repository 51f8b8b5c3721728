"""The gate on constructed data: what must pass, what must not, and how often chance gets through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from noria.errors import DataError
from noria.options import GateOptions
from noria.records import Verdict
from registry.gate import Contest, judge, report

OPTIONS = GateOptions()


def contest(
    seed: int = 0, *, rows: int = 2000, noise: float = 0.3, shuffled: bool = False, champion: bool = True
) -> Contest:
    """Durations and predictions with log-normal errors: the champion's spread is 0.3, the candidate's is `noise`."""
    generator = np.random.default_rng(seed)
    labels = generator.gamma(3, 5, rows)
    scores = {
        "candidate": labels * np.exp(generator.normal(0, noise, rows)),
        "champion": labels * np.exp(generator.normal(0, 0.3, rows)),
        "boosted": labels * np.exp(generator.normal(0, 0.29, rows)),
        "naive": np.full(rows, np.median(labels)),
    }
    if not champion:
        del scores["champion"]
    if shuffled:
        labels = generator.permutation(labels)
    return Contest(labels, scores)


def verdict_on(given: Contest, options: GateOptions = OPTIONS) -> Verdict:
    return judge(given, options, task="regression", loss="absolute_error", log=True)


def rate(seeds: int = 200, rows: int = 300, **settings) -> float:
    return float(
        np.mean([verdict_on(contest(seed, rows=rows, **settings)).action == "promoted" for seed in range(seeds)])
    )


def test_a_better_candidate_is_promoted() -> None:
    verdict = verdict_on(contest(noise=0.24))
    assert verdict.action == "promoted"
    assert verdict.gain is not None
    assert 0 < verdict.gain.low < verdict.gain.value < verdict.gain.high
    assert verdict == verdict_on(contest(noise=0.24)), "the same evidence must give the same verdict"


def test_chance_rarely_passes_and_a_real_gain_mostly_does() -> None:
    assert rate() <= 0.05
    assert rate(50, noise=0.22) >= 0.9


def test_shuffled_labels_never_promote() -> None:
    assert rate(50, shuffled=True) == 0
    assert rate(50, shuffled=True, champion=False) == 0


def test_the_champion_itself_is_refused() -> None:
    given = contest()
    same = replace(given, scores={**given.scores, "candidate": given.scores["champion"]})
    verdict = verdict_on(same)
    assert verdict.action == "refused"
    assert verdict.gain is not None
    assert verdict.gain.value == verdict.gain.low == verdict.gain.high == 0


def test_better_by_less_than_the_margin_is_refused() -> None:
    given = contest(rows=20_000)
    champion = given.scores["champion"]
    slightly = given.labels + (champion - given.labels) * 0.99
    verdict = verdict_on(replace(given, scores={**given.scores, "candidate": slightly}))
    assert verdict.action == "refused"
    assert verdict.gain is not None
    assert verdict.gain.low > 0
    assert "must be at least 2.0% better" in verdict.reasons[0]


def test_too_few_rows() -> None:
    verdict = verdict_on(contest(rows=99, noise=0.01))
    assert verdict.action == "refused"
    assert "Only 99 labelled rows" in verdict.reasons[0]
    assert verdict_on(contest(rows=100, noise=0.01)).action == "promoted"
    none = np.zeros(0)
    assert verdict_on(Contest(none, {"candidate": none, "naive": none})).action == "refused"


def test_the_first_model_must_beat_the_naive_baseline() -> None:
    assert verdict_on(contest(champion=False)).action == "promoted"
    given = contest(champion=False)
    naive = given.scores["naive"]
    for scores in (naive, naive * 1.5):
        assert verdict_on(replace(given, scores={**given.scores, "candidate": scores})).action == "refused"


def test_worse_than_naive_is_refused_even_when_better_than_the_champion() -> None:
    given = contest()
    terrible = {**given.scores, "champion": given.labels * 5, "candidate": given.labels * 3}
    verdict = verdict_on(replace(given, scores=terrible))
    assert verdict.action == "refused"
    assert any("worse than the naive baseline" in reason for reason in verdict.reasons)
    lenient = replace(OPTIONS, baseline_tolerance=100.0)
    assert verdict_on(replace(given, scores=terrible), lenient).action == "promoted"


def test_a_broken_slice_is_refused_and_named() -> None:
    given, few = contest(noise=0.15), np.arange(2000) < 200
    harmed = np.where(few, given.labels * 2, given.scores["candidate"])
    slices = {"airport": few, "city": ~few, "nobody": np.zeros(2000, bool), "tiny": np.arange(2000) < 20}
    broken = replace(given, scores={**given.scores, "candidate": harmed}, slices=slices)
    verdict = verdict_on(broken)
    assert verdict.action == "refused"
    assert sum("breaks the slice" in reason for reason in verdict.reasons) == 1
    assert "'airport' (200 rows)" in verdict.reasons[0]
    assert verdict_on(replace(given, slices=slices)).action == "promoted"


def test_the_boosted_trees_are_named_and_decide_nothing() -> None:
    given = contest(noise=0.24)
    perfect = replace(given, scores={**given.scores, "boosted": given.labels, "recalibrated": given.labels})
    verdict = verdict_on(perfect)
    assert verdict.action == "promoted"
    assert sum("For comparison" in reason for reason in verdict.reasons) == 2


def test_scores_that_are_no_numbers() -> None:
    given = contest(noise=0.24)
    hole = given.scores["candidate"].copy()
    hole[7] = np.nan
    verdict = verdict_on(replace(given, scores={**given.scores, "candidate": hole}))
    assert verdict.action == "refused"
    assert "not a number on 1 of 2000 rows" in verdict.reasons[0]
    verdict = verdict_on(replace(given, scores={**given.scores, "champion": hole}))
    assert verdict.action == "promoted"
    assert verdict.gain is None
    assert any("champion's score is not a number" in reason for reason in verdict.reasons)


def test_probabilities_are_judged_by_log_loss() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(2000)
    labels = (generator.random(2000) < truth).astype(float)
    scores = {"candidate": truth, "champion": 0.5 + (truth - 0.5) / 2, "naive": np.full(2000, labels.mean())}
    verdict = judge(Contest(labels, scores), OPTIONS, task="binary", loss="log_loss")
    assert verdict.action == "promoted"
    assert "auc" in verdict.evaluations["candidate"].metrics


def test_a_contest_of_unequal_rows_is_an_error() -> None:
    given = contest()
    for changes in (
        {"scores": {**given.scores, "candidate": np.ones(3)}},
        {"scores": {"candidate": given.labels}},
        {"scores": {**given.scores, "somebody": given.labels}},
        {"labels": np.full(2000, np.nan)},
        {"slices": {"short": np.ones(3, bool)}},
    ):
        with pytest.raises(DataError):
            replace(given, **changes)


def test_the_report_answers_first() -> None:
    slices = {"airport": np.arange(2000) < 200}
    text = report(verdict_on(replace(contest(noise=0.24), slices=slices)), "min")
    assert text.startswith("**Promoted.** The candidate is ")
    assert "| champion | " in text
    assert " min |" in text
    assert "| airport | 200 |" in text
    assert report(verdict_on(contest(rows=3))).startswith("**Refused.** Only 3 labelled rows")
