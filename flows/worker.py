"""Starts Prefect's process worker for noria's pool, after making the deployments that it is to run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows.schedule import POOL, deploy
from flows.site import Site


def main() -> None:
    """Deploy, then become the worker."""
    site = Site.here()
    deploy(site.settings.imports, Path(sys.argv[1]), Path.cwd())
    prefect = str(Path(sys.executable).with_name("prefect"))
    os.execv(prefect, [prefect, "worker", "start", "--pool", POOL, "--type", "process", "--name", "noria"])


if __name__ == "__main__":
    main()
