"""A step that is called again and again, in a thread of the server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

RETRY_SECONDS = 0.5

logger = logging.getLogger(__name__)


def repeat(step: Callable[[], float | None], seconds: float | None, stop: threading.Event) -> None:
    """Call `step` again and again, every so many seconds or (None) when it says; a failure is logged once while it
    lasts, and the next call tries again."""
    last, pause = "", seconds or RETRY_SECONDS
    while True:
        try:
            said = step()
            last, pause = "", seconds if seconds is not None else said or RETRY_SECONDS
        except Exception as error:
            pause = seconds or RETRY_SECONDS
            if str(error) != last:
                logger.exception("A step of the server failed; it is tried again.")
            last = str(error)
        if stop.wait(pause):
            return
