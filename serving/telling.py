"""What the server did with a version, on the version's tag, as soon as MLflow takes it. Not here: what was done."""

from __future__ import annotations

import logging
import threading

from noria.errors import AbsentError, RegistryError
from registry.store import Store

TAG = "noria.serving"

logger = logging.getLogger(__name__)


class Telling:
    """The sentences that are not written yet. Used by one thread."""

    def __init__(self, store: Store, stop: threading.Event) -> None:
        self.store, self.stop = store, stop
        self._unsaid: dict[tuple[str, int], str] = {}
        """By workload and version."""
        self._late: set[tuple[str, int]] = set()
        """Those of which the log says that they were not taken."""

    def report(self, workload: str, number: int, sentence: str) -> None:
        """Log it, and tag the version with the next `say`."""
        level = logging.ERROR if sentence.startswith("failed") else logging.INFO
        logger.log(level, "%s version %s %s", workload, number, sentence)
        self._unsaid[workload, number] = sentence[:4000]

    def say(self) -> None:
        """Write what is not written yet. After one that is not taken the rest waits, for MLflow may not answer at all;
        it is tried again after the others."""
        for key, sentence in list(self._unsaid.items()):
            if self.stop.is_set():
                return
            del self._unsaid[key]
            workload, number = key
            try:
                self.store.tag(self.store.get(workload, number), {TAG: sentence})
            except AbsentError as error:
                logger.warning("The tag %s is not set: %s", TAG, error)
            except RegistryError as error:
                self._unsaid[key] = sentence
                if key not in self._late:
                    logger.warning("The tag %s of %s version %s is not set yet: %s", TAG, workload, number, error)
                self._late.add(key)
                return
            self._late.discard(key)
