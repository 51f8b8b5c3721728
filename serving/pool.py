"""Worker processes that do not answer: the spare that waits for the next swap, and those that were told to end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from serving.supervise import Plan, Worker

END_SECONDS = 15
"""A worker that was told to end and did not is killed after this long."""
SPARE_WAIT = 5.0
"""Before another spare is started when one died."""

logger = logging.getLogger(__name__)


class Pool:
    """Starts and ends workers. Used by one thread."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.leaving: list[Worker] = []
        self._spare: Worker | None = None
        self._spare_at = 0.0

    def all(self) -> list[Worker]:
        """Every process that is here."""
        return [*self.leaving, *([self._spare] if self._spare else [])]

    def start(self, generation: int, path: Path) -> Worker:
        """A worker that loads the generation in a file: the spare one, if there is one that has imported everything."""
        worker = self._take_spare() or Worker(self.plan)
        worker.load(generation, path)
        return worker

    def _take_spare(self) -> Worker | None:
        spare = self._spare
        if spare is None:
            return None
        spare.look()
        if not spare.imported or spare.failure is not None:
            return None  # where the processor is wanted, importing at a low priority may take long
        self._spare = None
        return spare

    def keep_spare(self) -> None:
        """One process that has imported everything waits for the next swap: most of a start is importing."""
        if self._spare is not None:
            self._spare.look()
            if self._spare.failure is not None:
                logger.error("The spare worker is started again. %s", self._spare.failure.reason)
                self._spare.close()
                self._spare, self._spare_at = None, time.monotonic() + SPARE_WAIT
        elif time.monotonic() >= self._spare_at:
            try:
                self._spare = Worker(self.plan, ahead=True)
            except OSError as error:  # those that answer go on without it
                logger.error("No spare worker can be started (%s); it is tried again.", error)
                self._spare_at = time.monotonic() + SPARE_WAIT

    def retire(self, worker: Worker) -> None:
        """Let a worker that answers finish what it has; end any other one now."""
        if worker.phase in ("opening", "accepting"):
            worker.retire()
            self.leaving.append(worker)
        else:
            worker.kill()

    def end_leaving(self) -> None:
        """See to it that those which were told to end do."""
        for worker in list(self.leaving):
            worker.look()
            if not worker.ended and worker.leaving > END_SECONDS:
                logger.error("Worker %d does not end; killing it.", worker.pid)
                worker.kill()
            if worker.ended:
                worker.close()
                self.leaving.remove(worker)

    def stop(self) -> None:
        """End the spare, and wait for those that were told to end."""
        if self._spare is not None:
            self._spare.kill()
            self._spare = None
        while self.leaving:
            self.end_leaving()
            time.sleep(0.02)
