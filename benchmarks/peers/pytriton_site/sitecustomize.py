"""Only for PyTriton: the Python inside its stub lacks a method that newer standard libraries of the same minor call."""

import _thread
import threading
from multiprocessing import resource_tracker

if not hasattr(_thread.RLock, "_recursion_count"):
    resource_tracker._resource_tracker._lock = threading._PyRLock()
