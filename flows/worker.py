"""Starts Prefect's process worker for noria's pool, after making the deployments that it is to run.

Run through the warm engine, which has imported the flows already; Prefect's worker then takes the process over.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from flows.schedule import POOL, crash_orphans, deploy
from flows.services import warm_socket
from flows.site import Site
from monitoring.publish import ensure_project
from noria.workload import load


def main() -> None:
    """Make the dashboards and the deployments, then become the worker."""
    site = Site.here()
    for path in site.settings.imports:
        ensure_project(load(path), site.settings.evidently)
    deploy(site.settings.imports, warm_socket(site.settings.root), Path.cwd())
    crash_orphans()
    # Prefect turns SIGTERM into SIGINT, which a shell's background job ignores.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    prefect = str(Path(sys.executable).with_name("prefect"))
    command = ["worker", "start", "--pool", POOL, "--type", "process", "--name", "noria", "--with-healthcheck"]
    os.execv(prefect, [prefect, *command])


if __name__ == "__main__":
    main()
