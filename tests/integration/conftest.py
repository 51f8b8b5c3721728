"""Real servers on free loopback ports: MLflow's is started once a session, and empty at the start of each file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from registry.store import Store
from serving import keys


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server on SQLite that passes artifacts on, as `noria up` starts it."""
    home, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{home}/mlflow.sqlite"]
    command += ["--serve-artifacts", "--artifacts-destination", str(home / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < end, (home / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)


@pytest.fixture(scope="module")
def mlflow_url(mlflow_server: str) -> Iterator[str]:
    """That server, without the models of another file: servers follow every alias that they find in it."""
    yield mlflow_server
    client = Store(mlflow_server).client
    for model in client.search_registered_models(max_results=1000):
        client.delete_registered_model(model.name)


SERVE = (
    "import sys, logging; logging.basicConfig(level='INFO')\n"
    "from noria.settings import load_settings; from serving.reload import serve\n"
    "home, http, grpc = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
    "serve(load_settings(home=home, repository=home + '/models'), '127.0.0.1', http, '', grpc_port=grpc)"
)


Roles = dict[str, tuple[str, float | None]]
"""By name of a key its role and its rate."""


class PlainServer:
    """A server over a repository of plain models, HTTP and gRPC, in processes of its own."""

    def __init__(
        self,
        home: Path,
        models: dict[str, bytes],
        roles: dict[str, tuple[str, float | None]],
        variables: dict[str, str],
    ) -> None:
        self.home, self.port, self.grpc_port = home, free_port(), free_port()
        self.url, self.grpc = f"http://127.0.0.1:{self.port}", f"127.0.0.1:{self.grpc_port}"
        path = home / "serving" / "keys.json"
        made = {name: keys.add(path, name, [role], "now", rate) for name, (role, rate) in roles.items()}
        self.headers = {name: {"authorization": f"Bearer {key}"} for name, key in made.items()}
        for name, content in models.items():
            self.put(name, 1, content)
            os.utime(home / "models" / name / "1" / "model.onnx", (1, 1))  # old: loaded with the first look
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(home), str(self.port), str(self.grpc_port)],
                env={**clean, **variables}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            self.wait(lambda: all(self.ready(name) for name in models), 120)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def ready(self, name: str) -> bool:
        """Whether a model answers."""
        headers = self.headers.get("predict", {})
        return httpx.get(f"{self.url}/v2/models/{name}/ready", headers=headers).status_code == 200

    def put(self, name: str, version: int, content: bytes) -> None:
        """Add a version as a careful person does: written elsewhere, then renamed."""
        aside = self.home / f"aside-{name}-{version}"
        aside.mkdir()
        (aside / "model.onnx").write_bytes(content)
        place = self.home / "models" / name
        place.mkdir(parents=True, exist_ok=True)
        aside.rename(place / str(version))

    def workers(self) -> list[int]:
        """Ids of the processes that answer."""
        file = self.home / "serving" / "workers.json"
        described = orjson.loads(file.read_bytes()) if file.exists() else []
        return [worker["pid"] for worker in described if worker["phase"] == "accepting"]

    def wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Until it holds."""
        end = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None and time.monotonic() < end, (self.home / "log").read_text()[-3000:]
            time.sleep(0.02)

    def stop(self) -> None:
        """End it; what was asked is answered first."""
        self.process.terminate()
        assert self.process.wait(60) == 0


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., PlainServer]]:
    """Starts servers over models (name to content of version 1), and ends them with the module. One with `roles` asks
    for keys."""
    started: list[PlainServer] = []

    def start(models: dict[str, bytes], roles: Roles | None = None, **variables: str) -> PlainServer:
        home = tmp_path_factory.mktemp("plain")
        started.append(PlainServer(home, models, roles or {}, variables))
        return started[-1]

    yield start
    for server in started:
        server.stop()
