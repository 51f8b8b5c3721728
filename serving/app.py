"""The ASGI application: every route, the hot ones too, for servers that are not noria's own (Ray Serve).

Bare ASGI, because a framework costs more than everything else that a request does here. On noria's own server the hot
routes do not come this far (`serving.http`). Not here: what an answer holds (`serving.service`), pages
(`serving.pages`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from importlib.metadata import version as installed
from typing import Any

from serving import openapi, pages
from serving.audit import Access
from serving.limits import Limits, inflate
from serving.operate import Operator, is_operation, operate, read
from serving.routes import hot, is_version
from serving.service import WANTED, Request, Service, too_large
from serving.status import status
from serving.tensors import EXTENSIONS, metadata
from serving.wire import RETRY, Answer, Refusal, as_json, refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)


class Gone(Exception):
    """The client went away before its request was whole."""


class Told:
    """What is known of one request for its line in the access log."""

    __slots__ = ("began", "counted", "key", "received", "version")

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.key, self.received = "", 0
        self.version: int | None = None
        self.counted = False


class App:
    """One worker's HTTP face."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.pages: dict[str, Callable[[str], Answer]] = {
            "/": lambda _: self._html(pages.home(service.engine)),
            "/docs": lambda _: self._html(pages.docs(service.engine)),
            "/openapi.json": lambda _: as_json(openapi.describe(service.engine.models.values())),
            "/status": lambda _: self._status(),
            "/v2": lambda _: as_json({"name": "noria", "version": installed("noria"), "extensions": EXTENSIONS}),
            "/v2/health/live": lambda _: as_json({"live": True}),
            "/v2/health/ready": lambda _: self._ready(service.look().ready, "ready"),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            return
        told = Told()
        try:
            answer = await self._answer(scope, receive, told)
        except Gone:
            return
        except Refusal as refusal:
            answer = refused(refusal)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            answer = as_json({"error": "The server has a fault; its log tells more."}, 500)
        seconds = time.perf_counter() - told.began
        if (route := hot(scope["path"])) is None:
            self.service.metrics.answered("page", "", 0, answer.status, seconds)
        elif not told.counted:
            self.service.metrics.turned_away(route.name, route.workload, answer.status)
        if self.service.guard is not None and self.service.guard.access_log is not None:
            self.service.guard.access_log.add(_line(scope, answer, told, seconds))
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", str(len(answer.body)).encode()),
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Scope, receive: Receive, told: Told) -> Answer:
        path, method = scope["path"], scope["method"]
        headers = {name: value for name, value in scope["headers"] if name in WANTED}
        client = scope.get("client") or ("",)
        told.key = self.service.admit(method, path, headers, client[0])
        route = hot(path)
        if path == "/metrics":
            if method not in ("GET", "HEAD"):
                raise _wrong_method(method, path, "GET")
            return await asyncio.to_thread(self._metrics, headers.get(b"accept", b"").decode("latin-1"))
        if route is None and is_operation(parts := path.split("/")):
            if method != "POST":
                raise _wrong_method(method, path, "POST")
            body = await _body(receive, self.service.limits)
            told.received = len(body)
            asked = read(parts, inflate(body, headers.get(b"content-encoding"), self.service.limits))
            try:
                found = await operate(self.service, asked, Operator(path, told.key, client[0]))
            except asyncio.CancelledError:  # what is asked takes longer than a worker that ends may take
                raise Refusal(503, f"The order to {asked.name} {asked.model} is given, and not done yet; give it again "
                              "to wait for it.", RETRY) from None  # fmt: skip
            return as_json(found if asked.name == "index" else {})
        if route is None:
            return self._page(path, method)
        if method != "POST":
            raise _wrong_method(method, path, "POST")
        # An unknown workload is said before ten megabytes are read.
        told.version = self.service.model(route.workload, route.version).version
        body = await _body(receive, self.service.limits)
        told.received, told.began = len(body), time.perf_counter()
        request = Request(route.name, route.workload, body, headers, route.version)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call = self.service.accept(request, lambda answer: None if future.done() else future.set_result(answer))
        told.counted = True  # by the service, whatever it answers
        try:
            return await future
        finally:
            if call is not None:
                call.gone = True

    def _status(self) -> Answer:
        return as_json(status(self.service.look(), self.service.log))

    def _page(self, path: str, method: str) -> Answer:
        page = self.pages.get(path)
        found = page(path) if page else self._about_model(path.split("/"))
        if found is None:
            raise Refusal(404, f"There is nothing at {scope_text(path)}; /docs lists what there is.")
        if method not in ("GET", "HEAD"):
            raise _wrong_method(method, path, "GET")
        return found

    def _about_model(self, parts: Sequence[str]) -> Answer | None:
        """Metadata and readiness of a model, with and without a version."""
        match parts:
            case ["", "v2", "models", workload, *rest]:
                pass
            case _:
                return None
        version = None
        match rest:
            case ["versions", number, *more] if is_version(number):
                version, rest = int(number), more
        if rest not in ([], ["ready"]):
            return None
        if rest:
            self.service.check_ready(workload, version)
            return as_json({"name": workload, "ready": True})
        return as_json(metadata(self.service.model(workload, version)))

    def _ready(self, ready: bool, name: str) -> Answer:
        return as_json({name: ready}, 200 if ready else 503)

    def _metrics(self, accept: str) -> Answer:
        text, kind = self.service.metrics.page(accept)
        return Answer(200, text, 0, kind.encode())

    def _html(self, text: str) -> Answer:
        return Answer(200, text.encode(), 0, b"text/html; charset=utf-8")


def _line(scope: Scope, answer: Answer, told: Told, seconds: float) -> Access:
    request = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return Access(
        time.time(), request, (scope.get("client") or ("",))[0], told.key, scope["method"], scope["path"],
        answer.status, told.received, len(answer.body), seconds * 1000, answer.rows, told.version,
    )  # fmt: skip


def scope_text(path: str) -> str:
    """A path as it may be quoted in a sentence."""
    return path[:100]


def _wrong_method(method: str, path: str, right: str) -> Refusal:
    allow = b"GET, HEAD" if right == "GET" else right.encode()
    return Refusal(405, f"{method} does not work at {scope_text(path)}; use {right}.", ((b"allow", allow),))


async def _body(receive: Receive, limits: Limits) -> bytes:
    """The whole body. Raises Refusal 413 as soon as it is too large, Gone when the client is."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Gone
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > limits.body_bytes:
            raise too_large(limits)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
