"""The workers of one server: as many as were asked for, of the generation that should answer, whatever dies.

What `desired/` asks for is made real one workload at a time, or several models of a repository at once: fresh processes
load the next generation while the present one answers; when all of them have proven it they accept, and the present
ones finish what they have and end. A version that fails, hangs, crashes or eats memory while it loads is refused and
nothing else changes. When workers start anew and a version cannot be loaded any more, its fallback serves. Not here:
why something is desired.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from serving.everywhere import Everywhere
from serving.generation import Generation, numbers, prune, write
from serving.ledger import Ledger
from serving.metrics import Metrics
from serving.pool import Pool
from serving.state import Desired
from serving.supervise import Failure, Plan, Worker

STEADY_SECONDS = 5
"""A worker that lived this long is replaced at once; one that did not waits, longer each time."""
LONGEST_WAIT = 5.0
LONGEST_HOLD = 30.0
"""Between two tries of a change that failed without a fault of its own."""
TRIES = 3
PATIENCE_SECONDS = 3
"""How long a change has the machine for itself before the next one is tried beside it."""

logger = logging.getLogger(__name__)


@dataclass
class Candidate:
    """Workers that load the next generation."""

    generation: Generation
    changes: Sequence[Desired]
    base: int
    """The generation that it was made from."""
    members: list[Worker]
    began: float


@dataclass
class Held:
    """A change that waits until it is tried again."""

    asked: str
    tries: int = 0
    until: float = 0.0


class Fleet:
    """Starts, watches, replaces and ends workers. Used by one thread."""

    def __init__(self, plan: Plan, count: int = 1, metrics: Metrics | None = None) -> None:
        self.plan, self.count, self.metrics = plan, count, metrics or Metrics()
        self.sources: frozenset[str] = frozenset()
        """Names of the processes that may still write; replaced at each step, so another thread may read it."""
        self.folder = plan.folder
        self.ledger, self.pool, self.everywhere = Ledger(plan.folder), Pool(plan), Everywhere(plan.folder)
        self._number = max(numbers(self.folder), default=0)
        desired = self.ledger.desired()
        entries = {name: entry for name, entry in desired.items() if entry.version is not None}
        self.current = Generation(self._next(), entries)
        self.members: list[Worker] = []
        """Workers of the present generation."""
        self._old: list[Worker] = []
        """Workers of the generation before, which answer until every new one does."""
        self._candidates: list[Candidate] = []
        self._tried = {name: entry.asked for name, entry in desired.items()}
        self._held: dict[str, Held] = {}
        self._faults: Counter[tuple[str, int | None]] = Counter()
        self._start_at = self._wait = 0.0

    def step(self) -> float:
        """Look at everything once; returns the seconds after which to look again."""
        loading = [worker for candidate in self._candidates for worker in candidate.members]
        for worker in [*self.members, *self._old, *loading]:
            worker.look()
        self.pool.end_leaving()
        self._keep_members()
        for candidate in list(self._candidates):
            self._judge(candidate)
        if any(worker.phase == "accepting" for worker in self.members):
            self._begin()
        busy = self._busy()
        if not busy:
            self.pool.keep_spare()
        loading = [worker for candidate in self._candidates for worker in candidate.members]
        said = [worker.describe() for worker in [*self.members, *self._old, *loading, *self.pool.leaving]]
        self._say_ready()
        self.sources = frozenset(one.source for one in [*self.members, *self._old, *loading, *self.pool.all()])
        if self.ledger.workers(said):
            prune(self.folder, self._needed())
        return 0.02 if busy or self.pool.leaving else 0.1

    def stop(self) -> None:
        """End every worker; those that answer finish what they have."""
        self.plan.listener.close()
        for candidate in list(self._candidates):
            self._drop(candidate)
        for worker in [*self.members, *self._old]:
            self.pool.retire(worker)
        self.pool.stop()

    # The present generation

    def _keep_members(self) -> None:
        for worker in [worker for worker in self.members if worker.failure is not None]:
            if worker in self.members:  # others may go with the one before
                self._lost(worker, worker.failure or Failure(""))
        for worker in [worker for worker in self._old if worker.failure is not None]:
            worker.close()
            self._old.remove(worker)
        while len(self.members) < self.count and time.monotonic() >= self._start_at:
            self.members.append(self._start(self.current))
        for worker in self.members:
            if worker.phase == "loaded":
                self._go(worker)
        if self._old and sum(worker.phase == "accepting" for worker in self.members) == self.count:
            for worker in self._old:
                self.pool.retire(worker)
            self._old = []

    def _go(self, worker: Worker) -> None:
        if not self._say_ready(worker):
            return
        self.ledger.settled(self.current.entries)
        worker.go()
        logger.info("Generation %d answers: worker %d was ready after %.2f s with %d MB.", worker.generation,
                    worker.pid, worker.seconds, worker.memory_mb)  # fmt: skip

    def _say_ready(self, *joining: Worker) -> bool:
        """Every worker that may be asked knows these models; `joining` ones are about to accept."""
        answering = [one for one in [*self.members, *self._old, *self.pool.leaving] if one.answers]
        return self.everywhere.say({one.generation for one in [*answering, *joining]})

    def _lost(self, worker: Worker, failure: Failure) -> None:
        """A worker of the present generation died, or cannot load it."""
        self.members.remove(worker)
        worker.close()
        logger.error("%s", failure.reason)
        if failure.workload in self.current.entries:
            self._leave_out(failure.workload, failure.reason)
            return
        self._wait = 0.0 if worker.lived > STEADY_SECONDS else min(LONGEST_WAIT, self._wait * 2 + 0.2)
        self._start_at = time.monotonic() + self._wait

    def _leave_out(self, workload: str, reason: str) -> None:
        """A version that served cannot be loaded any more: go on with its fallback, or without it."""
        if workload in self.ledger.desired():
            self.ledger.failed(self.current.entries[workload], self.current, reason)
        else:
            self.ledger.gone(workload)
        self.current = self.current.without(self._next(), workload)
        for worker in [worker for worker in self.members if worker.phase == "loading"]:
            self.members.remove(worker)
            worker.kill()

    # The next one

    def _begin(self) -> None:
        """Start the next change that waits, if the machine is free for it. Models of a repository share a generation,
        for many may come at once; but what has failed is tried by itself. What should go, goes with any other change:
        its files may be gone already, and then no generation that still has it can be loaded."""
        clock = time.monotonic()
        if any(clock - candidate.began < PATIENCE_SECONDS for candidate in self._candidates):
            return
        busy = {change.workload for candidate in self._candidates for change in candidate.changes}
        waiting = [one for one in self._changes() if one.workload not in busy]
        due = [one for one in waiting if self._hold(one).until <= clock]
        if not due:
            return
        going = [change for change in waiting if change.version is None]
        together = [change for change in due if change.plain and change.workload not in self._held]
        coming = together if due[0] in together else due[:1]
        self._try([*going, *(change for change in coming if change not in going)])

    def _hold(self, change: Desired) -> Held:
        held = self._held.get(change.workload)
        return held if held is not None and held.asked == change.asked else Held(change.asked)

    def _changes(self) -> Iterator[Desired]:
        """What is desired and was not tried yet; no version: the workload should go."""
        desired = self.ledger.desired()
        for workload, entry in desired.items():
            if self._tried.get(workload) == entry.asked:
                continue
            serving = self.current.entries.get(workload)
            if entry.version is None and serving is None:
                self._tried[workload] = entry.asked
            elif serving is not None and _same(serving, entry):
                self.current = replace(self.current, entries={**self.current.entries, workload: entry})
                self._tried[workload] = entry.asked
                self.ledger.settled(self.current.entries)
            else:
                yield entry
        for workload in self.current.entries.keys() - desired.keys():
            yield Desired(workload, None, plain=self.current.entries[workload].plain)

    def _try(self, changes: Sequence[Desired]) -> None:
        generation, number = self.current, self._next()
        for change in changes:
            generation = generation.changed(number, change.workload, None if change.version is None else change)
        members = [self._start(generation) for _ in range(self.count)]
        self._candidates.append(Candidate(generation, changes, self.current.number, members, time.monotonic()))

    def _judge(self, candidate: Candidate) -> None:
        """Promote it, refuse it, or let it go on loading."""
        desired, changes = self.ledger.desired(), candidate.changes
        wanted = [desired.get(change.workload, Desired(change.workload, None)).asked for change in changes]
        failed = next((worker.failure for worker in candidate.members if worker.failure is not None), None)
        if wanted != [change.asked for change in changes]:
            self._drop(candidate)
        elif failed is not None:
            self._drop(candidate)
            self._refuse(changes, failed)
        elif all(worker.phase == "loaded" for worker in candidate.members):
            if candidate.base == self.current.number:
                self._promote(candidate)
            else:  # another workload changed meanwhile
                self._drop(candidate)
                self._try(changes)

    def _promote(self, candidate: Candidate) -> None:
        self._candidates.remove(candidate)
        for change in candidate.changes:
            self._tried[change.workload] = change.asked
            self._held.pop(change.workload, None)
            self.metrics.swapped(change.workload, "serving", time.monotonic() - candidate.began)
        for worker in self.members:
            if worker.phase == "accepting":
                self._old.append(worker)
            else:
                self.pool.retire(worker)
        self.current, self.members = candidate.generation, candidate.members
        self._keep_members()
        for change in candidate.changes:
            if change.version is None:
                self.ledger.gone(change.workload)

    def _refuse(self, changes: Sequence[Desired], failure: Failure) -> None:
        own = [change for change in changes if change.workload == failure.workload]
        for change in own or changes:
            workload = change.workload
            held = self._held[workload] = self._hold(change)
            held.tries += 1
            if own or (not failure.workload and held.tries >= TRIES):
                self._tried[workload] = change.asked
                self.ledger.failed(change, self.current, failure.reason)
                self.metrics.swapped(workload, "failed")
            else:
                held.until = time.monotonic() + min(LONGEST_HOLD, 0.5 * 2**held.tries)
                what = "Removal" if change.version is None else f"Version {change.version}"
                logger.error("%s %s of %s is tried again.", failure.reason, what, workload)
        blamed = None if own else self.current.entries.get(failure.workload)
        if blamed is not None:  # it answers, but its files are not what they were
            self._faults[blamed.workload, blamed.version] += 1
            if self._faults[blamed.workload, blamed.version] < TRIES:
                self.ledger.failed(blamed, self.current, failure.reason)
            else:
                self._leave_out(blamed.workload, failure.reason)

    def _drop(self, candidate: Candidate) -> None:
        self._candidates.remove(candidate)
        for worker in candidate.members:
            worker.kill()

    # What its processes are

    def _start(self, generation: Generation) -> Worker:
        self.everywhere.made(generation)
        return self.pool.start(generation.number, write(self.folder, generation))

    def _busy(self) -> bool:
        settled = not self._old and all(worker.phase == "accepting" for worker in self.members)
        return bool(self._candidates) or not settled

    def _needed(self) -> set[int]:
        """Numbers of the generations that a process may still read."""
        return {self.current.number, *(candidate.generation.number for candidate in self._candidates)}

    def _next(self) -> int:
        self._number += 1
        return self._number


def _same(serving: Desired, entry: Desired) -> bool:
    """Whether what serves is what is asked for. A bundle never changes; a file of a repository may."""
    if serving.plain or entry.plain:
        return serving.asked == entry.asked and serving.folder == entry.folder
    return (serving.version, serving.folder) == (entry.version, entry.folder)
