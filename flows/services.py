"""Which services make up the embedded stack, and how each is started: commands, environment, readiness.

Run as a module (`python -m flows.services`, by `noria up`) it becomes the supervisor of the home in NORIA_HOME.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from flows.site import Site
from flows.stack import Service, Supervisor, answers, end_orphans, lock

PREFERRED = {
    "home": 8090,
    "prefect": 4200,
    "mlflow": 5000,
    "evidently": 8000,
    "serving": 8080,
    "ray": 6379,
    "worker": 8091,
}
"""Ports taken where they are free; otherwise any free one. The choice is kept for the home's next start."""
QUIET = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
    "PYTHONUNBUFFERED": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # The name says Windows and macOS; what it decides is whether Ray binds to loopback or to every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def executable(name: str) -> str:
    """A command of this environment, whether or not the environment is activated."""
    return str(Path(sys.executable).parent / name)


def ports(home: Path) -> dict[str, int]:
    """A free loopback port for each service, the same as last time where possible."""
    remembered = home / "ports.json"
    wanted = {**PREFERRED, **(json.loads(remembered.read_text()) if remembered.exists() else {})}
    chosen: dict[str, int] = {}
    for name, port in wanted.items():
        chosen[name] = _free(port, set(chosen.values()))
    aside = remembered.with_suffix(".part")
    aside.write_text(json.dumps(chosen))
    aside.replace(remembered)
    return chosen


def _free(wanted: int, taken: set[int]) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found = int(probe.getsockname()[1])
            if found not in taken:
                return found
    return _free(0, taken)


def environment(home: Path, at: dict[str, int]) -> dict[str, str]:
    """What every service and every flow run of this home has in common."""
    token = home / "ray-token"
    if not token.exists():
        with os.fdopen(os.open(token, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    return {
        **QUIET,
        **RAY,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "NORIA_HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{at['prefect']}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }


def services(site: Site) -> list[Service]:
    """The stack of a site, in starting order. Folders are made, nothing is started."""
    home = site.settings.root
    for folder in ("prefect", "mlflow", "evidently", "logs"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    at = ports(home)
    shared = environment(home, at)
    url = {name: f"http://127.0.0.1:{port}" for name, port in at.items()}
    socket_path = warm_socket(home)
    python = sys.executable
    return [
        _prefect(home, at["prefect"], shared),
        _mlflow(home, at["mlflow"], shared),
        _ray(home, at["ray"], shared),
        _evidently(home, at["evidently"], shared),
        Service(
            "serving",
            (python, "-m", "flows.cli", "serve", "--host", "127.0.0.1", "--port", str(at["serving"])),
            url["serving"], answers(f"{url['serving']}/v2/health/live"), {**shared, "NORIA_MLFLOW_URI": url["mlflow"]},
        ),
        Service(
            "engine",
            (python, "-m", "flows.engine", str(socket_path)), f"unix:{socket_path}", _listens(socket_path), shared,
        ),
        Service(
            "worker",
            (python, "-I", "-S", str(Path(__file__).with_name("run_warm.py")), str(socket_path), "flows.worker"),
            f"{url['prefect']}/work-pools", answers(f"{url['worker']}/health"),
            {**shared, "PREFECT_WORKER_QUERY_SECONDS": "0.5", "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
             "PREFECT_WORKER_WEBSERVER_PORT": str(at["worker"])},
            after=("prefect", "engine"),
        ),
        Service(
            "home",
            (python, "-m", "flows.home", str(at["home"])), url["home"], answers(f"{url['home']}/health"), shared,
        ),
    ]  # fmt: skip


def warm_socket(home: Path) -> Path:
    """Where the warm engine listens: in the home if its path is short enough for a socket, else in a folder of ours."""
    inside = home / "engine.sock"
    if len(str(inside)) < 100:
        return inside
    folder = Path(tempfile.gettempdir()) / f"noria-{os.getuid()}-{zlib.crc32(str(home).encode())}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / "engine.sock"


def _listens(path: Path) -> Callable[[], bool]:
    def probe() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except OSError:
                return False
        return True

    return probe


def _prefect(home: Path, port: int, shared: dict[str, str]) -> Service:
    url = f"http://127.0.0.1:{port}"
    own = {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect/prefect.db",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_API_URL": f"{url}/api",
    }
    command = (executable("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port))
    return Service("prefect", command, url, answers(f"{url}/api/health"), {**shared, **own})


def _evidently(home: Path, port: int, shared: dict[str, str]) -> Service:
    url = f"http://127.0.0.1:{port}"
    workspace = str(home / "evidently")
    command = (executable("evidently"), "ui", "--host", "127.0.0.1", "--port", str(port), "--workspace", workspace)
    return Service("evidently", command, url, answers(f"{url}/api/version"), shared)


def _mlflow(home: Path, port: int, shared: dict[str, str]) -> Service:
    url = f"http://127.0.0.1:{port}"
    store, artifacts = f"sqlite:///{home}/mlflow/mlflow.db", str(home / "mlflow" / "artifacts")
    command = (
        executable("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--serve-artifacts", "--backend-store-uri", store, "--artifacts-destination", artifacts,
    )  # fmt: skip
    return Service(
        "mlflow", command, url, answers(f"{url}/health"), {**shared, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    )


def _ray(home: Path, port: int, shared: dict[str, str]) -> Service:
    # Ray puts Unix sockets below its folder, whose path must stay short.
    folder = home / "ray" if len(str(home)) < 40 else Path(tempfile.gettempdir()) / f"noria-ray-{port}"
    command = (
        executable("ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1",
        "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}", "--object-store-memory=500000000",
    )  # fmt: skip

    def ready() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return Service("ray", command, f"127.0.0.1:{port}", ready, shared)


def main() -> None:
    """Supervise the stack of NORIA_HOME until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # One line a health probe would bury what matters.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    site = Site.here()
    home = site.settings.root
    held = lock(home)
    if held is None:
        logging.info("another supervisor holds %s", home)
        return
    end_orphans(home)
    supervisor = Supervisor(site, services(site))
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stopping.set())
    signal.signal(signal.SIGINT, lambda *_: supervisor.stopping.set())
    supervisor.run()


if __name__ == "__main__":
    main()
