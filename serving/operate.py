"""What only operators may do: list what the server holds, load and unload models of the repository.

The routes and methods of Triton's model repository extension, one meaning for HTTP and gRPC. A workload's version is
the registry's to decide, so it can be listed here and not ordered. Every order gets a line in the audit log, also one
that was refused or that was not waited for. Not here: keys (`serving.access`), the doing (`serving.repository`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from serving import orders
from serving.limits import check_values
from serving.service import Service
from serving.wire import Refusal

IGNORED = frozenset({"unload_dependents"})
"""Parameters that change nothing here: no model depends on another one."""


@dataclass(frozen=True)
class Operation:
    """What is asked for."""

    name: Literal["index", "load", "unload"]
    model: str = ""
    """Which one to load or unload."""
    is_ready: bool = False
    """index: only what answers."""
    parameters: Collection[str] = ()
    """Names of the parameters that came along."""


@dataclass(frozen=True)
class Operator:
    """Who asks, and how, for the audit log."""

    action: str
    """The path, or the gRPC method."""
    key: str
    client: str


def is_operation(parts: Sequence[str]) -> bool:
    """Whether a path's parts are one of these routes."""
    match parts:
        case ["", "v2", "repository", "index"] | ["", "v2", "repository", "models", _, "load" | "unload"]:
            return True
    return False


def read(parts: Sequence[str], body: bytes) -> Operation:
    """The operation that `POST` to one of these routes asks for. The body may be empty. Raises Refusal 400 or 413."""
    check_values(body)
    try:
        content = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError:
        raise Refusal(400, "The body is not JSON.") from None
    if not isinstance(content, dict):
        raise Refusal(400, "The body must be a JSON object, or empty.")
    if parts[3] == "index":
        is_ready = content.get("ready", False)
        if not isinstance(is_ready, bool):
            raise Refusal(400, "'ready' must be true or false.")
        return Operation("index", is_ready=is_ready)
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Refusal(400, "'parameters' must be an object.")
    return Operation("load" if parts[5] == "load" else "unload", parts[4], parameters=parameters)


async def operate(service: Service, operation: Operation, operator: Operator) -> list[dict[str, Any]]:
    """Do it; returns the index where that was asked for. Raises Refusal 400 with the reason why it was not done."""
    outcome = "nobody waited for it to be done"
    try:
        if operation.name == "index":
            found = index(service, is_ready=operation.is_ready)
        else:
            await _order(service, operation)
            found = []
        outcome = "done"
        return found
    except Refusal as refusal:
        outcome = refusal.message
        raise
    finally:
        if service.guard is not None:
            model = {"model": operation.model} if operation.model else {}
            service.guard.audit.acted(operator.action, operator.key, operator.client, **model, outcome=outcome)


def index(service: Service, *, is_ready: bool = False) -> list[dict[str, Any]]:
    """Every model that is known: its name, version, state and, where it does not answer, the reason."""
    engine = service.look()
    found = []
    for name in sorted({*engine.models, *engine.known, *engine.failures}):
        model, failed, known = engine.models.get(name), engine.failures.get(name), engine.known.get(name)
        if model is not None and engine.answers(name):
            found.append({"name": name, "version": str(model.version), "state": "READY", "reason": ""})
        elif failed is None:
            version = "" if known is None or known.version is None else str(known.version)
            reason = "nothing is loaded" if model is None else "not every worker has loaded it"
            found.append({"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason})
        if failed is not None:
            version = str(failed.version)
            found.append({"name": name, "version": version, "state": "UNAVAILABLE", "reason": failed.reason})
    return [entry for entry in found if entry["state"] == "READY"] if is_ready else found


async def _order(service: Service, operation: Operation) -> None:
    folder, name = service.folder, operation.model
    if unserved := sorted({*operation.parameters} - IGNORED):
        raise Refusal(400, f"The parameter '{unserved[0][:40]}' is not served: a model is what lies in the repository.")
    if folder is None:
        raise Refusal(400, "This server has no model repository; start it with --repository.")
    model = service.engine.models.get(name)
    if model is not None and model.bundle is not None:
        raise Refusal(400, f"{name} is a workload: move the alias champion in MLflow to change what serves.")
    key = orders.order(folder, name, operation.name == "load")
    done = await asyncio.shield(orders.wait(folder, key))  # it is removed when it is done, whoever waits
    if not done.done:
        raise Refusal(400, done.reason)
