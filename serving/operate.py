"""What only operators may do over HTTP: list what the server holds, load and unload models of the repository.

The same routes as Triton's model repository extension. A workload's version is the registry's to decide, so it can be
listed here and not ordered. Not here: keys (`serving.access`), the doing (`serving.repository`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serving import orders
from serving.service import Service
from serving.wire import Answer, Refusal, as_json


def is_operation(parts: Sequence[str]) -> bool:
    """Whether a path's parts are one of these routes."""
    match parts:
        case ["", "v2", "repository", "index"] | ["", "v2", "repository", "models", _, "load" | "unload"]:
            return True
    return False


async def operate(service: Service, parts: Sequence[str]) -> Answer:
    """Answer `POST` to one of these routes. Raises Refusal 400 with the reason why an order was not done."""
    if parts[3] == "index":
        return as_json(index(service))
    return await _order(service, parts[4], load=parts[5] == "load")


def index(service: Service) -> list[dict[str, Any]]:
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
    return found


async def _order(service: Service, name: str, *, load: bool) -> Answer:
    folder, model = service.folder, service.engine.models.get(name)
    if folder is None:
        raise Refusal(400, "This server has no model repository; start it with --repository.")
    if model is not None and model.bundle is not None:
        raise Refusal(400, f"{name} is a workload: move the alias champion in MLflow to change what serves.")
    key = orders.order(folder, name, load)
    done = await asyncio.to_thread(orders.wait, folder, key)
    if not done.done:
        raise Refusal(400, done.reason)
    return as_json({})
