"""noria itself, served as users do, everything on: validation, batching, and the log written before each answer.

`plain` serves a model repository; `workload` serves a bundle that a registry's champion names. What the commands and
settings are called is written here and nowhere else in the benchmarks. Not here: what is asked of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.serving.environments import Unavailable
from benchmarks.serving.processes import Served, ask, free_port, running
from noria.settings import Settings
from registry.bundle import Contents
from registry.promote import promote
from registry.store import Store

NAME = "noria"
ROOT = Path(__file__).resolve().parents[2]
READY = "/v2/health/ready"
UNBATCHED = {"NORIA_BATCHING": "false"}
"""Every request runs alone: what batching brings is measured against this."""
DURABLE, FAST = {"NORIA_ACK": "durable"}, {"NORIA_ACK": "fast"}


def infer_path(model: str) -> str:
    """The v2 route of a model."""
    return f"/v2/models/{model}/infer"


def predict_path(workload: str) -> str:
    """The route of plain records."""
    return f"/predict/{workload}"


def is_ready(port: int) -> str:
    """What the readiness route says against it."""
    answered = ask(port, READY)
    return "" if answered.status == 200 else f"ready: {answered.status}"


def plain(
    repository: Path,
    home: Path,
    port: int,
    *,
    right: Callable[[int], str] = is_ready,
    core: int | None = 0,
    variables: Mapping[str, str] | None = None,
) -> AbstractContextManager[Served]:
    """Serve `repository` (NAME/VERSION/model.onnx) on a port; everything it writes goes to `home`."""  # fmt: skip
    return _serve(["--repository", str(repository)], home, port, right, core, variables)


def workload(
    store: Store,
    home: Path,
    port: int,
    *,
    right: Callable[[int], str] = is_ready,
    core: int | None = 0,
    variables: Mapping[str, str] | None = None,
) -> AbstractContextManager[Served]:
    """Serve the champions of a registry."""  # fmt: skip
    given = {"NORIA_MLFLOW_URI": store.uri, **(variables or {})}
    return _serve([], home, port, right, core, given)


def _serve(
    arguments: list[str], home: Path, port: int, right: Callable[[int], str], core: int | None,
    variables: Mapping[str, str] | None,
) -> AbstractContextManager[Served]:  # fmt: skip
    for variable in variables or {}:  # one that noria does not read would compare a thing with itself
        if variable.removeprefix("NORIA_").lower() not in Settings.model_fields:
            raise Unavailable(f"This noria has no setting {variable}.")
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flows.cli", "serve", *arguments, "--port", str(port)]
    settings = {
        "NORIA_HOME": str(home), "NORIA_PROVIDERS": "cpu", "PYTHONPATH": str(ROOT),
        "MLFLOW_DISABLE_TELEMETRY": "true", **(variables or {}),
    }  # fmt: skip
    return running(NAME, command, port, right=right, log=home / "serve.log", core=core, variables=settings)


@contextmanager
def registry(home: Path) -> Iterator[Store]:
    """An MLflow server on SQLite, as `noria up` starts it, on no particular core; it takes about 15 s."""
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{home}/mlflow.sqlite", "--serve-artifacts",
        "--artifacts-destination", str(home / "artifacts"),
    ]  # fmt: skip
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def right(port: int) -> str:
        answered = ask(port, "/health")
        return "" if answered.status == 200 else f"health: {answered.status}"

    with running("mlflow", command, port, right=right, log=home / "mlflow.log", core=None, variables=quiet):
        yield Store(f"http://127.0.0.1:{port}")


def register(store: Store, contents: Contents, *, versions: int = 1) -> None:
    """Register so many versions of a workload and make the first one the champion."""
    name = contents.facts.name
    for _ in range(versions):
        with store.run(name, "benchmark") as run:
            store.register(run, contents)
    promote(store, store.get(name, 1), reason="benchmark", now=datetime.now(UTC))
