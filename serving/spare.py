"""The start of a worker that nobody waits for: it imports everything with the lowest priority, then it is a worker.

Most of a start is importing, and the machine belongs to the workers that answer. Only importing gives way: a thread
does it, and its niceness ends with it, because an ordinary user cannot take niceness back from a process. Not here:
what a worker does (`serving.worker`).
"""

from __future__ import annotations

import importlib
import os
import sys
import threading

NICE = 19


def main() -> None:
    """The process's entry point; takes the arguments of `serving.worker`."""
    thread = threading.Thread(target=_import)
    thread.start()
    thread.join()
    importlib.import_module("serving.worker").main()


def _import() -> None:
    if sys.platform == "linux":  # elsewhere niceness belongs to the process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    importlib.import_module("serving.worker")


if __name__ == "__main__":
    main()
