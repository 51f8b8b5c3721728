"""What `GET /status` says. Not here: metrics, which are for machines (`serving.metrics`)."""

from __future__ import annotations

from typing import Any

from serving.capture import Log
from serving.engine import Engine


def status(engine: Engine, log: Log) -> dict[str, Any]:
    """By workload the version, where it runs, since when, what was refused, and what is not in the lake yet."""
    pending = log.pending()
    workloads: dict[str, Any] = {}
    for name in sorted({*engine.known, *engine.models, *pending}):
        state, model, failed = engine.states.get(name), engine.models.get(name), engine.failures.get(name)
        rows, segments = pending.get(name, (0, 0))
        workloads[name] = {
            "version": model.version if model and engine.answers(name) else None,
            "provider": model.provider if model else None,
            "nodes": model.nodes if model else {},
            "since": state.since if state else None,
            "replaced": state.replaced if state else None,
            "failure": {"version": failed.version, "reason": failed.reason, "at": failed.since} if failed else None,
            "pending": rows,
            "segments": segments,
        }
    return {
        "ready": engine.ready,
        "workloads": workloads,
        "log": {"lost": log.lost, "failure": log.failure or None},
    }
