"""Who is measured: one line a peer. The servers themselves are the small files of `benchmarks/peers/`.

Not here: noria (`benchmarks.serving.subject`), and how a server is started, checked and pinned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving import bodies
from benchmarks.serving.bodies import Dialect

FILES = Path(__file__).resolve().parents[1] / "peers"
FLOOR, FASTEST = "asgi", "mosec"


@dataclass(frozen=True)
class Peer:
    """A server beside noria."""

    name: str
    environment: str
    command: tuple[str, ...]
    """Executable of its environment, then arguments; `{port}` is replaced."""
    path: str
    dialect: Dialect = bodies.V2
    variables: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    """What a reader must know: its processes, its batching."""


def _script(name: str) -> tuple[str, ...]:
    return ("python", str(FILES / f"serve_{name}.py"))


HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("asgi", "light", _script("asgi"), "/infer", note="the floor: bare ASGI, orjson, ORT; one process"),
        Peer("fastapi", "light", _script("fastapi"), "/infer", note="one process"),
        Peer("litserve", "light", _script("litserve"), "/predict", note="batches of 64, 1 ms; three processes"),
        Peer("mosec", "light", _script("mosec"), "/inference",
             note="batches of 64, 2 ms; a server in Rust and one worker process"),
        Peer("bentoml", "bentoml",
             ("bentoml", "serve", "serve_bentoml:Score", "--working-dir", str(FILES), "--host", "127.0.0.1",
              "--port", "{port}"), "/infer", bodies.BENTOML, {"BENTOML_DO_NOT_TRACK": "True"},
             note="adaptive batches of 64; three processes"),
        Peer("mlserver", "mlserver", _script("mlserver"), "/v2/models/small/infer",
             note="adaptive batches of 64, 1 ms; parallel_workers=0: one process"),
        Peer("kserve", "kserve", _script("kserve"), "/v2/models/small/infer", note="no batching of its own"),
        Peer("mlflow", "mlflow", _script("mlflow"), "/invocations", bodies.MLFLOW,
             {"MLFLOW_DISABLE_TELEMETRY": "true"}, note="no batching; one worker"),
        Peer("ray", "ray", _script("ray"), "/", variables={"RAY_SERVE_ENABLE_HA_PROXY": "0"},
             note="one replica, batches of 64, 1 ms; proxy, replica, controller, raylet, gcs on the one core"),
        Peer("ray-haproxy", "ray", _script("ray"), "/", variables=HAPROXY,
             note="the same behind HAProxy, throughput optimised"),
        Peer("pytriton", "pytriton", _script("pytriton"), "/v2/models/small/infer",
             note="dynamic batches of 64, 0.1 ms; Triton and a Python process"),
    )
}  # fmt: skip
