"""A client that lives through a stream: sends raw records to the endpoint, and later the truths as feedback.

Every request is counted; one that does not come back with an answer counts as failed and is never hidden by a retry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from noria.errors import ServiceError
from noria.workload import Workload


@dataclass
class Answered:
    """What came back for a stretch of the stream, in the order sent."""

    ids: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    rows: list[pa.Table] = field(default_factory=list)

    def errors(self) -> np.ndarray:
        """Absolute error of each answered row."""
        return np.asarray(np.abs(np.array(self.scores) - np.array(self.labels)))


@dataclass
class Traffic:
    """Requests to one workload's endpoint."""

    url: str
    workload: Workload
    batch: int = 64
    sent: int = 0
    failed: int = 0
    last_failure: str = ""

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=10.0, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def send(self, rows: pa.Table, into: Answered, *, between: Callable[[int], None] = lambda _: None) -> None:
        """Send labelled rows in order, `batch` records a request; `between` hears the rows done after each."""
        for start in range(0, len(rows), self.batch):
            part = rows.slice(start, self.batch)
            answer = self._post(f"/predict/{self.workload.name}", {"records": list(self.records(part))})
            if answer is not None:
                into.ids += [one["id"] for one in answer["predictions"]]
                into.scores += [one["prediction"] for one in answer["predictions"]]
                into.versions += [int(answer["version"])] * len(part)
                into.labels += part.column(self.workload.schema.target).to_pylist()
                into.rows.append(part)
            between(start + len(part))

    def feedback(self, answered: Answered, now: datetime) -> None:
        """Send the truths of answered rows, which arrive `now`."""
        for start in range(0, len(answered.ids), 2000):
            stop = start + 2000
            labels = [
                {"id": name, "label": label, "time": now.isoformat()}
                for name, label in zip(answered.ids[start:stop], answered.labels[start:stop], strict=True)
            ]
            self._post(f"/feedback/{self.workload.name}", {"labels": labels})

    def counts(self) -> dict[str, Any]:
        """Requests sent and failed so far."""
        return {"sent": self.sent, "failed": self.failed, "last_failure": self.last_failure}

    def status(self) -> dict[str, Any]:
        """What the server says of the workload: version, since, pending log rows; empty while nothing is deployed."""
        found: dict[str, Any] = self.client.get("/status").raise_for_status().json()
        known: dict[str, Any] = found["workloads"].get(self.workload.name, {})
        return known

    def settle(self, patience: float = 30.0) -> None:
        """Wait until everything answered so far is in the lake. Raises ServiceError when it does not get there."""
        self._wait(lambda: self.status().get("pending", 0) == 0, patience, "The prediction log does not reach the lake")

    def follow(self, version: int, patience: float = 60.0) -> None:
        """Wait until the server answers with this version. Raises ServiceError when it does not."""
        self._wait(
            lambda: self.status().get("version") == version, patience, f"The server does not take version {version}"
        )

    def records(self, rows: pa.Table) -> Iterator[dict[str, Any]]:
        """Rows as JSON records: the schema's columns and the event time, missing values left out."""
        schema = self.workload.schema
        names = list(dict.fromkeys([*schema.names, schema.event_time]))
        for record in rows.select([name for name in names if name in rows.column_names]).to_pylist():
            yield {name: _plain(value) for name, value in record.items() if not _missing(value)}

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        self.sent += 1
        try:
            answer = self.client.post(path, json=body)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            self.failed += 1
            self.last_failure = f"{path}: {error}"
            return None
        content: dict[str, Any] = answer.json()
        return content

    def _wait(self, done: Callable[[], bool], patience: float, sentence: str) -> None:
        deadline = time.monotonic() + patience
        while not self._quietly(done):
            if time.monotonic() > deadline:
                raise ServiceError(f"{sentence} ({patience:.0f} s); see logs/serving.log.")
            time.sleep(0.05)

    @staticmethod
    def _quietly(done: Callable[[], bool]) -> bool:
        """`done()`; false while the server does not answer, for example because it is being restarted."""
        try:
            return done()
        except httpx.HTTPError:
            return False


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
