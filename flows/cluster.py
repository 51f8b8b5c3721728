"""`noria cluster`: the server on Ray, started and ended by one command. Starts a Ray of its own where none is known.

Not here: the application (`serving.cluster`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from flows.site import Site
from serving.cluster import Options, start, stop
from training.launch import connect, disconnect


def run(site: Site, options: Options, *, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `tell` hears the address once it answers. Ends Ray too if it was started here."""
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    connect(site.settings.ray_address or None, cpus=max(os.cpu_count() or 1, 2))
    try:
        tell(start(options, host, port))
        ending.wait()
        stop()
    finally:
        disconnect()
