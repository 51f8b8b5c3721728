"""Traces, off by default: what a request looked like is told after it was answered, in one call a batch.

`start` gives None unless OTEL_EXPORTER_OTLP_ENDPOINT names a collector, and then nothing of OpenTelemetry is even
imported. Callers keep the times they take anyway (`time.perf_counter`) and the client's `traceparent`; a request that
is not sampled costs one random number. Not here: the spans themselves (`serving.spans`), metrics (`serving.metrics`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from noria.errors import SettingsError
from noria.variables import variables

if TYPE_CHECKING:
    from noria.settings import TracingSettings


@dataclass(slots=True)
class Request:
    """One answered request. Times are those of `time.perf_counter`."""

    method: str
    route: str
    """The path with its variables named: `/v2/models/{workload}/infer`; low in cardinality, it names the span."""
    path: str
    """The path as it was sent."""
    began: float
    ended: float
    status: int
    traceparent: bytes = b""
    """The client's header; empty: it sent none."""
    workload: str = ""
    rows: int = 0


@dataclass(slots=True)
class Run:
    """One run of a model for the requests that shared it. Times are those of `time.perf_counter`."""

    workload: str
    version: int
    rows: int
    began: float
    """When the requests were taken off the queue."""
    ran: tuple[float, float]
    """Begin and end of the model's run."""
    logged: tuple[float, float] | None
    """Begin and end of the write to the log; None: nothing was written."""
    ended: float
    """When the last answer was handed back."""


class Tracer(Protocol):
    """What callers need of `serving.spans.Spans`."""

    def answered(self, request: Request) -> None:
        """Tell of one request that no batch held."""

    def batch(self, run: Run, requests: Sequence[Request]) -> None:
        """Tell of one run and of the requests that shared it."""

    def close(self) -> None:
        """Send what is left; takes some seconds at most, whatever the collector does."""


def start(source: str, settings: TracingSettings | None = None) -> Tracer | None:
    """A tracer for this process, or None where traces are off. `source` names the process.

    Raises:
        SettingsError: a variable is malformed, or traces are on and the packages are not installed.
    """
    if settings is None:
        if not variables("OTEL_"):
            return None
        settings = importlib.import_module("noria.settings").load_tracing()
    if not settings.on:
        return None
    try:
        spans = importlib.import_module("serving.spans")
    except ImportError as error:
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but traces need more packages ({error.name} is missing): "
            "pip install 'noria[tracing]', or unset it."
        ) from None
    tracer: Tracer = spans.Spans(settings, source)
    return tracer
