"""Requests, batches, runs and log writes as OpenTelemetry spans, sent over OTLP/HTTP by a thread.

A sampled request is a span of kind server with the names of the HTTP conventions. The batch is a child of its first
sampled request and links to all of them, so that one trace holds everything and no request loses its batch. Imported
by `serving.tracing` only where traces are on: needs the extra `noria[tracing]`.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version as installed

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from noria.settings import TracingSettings
from serving.tracing import Request, Run

CLOSE_SECONDS = 3.0
SAMPLED = 0x01
PARENT = re.compile(
    rb"(?!ff)(?!00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
"""A traceparent of version 00, or of a later one, which may go on after it."""


class Spans:
    """The tracer of one process."""

    def __init__(self, settings: TracingSettings, source: str) -> None:
        resource = Resource.create(
            {
                "service.name": settings.service_name,
                "service.version": installed("noria"),
                "service.instance.id": source,
            }
        )
        # Which requests are sampled is decided here, before anything is made of those that are not.
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("noria.serving", installed("noria"))
        self._share, self._follows = settings.share, settings.follows_parent
        self._bound = round(self._share * 2**64)

    def answered(self, request: Request) -> None:
        """Tell of one request that no batch held."""
        parent = self._sampled(request)
        if parent is not None:
            self._request(request, parent, _clock())

    def batch(self, run: Run, requests: Sequence[Request]) -> None:
        """Tell of one run and of the requests that shared it."""
        sampled = [(request, parent) for request in requests if (parent := self._sampled(request)) is not None]
        if not sampled:
            return
        clock = _clock()
        told = [self._request(request, parent, clock) for request, parent in sampled]
        attributes: dict[str, str | int] = {
            "noria.workload": run.workload,
            "noria.version": run.version,
            "noria.batch.requests": len(requests),
            "noria.batch.rows": run.rows,
        }
        whole = self._tracer.start_span(
            f"batch {run.workload}",
            _under(told[0]),
            attributes=attributes,
            links=[Link(span.get_span_context()) for span in told],
            start_time=_nanoseconds(run.began, clock),
        )
        for name, part in (("model run", run.ran), ("log write", run.logged)):
            if part is not None:
                span = self._tracer.start_span(name, _under(whole), start_time=_nanoseconds(part[0], clock))
                span.end(_nanoseconds(part[1], clock))
        whole.end(_nanoseconds(run.ended, clock))

    def close(self) -> None:
        """Send what is left; a collector that does not answer is not waited for longer than CLOSE_SECONDS."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)

    def _sampled(self, request: Request) -> Context | None:
        """The context in which a request's span begins; None when it is not sampled."""
        parent = PARENT.fullmatch(request.traceparent) if request.traceparent else None
        if parent is None:
            return Context() if random.random() < self._share else None
        identity, span, flags = int(parent[1], 16), int(parent[2], 16), int(parent[3], 16)
        if self._follows:
            if not flags & SAMPLED:
                return None
        elif identity & (2**64 - 1) >= self._bound:  # as TraceIdRatioBased: every server takes the same traces
            return None
        context = SpanContext(identity, span, is_remote=True, trace_flags=TraceFlags(flags))
        return trace.set_span_in_context(NonRecordingSpan(context), Context())

    def _request(self, request: Request, parent: Context, clock: int) -> Span:
        attributes: dict[str, str | int] = {
            "http.request.method": request.method,
            "http.route": request.route,
            "url.path": request.path,
            "url.scheme": "http",
            "http.response.status_code": request.status,
        }
        if request.workload:
            attributes |= {"noria.workload": request.workload, "noria.rows": request.rows}
        if request.status >= 500:
            attributes["error.type"] = str(request.status)
        span = self._tracer.start_span(
            f"{request.method} {request.route}",
            parent,
            SpanKind.SERVER,
            attributes,
            start_time=_nanoseconds(request.began, clock),
        )
        if request.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_nanoseconds(request.ended, clock))
        return span


def _under(span: Span) -> Context:
    return trace.set_span_in_context(span, Context())


def _clock() -> int:
    """What to add to a reading of `time.perf_counter` to get nanoseconds since 1970."""
    return time.time_ns() - time.perf_counter_ns()


def _nanoseconds(reading: float, clock: int) -> int:
    return clock + int(reading * 1e9)
