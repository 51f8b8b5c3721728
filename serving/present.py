"""The generation that answers, and its workers: as many as were asked for, whatever dies.

A worker that dies is replaced. A version that served and cannot be loaded any more is left out, for its fallback or for
nothing, and the others go on. Not here: how the next generation comes about (`serving.fleet`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from serving.backlog import Backlog
from serving.everywhere import Everywhere
from serving.generation import Generation, numbers, write
from serving.ledger import Ledger
from serving.pool import Pool
from serving.state import Desired
from serving.supervise import Failure, Plan, Worker

STEADY_SECONDS = 5
"""A worker that lived this long is replaced at once; one that did not waits, longer each time."""
LONGEST_WAIT = 5.0
SLOW = 0.5
"""Of the time that a version may take to load: one that takes longer is not waited for at a start once another one is
asked for."""
TRIES = 3
"""Before a version, or a change, is given up that may not be what failed."""

logger = logging.getLogger(__name__)


class Present:
    """Keeps the workers of the present generation. Used by one thread."""

    def __init__(self, plan: Plan, count: int) -> None:
        self.count, self.folder = count, plan.folder
        self.ledger, self.pool, self.everywhere = Ledger(plan.folder), Pool(plan), Everywhere(plan.folder)
        self.backlog = Backlog(self.ledger)
        self._number = max(numbers(self.folder), default=0)
        self.generation = self.backlog.first(self.next_number())
        self.members: list[Worker] = []
        """Its workers."""
        self.old: list[Worker] = []
        """Workers of earlier generations, which answer until every one of this does."""
        self._faults: Counter[str] = Counter()
        """How many workers in a row ended while they loaded a version that served, by workload; "": any version."""
        self._start_at = self._wait = 0.0
        self._slow = SLOW * plan.load_seconds

    @property
    def accepts(self) -> bool:
        """Whether any of its workers does."""
        return any(worker.phase == "accepting" for worker in self.members)

    @property
    def settled(self) -> bool:
        """Whether all of its workers accept, and no earlier one does."""
        return not self.old and all(worker.phase == "accepting" for worker in self.members)

    def keep(self) -> None:
        """Replace what died, let those that have loaded answer, and end the earlier ones when all do."""
        for worker in [worker for worker in self.members if worker.failure is not None]:
            if worker in self.members:  # others may go with the one before
                self._lost(worker, worker.failure or Failure(""))
        for worker in [worker for worker in self.old if worker.failure is not None]:
            worker.close()
            self.old.remove(worker)
        if not any(worker.answers for worker in [*self.members, *self.old]):
            self._pass_over()
        if len(self.members) < self.count and time.monotonic() >= self._start_at:
            self._fill()
        for worker in self.members:
            if worker.phase == "loaded":
                self._go(worker)
        if self.old and sum(worker.phase == "accepting" for worker in self.members) == self.count:
            for worker in self.old:
                self.pool.retire(worker)
            self.old = []

    def follow(self, generation: Generation, members: Sequence[Worker]) -> None:
        """Another generation is the present one; these workers have loaded it."""
        for worker in self.members:
            if worker.phase == "accepting":
                self.old.append(worker)
            else:
                self.pool.retire(worker)
        self.generation, self.members = generation, list(members)
        self.keep()

    def say_ready(self, *joining: Worker) -> bool:
        """Every worker that may be asked knows these models; `joining` ones are about to accept. Returns whether they
        may."""
        answering = [one for one in [*self.members, *self.old, *self.pool.leaving] if one.answers]
        return self.everywhere.say({one.generation for one in [*answering, *joining]})

    def start(self, generation: Generation) -> Worker:
        """A worker that loads it."""
        self.everywhere.made(generation)
        return self.pool.start(generation.number, write(self.folder, generation))

    def next_number(self) -> int:
        """The number of another generation."""
        self._number += 1
        return self._number

    def blame(self, workload: str, reason: str) -> None:
        """A generation that still has its version could not be loaded, for that version: leave it out after some."""
        if self._fault(workload, self.count):
            self._leave_out(workload, reason)

    def _pass_over(self) -> None:
        """Nothing new is tried before a worker accepts: what hangs and is asked for no more must not prevent it."""
        for workload in [name for name, seconds in (one.loading for one in self.members) if seconds > self._slow]:
            entry, wanted = self.generation.entries.get(workload), self.ledger.desired().get(workload)
            if entry is not None and entry.asked and (wanted is None or not wanted.same_as(entry)):
                reason = f"Version {entry.version} of {workload} is not asked for any more, and takes long to load."
                logger.warning("%s", reason)
                self._leave_out(workload, reason)

    def _fill(self) -> None:
        """Start the workers that lack. All are of one generation in the end: those that answer with an earlier one do
        so until the new ones do."""
        generation, lost = loadable(self.generation)
        if lost:
            self.generation = replace(generation, number=self.next_number())
            self._end_loading()
            self.give_up(lost)
        self.old += [worker for worker in self.members if worker.generation != self.generation.number]
        self.members = [worker for worker in self.members if worker.generation == self.generation.number]
        while len(self.members) < self.count:
            self.members.append(self.start(self.generation))

    def _go(self, worker: Worker) -> None:
        self._faults.clear()
        if not self.say_ready(worker):
            return
        self.ledger.settled(self.generation.entries)
        worker.go()
        logger.info("Generation %d answers: worker %d was ready after %.2f s with %d MB.", worker.generation,
                    worker.pid, worker.seconds, worker.memory_mb)  # fmt: skip

    def _lost(self, worker: Worker, failure: Failure) -> None:
        """A worker died, or cannot load what it should. It is started again, unless a version is to blame for it."""
        self.members.remove(worker)
        worker.close()
        logger.error("%s", failure.reason)
        if failure.workload in self.generation.entries:
            if self._fault(failure.workload, 1) or failure.said:
                self._leave_out(failure.workload, failure.reason)
                return
        elif worker.phase == "loading" and self._fault("", 1):
            self._go_back()
        self._wait = 0.0 if worker.lived > STEADY_SECONDS else min(LONGEST_WAIT, self._wait * 2 + 0.2)
        self._start_at = time.monotonic() + self._wait

    def _fault(self, workload: str, workers: int) -> bool:
        """So many more workers ended while they loaded it; returns whether it must be the version. Each of the workers
        may have met the same, so a try is one of all of them."""
        self._faults[workload] += workers
        return self._faults[workload] >= TRIES * self.count

    def _leave_out(self, workload: str, reason: str) -> None:
        """A version that served cannot be loaded any more: go on with its fallback, or without it."""
        self._say_failed(self.generation.entries[workload], reason)
        del self._faults[workload]
        self.generation = self.generation.without(self.next_number(), workload)
        self._end_loading()

    def give_up(self, lost: Sequence[Desired]) -> None:
        """These models are served no more: their files are not there."""
        for entry in lost:
            reason = f"Version {entry.version} of {entry.workload} cannot be loaded: {_file(entry)} is not there."
            logger.error("%s", reason)
            self._say_failed(entry, reason)

    def _say_failed(self, entry: Desired, reason: str) -> None:
        """Only of a version that is asked for: whoever asked waits for what came of just that, and it would be
        overwritten by what came of its fallback."""
        wanted = self.ledger.desired().get(entry.workload)
        if wanted is None:
            self.ledger.gone(entry.workload)
        elif wanted.asked == entry.asked:
            self.ledger.failed(entry, self.generation, reason)

    def _go_back(self) -> None:
        """Workers end before they say what they load: any version may be to blame that did not answer before."""
        proven = self.backlog.proven(self.generation, self.next_number())
        if proven is not None:
            self.generation = proven
            self._end_loading()
        self._faults.clear()

    def _end_loading(self) -> None:
        for worker in [worker for worker in self.members if worker.phase == "loading"]:
            self.members.remove(worker)
            worker.kill()


def loadable(generation: Generation, besides: Collection[str] = ()) -> tuple[Generation, list[Desired]]:
    """What is left of a generation without the models of a repository whose files are not there, and these models: a
    folder that is away would cost a process for each. `besides`: workloads that are left as they are."""
    lost: dict[str, Desired] = {}
    while absent := [
        name
        for name, entry in generation.entries.items()
        if entry.plain and name not in besides and not _file(entry).exists()
    ]:
        for name in absent:
            lost.setdefault(name, generation.entries[name])
            generation = generation.without(generation.number, name)
    return generation, list(lost.values())


def _file(entry: Desired) -> Path:
    return Path(entry.folder) / "model.onnx"
