"""The ASGI application: routes, limits, and the choice between answering in the event loop or beside it.

Bare ASGI, because a framework costs more than everything else that a request does here. Small requests are answered
in the loop; a large body goes to a thread, so that one heavy request does not hold up the others (ONNX Runtime releases
the interpreter while it runs). Not here: what an answer holds (`serving.service`), pages (`serving.pages`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as installed
from typing import Any

from serving import openapi, pages
from serving.service import Service
from serving.tracing import Request, Tracer
from serving.wire import Answer, Refusal, as_json, refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_BYTES = 10 * 1024 * 1024
"""Largest body that is read."""
INLINE_BYTES = 64 * 1024
"""Bodies up to this size are answered in the event loop."""

TRACED = {
    "predict": "/predict/{workload}",
    "infer": "/v2/models/{workload}/infer",
    "feedback": "/feedback/{workload}",
}
"""How a trace names the routes; looking at pages and health is not traced."""

logger = logging.getLogger(__name__)


class Gone(Exception):
    """The client went away before its request was whole."""


class App:
    """One worker's HTTP face."""

    def __init__(self, service: Service, tracer: Tracer | None = None) -> None:
        self.service, self.tracer = service, tracer
        self.threads = ThreadPoolExecutor(2, "large-request")
        self.pages: dict[str, Callable[[str], Answer]] = {
            "/": lambda _: self._html(pages.home(service.engine)),
            "/docs": lambda _: self._html(pages.docs(service.engine)),
            "/openapi.json": lambda _: as_json(openapi.describe(service.engine.models.values())),
            "/status": lambda _: service.status(),
            "/v2": lambda _: as_json({"name": "noria", "version": installed("noria"), "extensions": []}),
            "/v2/health/live": lambda _: as_json({"live": True}),
            "/v2/health/ready": lambda _: self._ready(service.engine.ready, "ready"),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            return
        began, counted = time.perf_counter(), False
        try:
            answer = await self._answer(scope, receive)
            counted = _route(scope["path"])[0] is not None  # by the service
        except Gone:
            return
        except Refusal as refusal:
            answer = refused(refusal)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            answer = as_json({"error": "The server has a fault; its log tells more."}, 500)
        if not counted:
            route, workload = _route(scope["path"])
            seconds = time.perf_counter() - began
            self.service.metrics.answered(route or "page", workload, 0, answer.status, seconds)
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", str(len(answer.body)).encode()),
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        if self.tracer is not None:
            self._trace(self.tracer, scope, answer, began)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        path, method = scope["path"], scope["method"]
        route, workload = _route(path)
        if path == "/metrics" and method in ("GET", "HEAD"):
            return await asyncio.to_thread(self._metrics, _header(scope, b"accept"))
        if route is None:
            return self._page(path, method)
        if method != "POST":
            raise _wrong_method(method, path, "POST")
        self.service.model(workload)  # an unknown workload is said before ten megabytes are read
        _check_content_type(scope)
        body = await _body(receive)
        if len(body) <= INLINE_BYTES:
            return self.service.handle(route, workload, body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.service.handle, route, workload, body)

    def _trace(self, tracer: Tracer, scope: Scope, answer: Answer, began: float) -> None:
        route, workload = _route(scope["path"])
        if route is not None:
            parent, path = _header(scope, b"traceparent").encode("latin-1"), scope["path"]
            tracer.answered(
                Request(
                    scope["method"], TRACED[route], path, began, time.perf_counter(), answer.status, parent, workload,
                    answer.rows,
                )
            )  # fmt: skip

    def _page(self, path: str, method: str) -> Answer:
        page = self.pages.get(path)
        parts = path.split("/")
        if page is None and parts[1:3] == ["v2", "models"] and len(parts) in (4, 5):
            if len(parts) == 4:
                page = self.service.metadata
            elif parts[4] == "ready":
                page = self._model_ready
            path = parts[3]
        if page is None:
            raise Refusal(404, f"There is nothing at {scope_text(path)}; /docs lists what there is.")
        if method not in ("GET", "HEAD"):
            raise _wrong_method(method, path, "GET")
        return page(path)

    def _model_ready(self, workload: str) -> Answer:
        self.service.model(workload)
        return as_json({"name": workload, "ready": True})

    def _ready(self, ready: bool, name: str) -> Answer:
        return as_json({name: ready}, 200 if ready else 503)

    def _metrics(self, accept: str) -> Answer:
        body, content_type = self.service.metrics.page(accept)
        return Answer(200, body, 0, content_type.encode())

    def _html(self, text: str) -> Answer:
        return Answer(200, text.encode(), 0, b"text/html; charset=utf-8")


def scope_text(path: str) -> str:
    """A path as it may be quoted in a sentence."""
    return path[:100]


def _route(path: str) -> tuple[str | None, str]:
    parts = path.split("/")
    if len(parts) == 3 and parts[1] in ("predict", "feedback"):
        return parts[1], parts[2]
    if len(parts) == 5 and parts[1] == "v2" and parts[2] == "models" and parts[4] == "infer":
        return "infer", parts[3]
    return None, ""


def _header(scope: Scope, wanted: bytes) -> str:
    return b", ".join(value for name, value in scope["headers"] if name == wanted).decode("latin-1")


def _wrong_method(method: str, path: str, right: str) -> Refusal:
    return Refusal(405, f"{method} does not work at {scope_text(path)}; use {right}.")


def _check_content_type(scope: Scope) -> None:
    """Raises Refusal 415 where a content type is given that is not JSON."""
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = value.split(b";")[0].strip().lower()
            if kind and kind != b"application/json" and not kind.endswith(b"+json"):
                shown = kind.decode("latin-1")[:60]
                raise Refusal(415, f"The body is said to be {shown}; send the header Content-Type: application/json.")


async def _body(receive: Receive) -> bytes:
    """The whole body. Raises Refusal 413 as soon as it is too large, Gone when the client is."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Gone
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > MOST_BYTES:
            raise _too_large()
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large() -> Refusal:
    return Refusal(413, f"The body is larger than {MOST_BYTES // 2**20} MB; send fewer records in a request.")
