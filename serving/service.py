"""One request as a plain function: bytes in, an answer out. What `serving.app` calls, in the event loop or beside it.

The order matters: decode, score, encode, log, and only then is the answer handed back to be sent. Not here: HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import orjson

from noria.errors import SchemaError
from noria.runtime import SCORE
from noria.schema import Schema
from registry.bundle import Bundle
from serving.capture import Log, batch_ids, new_base
from serving.engine import Engine
from serving.metrics import Metrics
from serving.model import Model
from serving.protocol import decode_feedback, decode_predict
from serving.tensors import decode_infer, metadata
from serving.wire import Answer, Asked, Refusal, Rows, Scored, as_json, refused


class Service:
    """The routes that need a model."""

    def __init__(self, engine: Engine, log: Log, metrics: Metrics) -> None:
        self.engine, self.log, self.metrics = engine, log, metrics
        self.routes: dict[str, Callable[[str, bytes], Answer]] = {
            "predict": self.predict,
            "infer": self.infer,
            "feedback": self.feedback,
        }

    def handle(self, route: str, workload: str, body: bytes) -> Answer:
        """Answer one request to a route; whatever a client does wrong is a refusal, never an exception."""
        began = time.perf_counter()
        try:
            answer = self.routes[route](workload, body)
        except Refusal as refusal:
            answer = refused(refusal)
        except SchemaError as error:
            answer = refused(Refusal(422, str(error)))
        except RecursionError:
            answer = refused(Refusal(400, "The JSON is nested too deeply."))
        model = self.engine.models.get(workload)
        version = model.version if model else 0
        self.metrics.answered(route, workload, version, answer.status, time.perf_counter() - began, answer.rows)
        return answer

    def predict(self, workload: str, body: bytes) -> Answer:
        """`POST /predict/{workload}`."""
        return self._answer(workload, partial(decode_predict, body))

    def infer(self, workload: str, body: bytes) -> Answer:
        """`POST /v2/models/{workload}/infer`."""
        return self._answer(workload, partial(decode_infer, body))

    def _answer(self, workload: str, decode: Callable[[Model], Asked]) -> Answer:
        began = time.perf_counter()
        model, bundle = self.champion(workload)
        asked = decode(model)
        rows = asked.rows
        if rows.times is None:
            rows.times = np.full(len(rows), time.time_ns() // 1000)
        scores, actions = self._score(model, bundle, rows)
        base = new_base(time.time_ns() // 1_000_000)
        answer = asked.answer(Scored(model, {SCORE: scores}, batch_ids(base, len(rows)), actions))
        self._record(model, bundle.schema, rows, scores, actions, base=base, began=began)
        return answer

    def feedback(self, workload: str, body: bytes) -> Answer:
        """`POST /feedback/{workload}`."""
        _, bundle = self.champion(workload)
        ids, labels, times = decode_feedback(body, bundle.facts.task)
        lost = self.log.lost
        self.log.labels(workload, ids, labels, times)
        if self.log.lost > lost:
            raise Refusal(503, f"{self.log.failure} Send these labels again later.")
        return Answer(200, orjson.dumps({"workload": workload, "accepted": len(ids)}), len(ids))

    def metadata(self, workload: str) -> Answer:
        """`GET /v2/models/{workload}`."""
        return as_json(metadata(self.model(workload)))

    def champion(self, workload: str) -> tuple[Model, Bundle]:
        """The model and the bundle of a workload. Raises Refusal 404 for a plain model, which has no records."""
        model = self.model(workload)
        if model.bundle is None:
            raise Refusal(404, f"{workload} is a plain model; ask it with POST /v2/models/{workload}/infer.")
        return model, model.bundle

    def model(self, workload: str) -> Model:
        """The model that answers for a workload. Raises Refusal 404 or 503."""
        model = self.engine.models.get(workload)
        if model is not None:
            return model
        known = sorted({*self.engine.models, *self.engine.known})
        if known and workload not in known:
            raise Refusal(404, f"There is no workload '{workload}'; there are: {', '.join(known)}.")
        desired = self.engine.known.get(workload)
        if desired is not None and desired.version is not None:
            raise Refusal(503, f"Version {desired.version} of {workload} is not ready; try again in some seconds.")
        raise Refusal(
            503,
            f"No version of {workload} has the alias champion; promote one in the MLflow UI or run "
            f"noria promote {workload} VERSION.",
        )

    def status(self) -> Answer:
        """`GET /status`: by workload the version, since when, what was last asked for, and rows not yet in the lake."""
        pending = self.log.pending()
        workloads: dict[str, Any] = {}
        for name in sorted({*self.engine.known, *self.engine.models, *pending}):
            state, model = self.engine.states.get(name), self.engine.models.get(name)
            failed = self.engine.failures.get(name)
            rows, segments = pending.get(name, (0, 0))
            workloads[name] = {
                "version": model.version if model else None,
                "since": state.since if state else None,
                "replaced": state.replaced if state else None,
                "failure": {"version": failed.version, "reason": failed.reason, "at": failed.since} if failed else None,
                "pending": rows,
                "segments": segments,
            }
        log = {"lost": self.log.lost, "failure": self.log.failure or None}
        return as_json({"ready": self.engine.ready, "workloads": workloads, "log": log})

    def _score(self, model: Model, bundle: Bundle, rows: Rows) -> tuple[np.ndarray, list[str | None]]:
        scores = model.run(rows.tensors)[SCORE]
        finite = np.isfinite(scores)
        if not finite.all():
            row = int(np.argmin(finite))
            raise Refusal(422, f"Row {row}: the model has no finite score for these values; check them for extremes.")
        return scores, bundle.bands.actions(scores)

    def _record(
        self,
        model: Model,
        schema: Schema,
        rows: Rows,
        scores: np.ndarray,
        actions: list[str | None],
        *,
        base: int,
        began: float,
    ) -> None:
        elapsed = (time.perf_counter() - began) * 1000
        self.log.predictions(
            model.workload, model.version, schema,
            base=base, rows=rows, scores=scores, actions=actions, latency_ms=elapsed,
        )  # fmt: skip
