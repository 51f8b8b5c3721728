"""What is counted: every metric's name, labels, buckets and meaning, in one table.

Names follow Prometheus' rules: base units, `_total` on counters, `_info` on facts. Numbers are kept in one form
everywhere: family -> label values -> a list, which holds one number, or for a histogram the count of each bucket, the
count above the last, and the sum. So adding two workers up is adding two lists. Not here: what is counted when,
or how it is shown.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Series = dict[tuple[str, ...], list[float]]
Numbers = dict[str, Series]

SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHORT_SECONDS = (1e-5, 2.5e-5, 5e-5, *SECONDS[:-3])
"""For a wait or a run, which is a part of a request."""
LONG_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MOST = 2**14
POWERS = tuple(float(2**power) for power in range(15))
"""For a number of things from 1 on: the bucket of n is the number of binary digits of n - 1. The last bound is MOST."""


@dataclass(frozen=True)
class Family:
    """One metric family."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, ascending; the last bucket, without a bound, is not named."""
    highest: bool = False
    """Of several workers the highest number counts, not the sum."""

    @property
    def lasting(self) -> bool:
        """What an ended worker counted goes on counting."""
        return self.kind in ("counter", "histogram") and "worker" not in self.labels

    @property
    def width(self) -> int:
        """Numbers that one series consists of."""
        return len(self.bounds) + 2 if self.bounds else 1


def _worker(name: str, kind: Literal["counter", "gauge"], text: str) -> Family:
    return Family(name, kind, text, ("worker",))


FAMILIES = (
    Family("noria_requests_total", "counter", "Requests answered.", ("route", "workload", "version", "status")),
    Family("noria_request_duration_seconds", "histogram", "Time from the whole request to its answer.",
           ("route", "workload"), SECONDS),
    Family("noria_rows_total", "counter", "Rows scored.", ("workload", "version")),
    Family("noria_labels_total", "counter", "Labels taken.", ("workload",)),
    Family("noria_refusals_total", "counter", "Requests that were refused to protect the others.",
           ("workload", "reason")),
    Family("noria_batch_requests", "histogram", "Requests that shared one run of the model.", ("workload",), POWERS),
    Family("noria_batch_rows", "histogram", "Rows of one run of the model.", ("workload",), POWERS),
    Family("noria_model_run_duration_seconds", "histogram", "Time that one run of the model took.",
           ("workload", "version"), SHORT_SECONDS),
    Family("noria_queue_duration_seconds", "histogram", "Time that a request waited for its run.", ("workload",),
           SHORT_SECONDS),
    Family("noria_queue_requests", "gauge", "Requests that wait for a run.", ("workload",)),
    Family("noria_connections", "gauge", "Open client connections of HTTP; gRPC tells nobody of its own.", ("worker",)),
    Family("noria_model_info", "info", "A version that answers, and the provider that runs it.",
           ("workload", "version", "provider"), highest=True),
    Family("noria_build_info", "info", "The release that runs.", ("release",), highest=True),
    Family("noria_swaps_total", "counter", "Tries to serve another version.", ("workload", "status")),
    Family("noria_swap_duration_seconds", "histogram", "Time from asking for a version to its first answer.",
           ("workload",), LONG_SECONDS),
    Family("noria_shadow_rows_total", "counter", "Rows that a shadow was to score.", ("workload", "version", "result")),
    Family("noria_shadow_run_duration_seconds", "histogram", "Time that one run of a challenger took.",
           ("workload", "version"), SHORT_SECONDS),
    Family("noria_shadow_pending_rows", "gauge", "Rows that wait for the shadow.", ("workload",)),
    Family("noria_shadow_lag_seconds", "gauge", "Age of the oldest row that waits for the shadow.", ("workload",),
           highest=True),
    Family("noria_shadow_restarts_total", "counter", "Times that the shadow's process ended by itself.", ("workload",)),
    Family("noria_shadow_failed", "gauge", "1: the challenger was given up, and its tag says why.", ("workload",)),
    Family("noria_log_pending_rows", "gauge", "Logged rows that are not in the lake yet.", ("workload",)),
    Family("noria_log_pending_segments", "gauge", "Log files that are not in the lake yet.", ("workload",)),
    Family("noria_log_lag_seconds", "gauge", "Age of the oldest logged row that is not in the lake.", ("workload",),
           highest=True),
    Family("noria_log_lost_rows_total", "counter", "Answered rows and labels that could not be logged, or not synced."),
    Family("noria_log_sync_duration_seconds", "histogram", "Time that one sync of the log to the disk took.", (),
           SHORT_SECONDS),
    _worker("process_resident_memory_bytes", "gauge", "Resident memory size in bytes."),
    _worker("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes."),
    _worker("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds."),
    _worker("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds."),
    _worker("process_open_fds", "gauge", "Number of open file descriptors."),
    _worker("process_max_fds", "gauge", "Maximum number of open file descriptors."),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


def empty() -> Numbers:
    """No numbers; what has no labels is there from the start, because an alert on a missing series never fires."""
    return {family.name: {} if family.labels else {(): [0.0] * family.width} for family in FAMILIES}


def add(total: Numbers, more: Numbers, families: Iterable[Family] = FAMILIES) -> None:
    """Add `more` to `total`, of these families only; series that are not as wide as today's buckets are passed over."""
    for family in families:
        into = total.setdefault(family.name, {})
        for labels, numbers in more.get(family.name, {}).items():
            if len(numbers) != family.width or len(labels) != len(family.labels):
                continue
            held = into.get(labels)
            if held is None:
                into[labels] = numbers.copy()
            elif family.highest:
                into[labels] = [max(pair) for pair in zip(held, numbers, strict=True)]
            else:
                into[labels] = [one + other for one, other in zip(held, numbers, strict=True)]


def spread(held: list[float], bounds: Sequence[float], values: Sequence[float]) -> None:
    """Add values, one at least, to a histogram with these bounds: those of one batch mostly lie in one bucket."""
    count, total = len(values), sum(values)
    low = bisect_left(bounds, min(values))
    if count == 1 or low == bisect_left(bounds, max(values)):
        held[low] += count
    else:
        for value in values:
            held[bisect_left(bounds, value)] += 1
    held[-1] += total


def spread_number(held: list[float], number: int) -> None:
    """Add a number of things to a histogram with the bounds POWERS."""
    held[(number - 1).bit_length() if 0 < number <= MOST else -2 if number else 0] += 1
    held[-1] += number
