"""Every choice that a workload may override, each with a default that makes sense for a workload never seen before."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal


@dataclass(frozen=True)
class TrainingOptions:
    """How a candidate is trained."""

    windows: tuple[timedelta, ...] = tuple(timedelta(weeks=weeks) for weeks in (26, 13, 4, 2, 1))
    """Training windows to choose from, longest first; the one whose cheap model is best on the newest rows wins."""
    minimum_rows: int = 500
    """Fewer labelled rows after cleaning: no training."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test, in order of time."""
    held_out: int = 1_000
    """When a champion is retrained: most rows of validation and of test, so that both are the newest; short windows
    give up to a fifth to each. A first model keeps the shares of `split`."""
    epochs: int = 12
    batch_size: int = 512
    """Rows of one step over all workers; halved for small windows, down to 128, until there are `minimum_steps`."""
    minimum_steps: int = 400
    learning_rate: float = 1.5e-2
    """Highest rate of the one-cycle schedule (AdamW)."""
    weight_decay: float = 1e-2
    patience: int = 4
    """Epochs without a better validation loss before training stops."""
    mask: float = 0.02
    """Share of inputs replaced by missing in training, so that missing is learnt before it comes."""
    hidden: tuple[int, ...] = (128, 64)
    embedding: int = 16
    """Largest embedding width; small vocabularies get smaller ones."""
    vocabulary: int = 20_000
    """Most levels (or words) kept per column; the rest share one index."""
    words: int = 256
    """Words read of a text column."""
    seed: int = 0
    workers: int = 1
    """Training processes (DDP)."""
    warm_start: bool = False
    """Begin with the champion's weights and its preprocessing."""
    warm_learning_rate: float = 4e-3
    warm_epochs: int = 10
    quantize: Literal["never", "auto"] = "never"
    """`auto`: an int8 graph ships where it is measured faster on the training machine and loses no more than below."""
    quantize_gain: float = 0.05
    """How much faster int8 must run, relative, at one row and at 1,024."""
    quantize_loss: float = 0.005
    """How much larger the error on validation may get by int8, relative."""


@dataclass(frozen=True)
class GateOptions:
    """When a candidate may replace the champion."""

    margin: float = 0.02
    """Least relative improvement (point estimate) over the champion."""
    level: float = 0.95
    """Level of the paired bootstrap interval, whose lower end must be above zero."""
    minimum_rows: int = 100
    """Fewer common labelled rows: refused. The interval asks for more by itself where the gain is small; after an
    abrupt change few rows are there, and waiting for 200 cost the taxi stream two weeks at twice the error."""
    baseline_tolerance: float = 0.0
    """How much worse than the naive baseline a candidate may be, relative; 0: not at all."""
    slice_tolerance: float = 0.10
    """How much worse than the champion a candidate may be on a slice, relative, with certainty at `level`."""
    slice_rows: int = 50
    """Smaller slices are not judged."""


@dataclass(frozen=True)
class DriftOptions:
    """What counts as drift of the inputs and of the predictions."""

    window: timedelta = timedelta(weeks=1)
    """Length of a watched window; the reference is cut into periods of this length to learn how much they differ."""
    false_alarms: float = 0.05
    """Budget: share of calm windows that may raise a drift alarm, over all columns together."""
    minimum_rows: int = 200
    """Fewer rows: the verdict is unknown."""
    bins: int = 10
    """Quantile bins of a numeric column; a category is counted by its most frequent levels, three times as many."""
    minimum_distance: float = 0.1
    """Smaller distances are no drift, however certain: streams wander that far without harm. 0.1 is about 2% of the
    rows newly missing, or a shift of the mean by a quarter of its spread."""
    violations: float = 0.05
    """Share of rows that break the schema above which a person is asked."""


@dataclass(frozen=True)
class PolicyOptions:
    """When a retrain is asked for."""

    error_tolerance: float = 0.35
    """Quality alarm when the error interval's lower end is above reference x (1 + this); with a log target the error is
    taken per unit of the target, so that a season of longer or shorter trips is no alarm."""
    bias_tolerance: float = 0.5
    """Quality alarm when the mean residual is surely further from the reference's than this many reference spreads."""
    minimum_labels: int = 200
    """Fewer labelled rows of the serving version: quality is unknown."""
    cooldown: timedelta = timedelta(0)
    """Least time between two retrain requests."""
    backoff: timedelta = timedelta(weeks=1)
    """Least time to the next request after a retrain was refused or failed; doubles with each further one in a row."""
    longest_backoff: timedelta = timedelta(weeks=8)
    """The doubling stops here: an alarm that stays is tried again now and then, for new labels arrive."""
    maximum_age: timedelta | None = None
    """Older champions are retrained whatever the evidence; None: age is no reason."""
    retrain_on_drift: bool = True
    """Whether drift alone, while quality is unknown, asks for a retrain. Known good quality always outweighs drift."""
    label_patience: timedelta = timedelta(weeks=4)
    """How long a version must have answered without enough labels before drift alone speaks: late labels come first."""
    probation: timedelta = timedelta(weeks=8)
    """After a promotion that followed an alarm, a retrain is asked for at every watch until the gate refuses one,
    or for this long."""


@dataclass(frozen=True)
class Schedules:
    """Cron expressions (UTC) of the deployments; None: no schedule. Changes made in the Prefect UI win."""

    watch: str | None = "0 6 * * 1"
    retrain: str | None = None
    batch: str | None = None
