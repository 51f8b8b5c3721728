"""A process that is started before it is needed: it imports a module at a low priority, then runs its `main`.

    python -m serving.spare serving.worker --socket 3 ...

Importing takes longer than anything else that a worker does before it answers, and those that answer should not wait
for the processor meanwhile. A process cannot take its own niceness back, but on Linux each thread has one: a thread
imports and ends, and the main thread, which answers later, never had it. Not here: what it becomes.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from contextlib import suppress

NICE = 10
"""More than the process has. It leaves a tenth of a processor that somebody else wants all of."""


def main() -> None:
    """The process's entry point."""
    module = sys.argv.pop(1)
    importing = threading.Thread(target=_import, args=(module,))
    importing.start()
    importing.join()
    importlib.import_module(module).main()


def _import(module: str) -> None:
    if sys.platform == "linux":
        nice = os.getpriority(os.PRIO_PROCESS, 0) + NICE
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)  # of this thread alone; 19 is the most
    with suppress(Exception):  # `main` meets it again
        importlib.import_module(module)


if __name__ == "__main__":
    main()
