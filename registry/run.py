"""One MLflow run: what was tried, with what, and how it went."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from noria.records import DatasetRef
from registry.connection import answered

BATCH = 100
"""Most entries of one kind that MLflow takes in a request (params; metrics could be more)."""
LONGEST = 5_000


@dataclass(frozen=True)
class Run:
    """An open run. Artifact names are paths inside the run, for example "curves.png"."""

    id: str
    experiment: str
    workload: str
    uri: str
    client: MlflowClient

    def params(self, values: Mapping[str, Any]) -> None:
        """Log choices; each may be set once a run."""
        entries = [Param(name, str(value)[:LONGEST]) for name, value in values.items()]
        with self._doing("params"):
            for start in range(0, len(entries), BATCH):
                self.client.log_batch(self.id, params=entries[start : start + BATCH])

    def metrics(self, values: Mapping[str, float], step: int = 0, model_id: str | None = None) -> None:
        """Log numbers at a step (epoch); with `model_id` on the logged model's page too."""
        now = int(time.time() * 1000)  # when it was logged, which no decision reads
        entries = [Metric(name, float(value), now, step, model_id=model_id) for name, value in values.items()]
        with self._doing("metrics"):
            for start in range(0, len(entries), BATCH):
                self.client.log_batch(self.id, metrics=entries[start : start + BATCH])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        with self._doing("tags"):
            self.client.log_batch(self.id, tags=[RunTag(name, str(value)) for name, value in values.items()])

    def figure(self, name: str, figure: Any) -> None:
        """Keep a matplotlib figure as an image; the name's ending says which kind."""
        with self._doing(name):
            self.client.log_figure(self.id, figure, name)

    def text(self, name: str, text: str) -> None:
        """Keep a text (Markdown, HTML)."""
        with self._doing(name):
            self.client.log_text(self.id, text, name)

    def data(self, name: str, data: Any) -> None:
        """Keep plain data as a JSON file."""
        options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
        self.text(name, orjson.dumps(data, option=options).decode())

    def file(self, name: str, content: bytes) -> None:
        """Keep bytes as a file at the top of the run's artifacts."""
        with self._doing(name), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            self.client.log_artifact(self.id, str(path))

    def dataset(self, ref: DatasetRef, context: str = "training") -> None:
        """Say which rows of the lake the run uses."""
        source = orjson.dumps(ref.to_json()).decode()
        profile = orjson.dumps({"num_rows": ref.rows, "window": str(ref.window)}).decode()
        name = f"{ref.workload} {ref.window.start:%Y-%m-%d} to {ref.window.end:%Y-%m-%d}"
        entry = Dataset(name, ref.fingerprint[:36], "noria", source, profile=profile)
        with self._doing("the dataset"):
            tag = InputTag("mlflow.data.context", context)
            self.client.log_inputs(self.id, [DatasetInput(entry, [tag])])

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        with answered(self.uri, f"logging {what} of {self.workload}"):
            yield
