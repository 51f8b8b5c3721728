"""A method of gRPC from bytes to bytes: admission before its message is read, limits, and refusals as gRPC's codes.

A method is a stream of messages to grpc, of which one is read: what it takes for a single message it reads before
anybody is asked. Not here: what the methods do (`serving.rpc`), what calls may hold (`serving.rpc_calls`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving.audit import Access
from serving.batch import FAULT, Call
from serving.messages import MESSAGES, METHODS, bounded
from serving.rpc_calls import Calls, Underway
from serving.service import Service, deadline
from serving.wire import LONGEST_SENTENCE, Answer, Refusal

SERVICE = "inference.GRPCInferenceService"
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""What a refusal's HTTP status is called here; any other is INTERNAL."""
LEFT = 499
"""The status, in the access log and the metrics, of a call that ended before its answer."""
TIMEOUT = "x-request-timeout-ms"
SOON_SECONDS = 0.1
"""A client ends a call at its deadline, a little before the server would."""

logger = logging.getLogger(__name__)


class Caller(Underway):
    """Who makes a call, and how."""

    __slots__ = ("began", "call", "headers", "key", "path", "received", "version")

    def __init__(self, path: str, context: Any) -> None:
        """`path` is `/service/Method`."""
        super().__init__(context)
        self.path, self.key, self.began = path, "", time.perf_counter()
        self.received = 0
        """Bytes of the message."""
        self.version: int | None = None  # of the model that was asked
        self.call: Call | None = None
        """What was handed to the batcher, which counts it."""
        self.headers: dict[str, str] = dict(context.invocation_metadata() or ())

    def header(self, name: str) -> bytes | None:
        """A field of the metadata."""
        value = self.headers.get(name)
        return None if value is None else value.encode()

    def address(self) -> str:
        """The IP address of `ipv4:127.0.0.1:5000` or `ipv6:[::1]:5000`, percent-encoded as gRPC does."""
        peer: str = self.context.peer()
        return peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")

    def deadline(self) -> float | None:
        """`time.perf_counter()` after which nobody wants the answer: gRPC's deadline or the header's, the earlier."""
        remaining, timeout = self.context.time_remaining(), self.header(TIMEOUT)
        ends = [] if remaining is None else [time.perf_counter() + remaining]
        if timeout is not None:
            ends.append(deadline(timeout))
        return min(ends, default=None)


class Handler:
    """One method."""

    def __init__(
        self, service: Service, name: str, method: Callable[[Any, Caller], Awaitable[Any]], calls: Calls,
        gate: asyncio.Event,
    ) -> None:  # fmt: skip
        """Answers are held back while `gate` is not set."""
        self.service, self.method, self.calls, self.gate = service, method, calls, gate
        self.path, self.infers = f"/{SERVICE}/{name}", name == "ModelInfer"
        self.asked, self.answered = (MESSAGES[one] for one in METHODS[name])
        self.empty = not self.asked.DESCRIPTOR.fields
        """Nothing can be in the message: it is not waited for, and probes need no place."""

    async def handle(self, _: Any, context: Any) -> bytes:
        """Answer one call."""
        caller = Caller(self.path, context)
        self.calls.begin(caller)
        status, sentence, answer = 500, FAULT, Answer(500, b"")
        try:
            if self.service.guard is not None:
                caller.key = self.service.admit_call(self.path, caller.header("authorization"), caller.address())
            found = await self.method(await self._request(caller), caller)
            if not isinstance(found, Answer):
                found = Answer(200, self.answered(**found).SerializeToString())
            if not self.empty:
                self.calls.check(len(found.body))
            status, answer = 200, found
        except Refusal as refusal:
            status, sentence = refusal.status, refusal.message
        except DecodeError:
            status, sentence = 400, f"The body is not a {self.asked.DESCRIPTOR.name}."
        except asyncio.CancelledError:
            self._ended(caller)
            raise
        except Exception:
            logger.exception("%s failed", self.path)
        if caller.call is None:
            self._count(caller, status)
        caller.call = None  # it has the answer, which a refusal need not wait with
        self._note(caller, status, answer)
        if not self.gate.is_set():
            await self.gate.wait()
        self.calls.answered(caller, len(answer.body))
        if status == 200:
            return answer.body
        # Not `abort`: the call would keep what that raises, which keeps this frame and its message, and so the call.
        context.set_code(CODES.get(status, grpc.StatusCode.INTERNAL))
        context.set_details(sentence[:LONGEST_SENTENCE].encode("utf-8", "replace").decode())
        return b""

    async def _request(self, caller: Caller) -> Any:
        if self.empty:
            return self.asked()
        self.calls.place(caller)
        message = await self.calls.read(caller)
        caller.received, caller.began = len(message), time.perf_counter()
        return self.asked.FromString(bounded(message))

    def _ended(self, caller: Caller) -> None:
        """Its deadline has passed, or its client has left."""
        remaining = caller.context.time_remaining()
        status = 504 if remaining is not None and remaining < SOON_SECONDS else LEFT
        call = caller.call
        if call is None or call.asked is None:  # what has come to a batch is counted with that
            if status == 504:
                self.service.metrics.refused(call.workload if call else "", "deadline")
            self._count(caller, status)
        self._note(caller, status, Answer(status, b""))

    def _count(self, caller: Caller, status: int) -> None:
        route, workload = "grpc_infer" if self.infers else "page", caller.call.workload if caller.call else ""
        self.service.metrics.answered(route, workload, 0, status, time.perf_counter() - caller.began)

    def _note(self, caller: Caller, status: int, answer: Answer) -> None:
        if self.service.guard is None or (notes := self.service.guard.access_log) is None:
            return
        notes.add(Access(
            time.time(), caller.headers.get("x-request-id", ""), caller.address(), caller.key, "POST", self.path,
            status, caller.received, len(answer.body), (time.perf_counter() - caller.began) * 1000, answer.rows,
            caller.version,
        ))  # fmt: skip
