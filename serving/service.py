"""From a whole request to its answer, whatever brought it here: the hot protocol, the ASGI application, or gRPC.

The order matters: decode, run, log, encode, and only then is the answer sent; where the workload asks for it, after
the log is on the disk. Not here: HTTP, batching (`serving.batcher`), encodings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from noria.errors import SchemaError
from registry.bundle import Bundle
from serving import everywhere
from serving.arrow import CONTENT_TYPE as ARROW
from serving.arrow import decode_arrow
from serving.batch import Call
from serving.batcher import Batcher
from serving.binary import header_length
from serving.capture import Log
from serving.config import Config
from serving.engine import Engine
from serving.guard import Guard
from serving.hosts import origin_of
from serving.ids import Ids
from serving.limits import Limits, inflate
from serving.metrics import Metrics
from serving.model import Model
from serving.protocol import decode_feedback, decode_predict
from serving.recorder import Records
from serving.tensors import decode_infer, metadata
from serving.tracing import Tracer
from serving.wire import RETRY, Answer, Asked, Refusal, as_json, refused

INLINE_DEFLATED = 8 * 1024
"""Compressed bodies up to this size are inflated in the event loop: they become 2 MB at most."""
INLINE_BYTES = 64 * 1024
"""Labels in a body up to this size are read in the event loop."""
UNSAFE = refused(Refusal(503, "The labels do not reach the disk; send them again later.", RETRY))


@dataclass(slots=True)
class Request:
    """A whole request to one of the hot routes."""

    route: str
    """predict, infer or feedback."""
    workload: str
    body: bytes
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    """Lower-case names; at least those of `WANTED` that were sent."""
    version: int | None = None


WANTED = frozenset({
    b"content-type", b"content-encoding", b"inference-header-content-length", b"x-request-timeout-ms", b"authorization",
    b"traceparent", b"host", b"accept", b"x-request-id", b"origin", b"sec-fetch-site",
})  # fmt: skip
"""Headers that mean something to a hot route."""


class Service:
    """What a worker can be asked."""

    def __init__(
        self,
        engine: Engine,
        log: Log,
        metrics: Metrics,
        ids: Ids,
        *,
        config: Config | None = None,
        tracer: Tracer | None = None,
        folder: Path | None = None,
    ) -> None:
        """`folder` is the server's, where its parent takes orders; None: there is no parent."""
        self.engine, self.log, self.metrics, self.ids, self.tracer = engine, log, metrics, ids, tracer
        self.config, self.folder = config or Config(), folder
        self.limits = self.config.limits
        self.guard = Guard(self.config.protection) if self.config.protection else None
        self.records = Records(log, ids, metrics, tracer, self.config.durable)
        self.commit = self.records.commit
        self.batcher = Batcher(engine, self.records, self.limits.queue, batching=self.config.batching)
        self.threads = ThreadPoolExecutor(2, "feedback")

    def accept(self, request: Request, reply: Callable[[Answer], None]) -> Call | None:
        """Answer a request, soon: `reply` is called once, in the event loop. Returns what may be marked as gone."""
        encoding = request.headers.get(b"content-encoding")
        if encoding is None:
            return self._accept(request, reply)
        if len(request.body) <= INLINE_DEFLATED:
            return self._inflated(request, _inflate(request.body, encoding, self.limits), reply)
        # In a thread, because a large body takes long and may be a bomb.
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self.threads, _inflate, request.body, encoding, self.limits)
        work.add_done_callback(lambda future: self._inflated(request, future.result(), reply))
        return None

    def _inflated(self, request: Request, body: bytes | Answer, reply: Callable[[Answer], None]) -> Call | None:
        if isinstance(body, Answer):
            self._refuse(request, body, reply)
            return None
        request.body = body
        return self._accept(request, reply)

    def _accept(self, request: Request, reply: Callable[[Answer], None]) -> Call | None:
        """The same for a body that is as it should be read."""
        try:
            if request.route == "feedback":
                self._feedback(request, reply)
                return None
            call = self._call(request, reply)
            self.batcher.submit(call)
            return call
        except Refusal as refusal:
            self._refuse(request, refused(refusal), reply)
            return None

    def _refuse(self, request: Request, answer: Answer, reply: Callable[[Answer], None]) -> None:
        self.metrics.turned_away(request.route, request.workload, answer.status)
        reply(answer)

    def admit(self, method: str, path: str, headers: Mapping[bytes, bytes], client: str) -> str:
        """The name of the key of a request that may go on; `path` is decoded, `client` an IP address.

        Raises:
            Refusal: it may not.
        """
        if self.guard is None:
            return ""
        try:
            return self.guard.admit(
                method, path, headers.get(b"host"), headers.get(b"authorization"), client, origin=origin_of(headers)
            ).name
        except Refusal as refusal:
            self.metrics.refused("", "rate" if refusal.status == 429 else "auth")
            raise

    def admit_call(self, path: str, authorization: bytes | None, client: str) -> str:
        """The same for a gRPC call; `path` is `/service/Method`."""
        if self.guard is None:
            return ""
        try:
            return self.guard.call(path, authorization, client).name
        except Refusal as refusal:
            self.metrics.refused("", "rate" if refusal.status == 429 else "auth")
            raise

    def _call(self, request: Request, reply: Callable[[Answer], None]) -> Call:
        body, headers = request.body, request.headers
        decode: Callable[[Model], Asked]
        if request.route == "infer":
            length = headers.get(b"inference-header-content-length")
            size = None if length is None else header_length(length)

            def decode(model: Model) -> Asked:
                return decode_infer(body, model, size)
        elif _kind(headers) == ARROW:

            def decode(model: Model) -> Asked:
                return decode_arrow(body, model, self.limits.inflated_bytes)
        else:
            _check_json(headers)

            def decode(model: Model) -> Asked:
                return decode_predict(body, model)

        call = Call(request.route, request.workload, decode, reply, len(body), request.version)
        call.traceparent = headers.get(b"traceparent", b"")
        timeout = headers.get(b"x-request-timeout-ms")
        if timeout is not None:
            call.deadline = deadline(timeout)
        return call

    def close(self) -> None:
        """Let go of the files that are open, and send the last traces."""
        if self.tracer is not None:
            self.tracer.close()
        if self.guard is not None:
            self.guard.close()

    # Feedback

    def _feedback(self, request: Request, reply: Callable[[Answer], None]) -> None:
        _check_json(request.headers)
        began = time.perf_counter()
        _, bundle = self.champion(request.workload)
        failures = self.log.failures

        def done(answer: Answer) -> None:
            self.records.labelled(request.workload, answer, began, request.headers.get(b"traceparent", b""))
            reply(answer)

        if len(request.body) <= INLINE_BYTES:
            self._taken(self._take(request, bundle), failures, done)
        else:
            work = asyncio.get_running_loop().run_in_executor(self.threads, self._take, request, bundle)
            work.add_done_callback(lambda future: self._taken(future.result(), failures, done))

    def _taken(self, answer: Answer, failures: int, done: Callable[[Answer], None]) -> None:
        """An accepted label is on the disk before its sender hears so."""
        if answer.status == 200:
            self.commit.after(lambda safe: done(answer if safe else UNSAFE), failures)
        else:
            done(answer)

    def _take(self, request: Request, bundle: Bundle) -> Answer:
        """All labels of a request, or none."""
        workload = request.workload
        try:
            ids, labels, times = decode_feedback(request.body, bundle.facts.task)
            for row, name in enumerate(ids):
                if not self.ids.genuine(name, workload):
                    raise SchemaError(f"Row {row}: no prediction of {workload} was answered with this id.", "id", row)
            if not self.log.labels(workload, ids, labels, times):
                raise Refusal(503, f"{self.log.failure} Send these labels again later.", RETRY)
        except Refusal as refusal:
            return refused(refusal)
        except SchemaError as error:
            return refused(Refusal(422, str(error)))
        except RecursionError:
            return refused(Refusal(400, "The JSON is nested too deeply."))
        return Answer(200, orjson.dumps({"workload": workload, "accepted": len(ids)}), len(ids))

    # What is there

    def metadata(self, workload: str) -> Answer:
        """`GET /v2/models/{workload}`."""
        return as_json(metadata(self.model(workload)))

    def champion(self, workload: str) -> tuple[Model, Bundle]:
        """The model and the bundle of a workload. Raises Refusal 404 for a plain model, which has no records."""
        model = self.model(workload)
        if model.bundle is None:
            raise Refusal(404, f"{workload} is a plain model; ask it with POST /v2/models/{workload}/infer.")
        return model, model.bundle

    def model(self, workload: str, version: int | None = None) -> Model:
        """The model that answers. Raises Refusal 404 when there is no such workload or version, 503 when not ready."""
        model = self.engine.models.get(workload)
        if model is None:
            raise self.engine.refusal(workload)
        if version is not None and version != model.version:
            raise Refusal(404, f"Version {version} of {workload} does not serve; {model.version} does.")
        return model

    def look(self) -> Engine:
        """The engine, which knows what the other workers answer by now."""
        if self.folder is not None:
            self.engine.everywhere = everywhere.read(self.folder)
        return self.engine

    def check_ready(self, workload: str, version: int | None = None) -> None:
        """Raises Refusal 503 while a worker may be asked that does not answer for the model; as `model` otherwise."""
        found = self.model(workload, version)
        if not self.look().answers(workload, version):
            sentence = f"Version {found.version} of {workload} is not ready; try again in a second."
            raise Refusal(503, sentence, RETRY)


def too_large(limits: Limits) -> Refusal:
    """The refusal of a body that is larger than is read."""
    return Refusal(413, f"The body is larger than {limits.body_bytes:,} bytes; send fewer records in a request.")


def _inflate(body: bytes, encoding: bytes, limits: Limits) -> bytes | Answer:
    """The body, or its refusal as an answer: an exception in a future would be kept, with the frames that it went
    through and all that was inflated in them, until the garbage collector comes by."""
    try:
        return inflate(body, encoding, limits)
    except Refusal as refusal:
        return refused(refusal)


def _kind(headers: Mapping[bytes, bytes]) -> bytes:
    return headers.get(b"content-type", b"").split(b";")[0].strip().lower()


def _check_json(headers: Mapping[bytes, bytes]) -> None:
    """Raises Refusal 415 where a content type is given that is not JSON."""
    kind = _kind(headers)
    if kind and kind != b"application/json" and not kind.endswith(b"+json"):
        shown = kind.decode("latin-1")[:60]
        raise Refusal(415, f"The body is said to be {shown}; send the header Content-Type: application/json.")


def deadline(timeout: bytes) -> float:
    """`time.perf_counter()` after which nobody wants the answer, from the header X-Request-Timeout-Ms. Raises Refusal
    400."""
    if not timeout.isdigit() or len(timeout) > 12:
        raise Refusal(400, "The header X-Request-Timeout-Ms must be a whole number.")
    return time.perf_counter() + int(timeout) / 1000
