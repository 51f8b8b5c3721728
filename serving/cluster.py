"""The server as an application of Ray Serve: replicas, autoscaling, limits, and one rollout that follows the aliases.

    serve.run(application(Options()))     from Python; in a manifest: the import path serving.cluster:application

Two deployments: `rollout` (one, speaks with MLflow) and `noria` (the replicas, which hold the ONNX sessions). An alias
change replaces models inside the replicas and changes nothing that Ray Serve knows of, so a manifest stays what it is.
The only module of this room that imports Ray. Not here: starting Ray (`flows.cluster`), HAProxy (`serving.ingress`).
"""

from __future__ import annotations

import time
from ipaddress import ip_address
from typing import Any, Literal
from urllib.request import urlopen

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve._private import replica as internals
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions, ProxyLocation
from ray.util import get_node_ip_address

from noria.errors import ServiceError, SettingsError
from noria.settings import load_settings
from serving.configure import configure
from serving.replica import Replica
from serving.rollout import Rollout

NAME = "noria"
REQUEST_SECONDS = 30.0
"""A request that took longer is answered with 408."""
KEEP_ALIVE_SECONDS = 5
GRACE_SECONDS = 30.0
"""How long a replica may finish what it is answering and hand over its log."""
RETRY_AFTER_SECONDS = 1.0
INGRESS_SECONDS = 60
"""How long the ingress may take to answer once the replicas run."""


class Options(BaseModel):
    """`args` of the application in a Serve config; what is empty comes from the environment (`noria.settings`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=2, ge=1)
    """Replicas, or the fewest where `most_replicas` is larger."""
    most_replicas: int = Field(default=0, ge=0)
    """Replicas at most under load; 0: no autoscaling."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs that each replica reserves on its node."""
    gpus: float = Field(default=0.0, ge=0)
    ongoing: int = Field(default=64, ge=1)
    """Requests that a replica works on at once; Ray's own default is 5."""
    target_ongoing: float = Field(default=16.0, gt=0)
    """Requests at once a replica that autoscaling aims at."""
    queued: int = Field(default=256, ge=0)
    """Requests that each proxy lets wait; past it 503 with Retry-After at once. Ray's own default has no bound."""
    mlflow_uri: str = ""
    home: str = ""
    """Folder on each node for the log, bundles and the rollout's state."""
    lake: str = ""
    """Where the prediction log goes: a folder that all nodes see, or a URI that deltalake can write to."""
    providers: Literal["", "auto", "cpu", "cuda", "tensorrt"] = ""
    host: str = "127.0.0.1"
    """What the ingress listens on: other than loopback needs keys (NORIA_API_KEYS), or `is_open`."""
    is_open: bool = False
    """Let other machines in without a key."""


def application(options: Options) -> Application:
    """What Ray Serve runs.

    Raises:
        SettingsError: there is no MLflow to follow, or others could reach a server that asks for no key.
    """
    settings = load_settings()
    mlflow_uri = options.mlflow_uri or settings.mlflow_uri
    if not mlflow_uri:
        raise SettingsError("The cluster follows MLflow's aliases and no address is known; set NORIA_MLFLOW_URI.")
    home, lake = options.home or str(settings.root), options.lake or str(settings.lake)
    rollout = serve.deployment(
        _on_own_address(Rollout),
        name="rollout",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
    ).bind(mlflow_uri, home, lake, poll_seconds=settings.poll_seconds, load_seconds=settings.load_seconds)
    replica = serve.deployment(
        serve.ingress()(_on_own_address(Replica)),
        name=NAME,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.queued,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_SECONDS),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=GRACE_SECONDS,
        logging_config={"enable_access_log": False},
        **_size(options),
    )
    config = configure(settings, options.host, is_open=options.is_open, workers=options.replicas)
    providers = options.providers or settings.providers
    return replica.bind(rollout, home, lake, config.to_json(), providers, load_seconds=settings.load_seconds)


def _on_own_address(kind: type[Any]) -> type[Any]:
    """The class, with Ray's internal port of its replicas on the address that Ray knows the node by.

    Every replica of Ray Serve has such a port, which unpickles whatever it is sent; Ray opens it on all interfaces and
    has no setting for it. On a Ray that listens on loopback it is on loopback then; between nodes use Ray's TLS.
    """

    # Local, so that it travels by value: a replica that imported this module would import MLflow with it.
    class OnOwnAddress(kind):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            listen, address = internals.add_port_to_grpc_server, get_node_ip_address()
            shown = f"[{address}]" if ":" in address else address
            internals.add_port_to_grpc_server = lambda server, at: listen(server, at.replace("[::]", shown))
            kind.__init__(self, *given, **named)

    return OnOwnAddress


def _size(options: Options) -> dict[str, object]:
    if options.most_replicas <= options.replicas:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=options.most_replicas,
            target_ongoing_requests=options.target_ongoing,
            upscale_delay_s=5,
            downscale_delay_s=120,
        )
    }


def start(options: Options, port: int = 8080) -> str:
    """Run the application on the Ray that this process is connected to; its address, once it answers.

    Raises:
        ServiceError: Ray Serve did not bring it up; SettingsError as `application` does.
    """
    app = application(options)
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(
            host=options.host, port=port, request_timeout_s=REQUEST_SECONDS, keep_alive_timeout_s=KEEP_ALIVE_SECONDS
        ),
    )
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        reason = " ".join(f"{error} {_said()}".split())[:1500]
        raise ServiceError(f"Ray Serve did not bring the application up: {reason}") from error
    url = f"http://{_reachable(options.host)}:{port}"
    _wait(f"{url}/v2/health/live")
    return url


def stop() -> None:
    """End the application and Ray Serve: requests in flight are finished, the log is handed over."""
    serve.delete(NAME)
    serve.shutdown()


def _wait(url: str) -> None:
    """Ray says that the application runs before its ingress answers. Raises ServiceError."""
    deadline = time.monotonic() + INGRESS_SECONDS
    while True:
        try:
            with urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServiceError(f"Ray's ingress does not answer at {url} ({error}); its logs tell more.") from None
        time.sleep(0.1)


def _said() -> str:
    """What Ray Serve says of the deployments that are not well."""
    app = serve.status().applications.get(NAME)
    return "; ".join(one.message for one in app.deployments.values() if one.message) if app else ""


def _reachable(host: str) -> str:
    """The host as a client of this machine writes it."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{host}]" if address.version == 6 else host
