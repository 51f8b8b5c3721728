"""Numbers as the text that Prometheus reads: its own format, or OpenMetrics where the scraper accepts it.

Not here: which numbers there are (`serving.families`), and counting (`serving.metrics`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.families import FAMILIES, Family, Numbers, Series


class Snapshot(Collector):
    """A prometheus_client collector of numbers that do not change any more."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def collect(self) -> Iterator[Metric]:
        """Every family, also one that nothing was counted of: what a server can tell should be seen on its page."""
        for family in FAMILIES:
            # Written in a thread: let the event loop have the interpreter between two families, not after 5 ms.
            time.sleep(0)
            yield _metric(family, self.numbers.get(family.name, {}))


def page(numbers: Numbers, accept: str = "") -> tuple[bytes, str]:
    """The page and its content type, by the request's Accept header."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number: as if nothing were asked for
        encode, content_type = choose_encoder("")
    return encode(Snapshot(numbers)), content_type


def _metric(family: Family, series: Series) -> Metric:
    if family.kind == "histogram":
        return _histogram(family, series)
    if family.kind == "info":
        info = InfoMetricFamily(family.name.removesuffix("_info"), family.text)
        for labels in series:
            info.add_metric([], dict(zip(family.labels, labels, strict=True)))
        return info
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.text, labels=family.labels, unit=_unit(family))
    for labels, (value,) in series.items():
        metric.add_metric(labels, value)
    return metric


def _histogram(family: Family, series: Series) -> Metric:
    metric = HistogramMetricFamily(family.name, family.text, labels=family.labels, unit=_unit(family))
    bounds = [*(str(bound) for bound in family.bounds), "+Inf"]
    for labels, (*counts, total) in series.items():
        metric.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
    return metric


def _unit(family: Family) -> str:
    """The unit that OpenMetrics names, which is how the family's name ends."""
    ending = family.name.removesuffix("_total").rsplit("_", 1)[-1]
    return ending if ending in ("seconds", "bytes") else ""
