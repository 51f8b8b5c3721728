"""`noria cluster`: the server on Ray, started and ended by one command. Starts a Ray of its own where none is known.

Not here: the application (`serving.cluster`), what HAProxy needs (`serving.ingress`).
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Annotated

import typer
from rich.console import Console

from flows.site import Site
from noria.errors import SettingsError
from noria.variables import export
from serving import ingress

out = Console()


def cluster(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas, or the fewest with --most.")] = 2,
    *,
    most: Annotated[int, typer.Option(min=0, help="Replicas at most under load; 0: no autoscaling.")] = 0,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs that each replica reserves.")] = 1.0,
    is_open: Annotated[bool, typer.Option("--open", help="Let other machines in without a key.")] = False,
    haproxy: Annotated[bool, typer.Option("--haproxy", help="HAProxy as ingress, on a Ray started here only.")] = False,
) -> None:
    """Answer requests from replicas on Ray: the one of NORIA_RAY_ADDRESS or of the stack, else one started here."""
    site = Site.here()
    mlflow_uri, home = site.address("mlflow_uri"), str(site.settings.root)
    if haproxy:
        _prepare_haproxy(site, host)
    # After that, because Ray reads the environment when it is imported.
    from serving.cluster import Options, start, stop
    from training.launch import connect, disconnect

    options = Options(
        replicas=replicas, most_replicas=most, cpus=cpus, mlflow_uri=mlflow_uri, home=home, host=host, is_open=is_open
    )
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    connect(site.settings.ray_address or None, cpus=max(os.cpu_count() or 1, 2))
    try:
        out.print(f"serving on [bold]{start(options, port)}[/]; ctrl-C ends it")
        ending.wait()
        stop()
    finally:
        disconnect()


def _prepare_haproxy(site: Site, host: str) -> None:
    """Complete the environment of the Ray that will be started. Raises SettingsError when one runs already."""
    if site.settings.ray_address:
        raise SettingsError(
            f"--haproxy needs variables in Ray's own environment, and {site.settings.ray_address} runs already; "
            "leave --haproxy out, or see deploy/README.md."
        )
    export(**ingress.variables(ingress.place(site.settings.root), host))
    out.print(f"[dim]{ingress.REMAINS}[/]", highlight=False)
