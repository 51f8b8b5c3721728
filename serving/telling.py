"""What the server did with a version, on the version's tag, and the way back from it, as soon as MLflow takes that.

Not here: what was done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from noria.errors import AbsentError, RegistryError
from registry.aliases import keep_previous
from registry.store import Store

TAG = "noria.serving"

logger = logging.getLogger(__name__)


class Telling:
    """What is not written yet. Used by one thread."""

    def __init__(self, store: Store, stop: threading.Event) -> None:
        self.store, self.stop = store, stop
        self._owed: dict[tuple[str, int | None], Callable[[], None]] = {}
        """By workload and version its tag, by workload and None the alias `previous`."""
        self._late: set[tuple[str, int | None]] = set()
        """Those of which the log says that they were not taken."""

    def report(self, workload: str, number: int, sentence: str) -> None:
        """Log it, and tag the version with the next `say`."""
        level = logging.ERROR if sentence.startswith("failed") else logging.INFO
        logger.log(level, "%s version %s %s", workload, number, sentence)
        self._owed[workload, number] = partial(self._tag, workload, number, sentence[:4000])

    def withdraw(self, workload: str, number: int) -> None:
        """What was reported of a version is not told any more, where it was not yet."""
        self._owed.pop((workload, number), None)

    def lead_back(self, workload: str, champion: int, previous: int | None, replaced: int) -> None:
        """Have the alias `previous` name what the champion replaced (`registry.aliases.keep_previous`)."""
        self._owed[workload, None] = partial(keep_previous, self.store, workload, champion, previous, replaced)

    def say(self) -> None:
        """Write what is not written yet. After one that is not taken the rest waits, for MLflow may not answer at all;
        it is tried again after the others."""
        for key, write in list(self._owed.items()):
            if self.stop.is_set():
                return
            del self._owed[key]
            workload, number = key
            what = f"alias previous of {workload}" if number is None else f"tag {TAG} of {workload} version {number}"
            try:
                write()
            except AbsentError as error:
                logger.warning("The %s is not set: %s", what, error)
            except RegistryError as error:
                self._owed[key] = write
                if key not in self._late:
                    logger.warning("The %s is not set yet: %s", what, error)
                self._late.add(key)
                return
            self._late.discard(key)

    def _tag(self, workload: str, number: int, sentence: str) -> None:
        self.store.tag(self.store.get(workload, number), {TAG: sentence})
