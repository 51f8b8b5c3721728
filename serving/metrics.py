"""What the server counts, in Prometheus' words. One registry a process; nothing global.

Not here: how good the predictions are (`monitoring`).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serving.capture import Log
from serving.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counters of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered.", "route", "workload", "status")
        self._seconds = Histogram(
            "noria_request_seconds",
            "Time from the whole body to the whole answer.",
            ("route", "workload"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._rows = self._counter("rows", "Rows scored, or labels taken.", "route", "workload")
        self._swaps = self._counter("swaps", "New versions: served or failed.", "workload", "status")
        self._version = self._gauge("model_version", "The version that answers.", "workload")
        self._pending = self._gauge("log_pending_rows", "Logged rows that are not in the lake yet.", "workload")
        self._segments = self._gauge("log_pending_segments", "Log files that are not in the lake yet.", "workload")
        self._lost = self._gauge("log_lost_rows", "Answered rows that could not be logged.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"noria_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"noria_{name}", text, labels, registry=self.registry)

    def answered(self, route: str, workload: str, *, status: int, seconds: float, rows: int) -> None:
        """Count one answer."""
        self._requests.labels(route, workload, status).inc()
        self._seconds.labels(route, workload).observe(seconds)
        if rows:
            self._rows.labels(route, workload).inc(rows)

    def swapped(self, workload: str, status: str) -> None:
        """Count one try to serve a new version."""
        self._swaps.labels(workload, status).inc()

    def page(self, engine: Engine, log: Log) -> bytes:
        """The text that Prometheus reads."""
        for workload, model in engine.models.items():
            self._version.labels(workload).set(model.version)
        pending = log.pending()
        for workload in {*engine.models, *pending}:
            rows, segments = pending.get(workload, (0, 0))
            self._pending.labels(workload).set(rows)
            self._segments.labels(workload).set(segments)
        self._lost.set(log.lost)
        return generate_latest(self.registry)
