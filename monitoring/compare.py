"""Champion and challenger on the same requests: do they agree, who errs less where labels are known, who is quicker.

A pure function of three tables. It says what was seen and how sure that is; it promises nothing and decides nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from noria.metrics import Loss, row_losses
from noria.records import Interval, Window
from registry.resample import gain_interval, weighted_means
from registry.words import change

MOST_JUDGED = 50_000
"""Newest labelled rows that the intervals rest on; more would not change them and take long."""
EVERYTHING = "everything"


@dataclass(frozen=True)
class Comparison:
    """What both made of the same requests. A figure that nothing is known of is None."""

    workload: str
    champion: int
    challenger: int
    window: Window
    rows: int
    """Requests' rows that both answered."""
    same_action: float | None = None
    """Share of rows with the same action; None for a workload without actions."""
    difference_mean: float | None = None
    """|challenger's score - champion's|: mean, 95th percentile and largest."""
    difference_p95: float | None = None
    difference_max: float | None = None
    rank_correlation: float | None = None
    """Spearman's; None where one of them always says the same."""
    labelled: int = 0
    """Rows with a label, on which the errors rest."""
    champion_error: Interval | None = None
    challenger_error: Interval | None = None
    gain: Interval | None = None
    """By how much the challenger errs less, relative to the champion (0.05: 5% less), paired by row."""
    champion_ms: float | None = None
    """Mean over rows of the milliseconds that the batch took in which a row was answered."""
    challenger_ms: float | None = None
    verdict: Literal["nothing", "unknown", "alike", "better", "worse"] = "nothing"
    """About errors: no rows at all, too few labels, no sure difference, or the challenger is surely better or worse."""
    conclusion: str = ""
    """The same in a sentence."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        window = {"start": self.window.start.isoformat(), "end": self.window.end.isoformat()}
        return {**asdict(self), "window": window}


@dataclass(frozen=True)
class Rules:
    """How errors are judged: the workload's loss, and what its gate asks for."""

    loss: Loss
    minimum_rows: int = 100
    """Fewer labelled rows: nothing is said about errors."""
    level: float = 0.95


def compare(
    predictions: pa.Table,
    shadow: pa.Table,
    labels: pa.Table,
    *,
    workload: str,
    versions: tuple[int, int],
    window: Window,
    rules: Rules,
) -> Comparison:
    """Compare on the rows that both answered.

    Args:
        predictions, shadow, labels: as `noria.lake` keeps them, one row a prediction id.
        workload: its name.
        versions: the champion's number and the challenger's; answers of other versions are left out.
        window: what the tables were read for.
        rules: how errors are judged.
    """
    champion, challenger = versions
    both = _join(predictions, shadow, champion, challenger)
    found = Comparison(workload, champion, challenger, window, len(both))
    if not len(both):
        none = f"Version {challenger} has shadowed no answer of version {champion} in {window}."
        return replace(found, conclusion=none)
    own, other = _numbers(both, "score_shadow"), _numbers(both, "score")
    found = replace(found, **_agreement(both, own, other))
    judged = both.join(labels.select(["prediction_id", "label"]), "prediction_id", join_type="inner")
    judged = judged.filter(pc.is_valid(judged.column("label"))).sort_by([("event_time", "descending")])
    return _judge(found, judged.slice(0, MOST_JUDGED), rules)


def _join(predictions: pa.Table, shadow: pa.Table, champion: int, challenger: int) -> pa.Table:
    wanted = ["prediction_id", "score", "action", "latency_ms"]
    own = shadow.filter(pc.equal(shadow.column("version"), challenger)).select(wanted)
    other = predictions.filter(pc.equal(predictions.column("version"), champion)).select([*wanted, "event_time"])
    joined = other.join(own, "prediction_id", join_type="inner", right_suffix="_shadow")
    return joined.filter(pc.and_(pc.is_valid(joined.column("score")), pc.is_valid(joined.column("score_shadow"))))


def _agreement(both: pa.Table, own: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    difference = np.abs(own - other)
    actions = [both.column(name).to_pylist() for name in ("action", "action_shadow")]
    acts = any(action is not None for side in actions for action in side)
    same = sum(one == two for one, two in zip(*actions, strict=True)) / len(both)
    return {
        "same_action": same if acts else None,
        "difference_mean": float(difference.mean()),
        "difference_p95": float(np.quantile(difference, 0.95)),
        "difference_max": float(difference.max()),
        "rank_correlation": _rank_correlation(own, other),
        "champion_ms": _mean(both, "latency_ms"),
        "challenger_ms": _mean(both, "latency_ms_shadow"),
    }


def _judge(found: Comparison, judged: pa.Table, rules: Rules) -> Comparison:
    """Errors where labels are known, in resamples of the same rows for both."""
    rows = len(judged)
    seen = f"Version {found.challenger} shadowed {found.rows:,} answers of version {found.champion}{_acted(found)}"
    if rows < max(rules.minimum_rows, 2):
        lack = f"{rows:,} of them have a label and {rules.minimum_rows:,} are needed"
        return replace(
            found, labelled=rows, verdict="unknown", conclusion=f"{seen}; {lack}, so it is not known which errs less."
        )
    truth = _numbers(judged, "label")
    losses = {
        name: row_losses(rules.loss, truth, _numbers(judged, column))
        for name, column in (("champion", "score"), ("challenger", "score_shadow"))
    }
    means = weighted_means(losses, {EVERYTHING: np.ones(rows, bool)}, seed=0)[EVERYTHING]
    errors = {name: _interval(losses[name], means[name], rules.level) for name in losses}
    value = 1 - errors["challenger"].value / max(errors["champion"].value, 1e-12)
    gain = gain_interval(value, means["challenger"], means["champion"], rules.level)
    verdict: Literal["alike", "better", "worse"] = "better" if gain.low > 0 else "worse" if gain.high < 0 else "alike"
    sure = "which may be chance" if verdict == "alike" else "more than chance explains"
    return replace(
        found,
        labelled=rows,
        champion_error=errors["champion"],
        challenger_error=errors["challenger"],
        gain=gain,
        verdict=verdict,
        conclusion=f"{seen}; on the {rows:,} with a label its error was {change(gain.value)}, {sure} "
        f"({rules.level:.0%} interval {gain.low:+.1%} to {gain.high:+.1%}). Other weeks may differ.",
    )


def _acted(found: Comparison) -> str:
    return "" if found.same_action is None else f", with the same action in {found.same_action:.1%}"


def _interval(losses: np.ndarray, means: np.ndarray, level: float) -> Interval:
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(losses.mean()), float(low), float(high))


def _rank_correlation(own: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman (1904): the correlation of ranks, ties at their mean rank."""
    ranks = [_ranks(one) for one in (own, other)]
    if any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _mean(rows: pa.Table, name: str) -> float | None:
    value = pc.mean(rows.column(name)).as_py()
    return None if value is None else float(value)


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    return np.asarray(rows.column(name).to_numpy(), np.float64)
