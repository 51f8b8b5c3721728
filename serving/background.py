"""The parent's slow half: the log into the lake, the aliases, the shadow. Imports Delta Lake and MLflow.

Not here: the workers (`serving.fleet`), which answer before this module is imported.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from noria.settings import Settings
from registry.store import Store
from serving.drain import Drain
from serving.reconcile import Reconciler
from serving.repeat import repeat
from serving.shadowing import LOOK_SECONDS as SHADOW_SECONDS
from serving.shadowing import Shadowing

DRAIN_SECONDS = 0.3
GATHER_SECONDS, MANY_ROWS = 2.0, 500
"""Between two steps of the drain, where the last one moved so many rows: a commit costs the same for few and many."""
LAST_DRAIN_SECONDS = 60
NICE = 19
"""The drain gives way to the workers: a segment may wait, a request may not."""

logger = logging.getLogger(__name__)


def run(settings: Settings, mlflow_url: str, stop: threading.Event, ended: threading.Event) -> None:
    """Repeat everything until `stop` is set; after `ended`, bring the rest of the log into the lake."""
    shadowing = Shadowing(Store(mlflow_url), settings.bundles, settings.serving) if mlflow_url else None
    drain = Drain(settings.serving / "log", str(settings.lake), *([shadowing.feed.offer] if shadowing else []))
    threads = [threading.Thread(target=_drain, args=(drain, stop), name="drain")]
    if shadowing:
        reconciler = Reconciler(Store(mlflow_url), settings.bundles, settings.serving)
        followed = ((reconciler.step, settings.poll_seconds), (shadowing.step, SHADOW_SECONDS))
        threads += [threading.Thread(target=repeat, args=(step, every, stop)) for step, every in followed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended.wait()
    if shadowing:
        shadowing.stop()
    _drain_rest(drain)


def _drain(drain: Drain, stop: threading.Event) -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # of this thread alone
    repeat(lambda: paced(drain), None, stop)


def paced(drain: Drain) -> float:
    """Step once; returns the seconds until the next step."""
    return DRAIN_SECONDS if drain.step() < MANY_ROWS else GATHER_SECONDS


def _drain_rest(drain: Drain) -> None:
    """What the worker handed over when it ended. What does not reach the lake now does at the next start."""
    deadline = time.monotonic() + LAST_DRAIN_SECONDS
    while time.monotonic() < deadline:
        try:
            drain.step()
            if not drain.failing:
                return
        except Exception:
            logger.exception("The last log rows do not reach the lake; trying again.")
        time.sleep(1)
