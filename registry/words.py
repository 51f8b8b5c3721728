"""How models, errors and changes are named to people, the same on every page."""

from __future__ import annotations

TITLES = {
    "candidate": "**candidate**",
    "champion": "champion",
    "recalibrated": "champion, offset refitted",
    "boosted": "boosted trees",
    "naive": "naive baseline",
}
ERRORS = {
    "absolute_error": "mean absolute error",
    "squared_error": "mean squared error",
    "log_loss": "log loss",
    "brier": "Brier score",
}
METRICS = {
    "mae": "mean absolute error",
    "rmse": "root of the mean squared error",
    "wape": "sum of errors / sum of truths",
    "auc": "area under the ROC curve",
    "mean_residual": "above 0 the truth lies above the prediction",
    "residual_spread": "standard deviation of the residual",
}


def measure(value: float, unit: str = "") -> str:
    """A number as a person reads it: three digits, its unit."""
    return f"{value:.3g} {unit}".strip()


def change(gain: float) -> str:
    """A relative gain in words: 0.05 is "5.0% better"."""
    return f"{abs(gain):.1%} {'better' if gain >= 0 else 'worse'}"


def gained(own: float, other: float) -> str:
    """How an error compares with another one."""
    if own == other:
        return "the same"
    return change(1 - own / other) if other > 0 else "worse"
