"""The workers of one server: as many as were asked for, of the generation that should answer, whatever dies.

What `desired/` asks for is made real one workload at a time, or several models of a repository at once: fresh processes
load the next generation while the present one answers; when all of them have proven it they accept, and the present
ones finish what they have and end. A version that fails, hangs, crashes or eats memory while it loads is refused and
nothing else changes. Not here: why something is desired, in which order it is tried (`serving.backlog`), and what
happens when workers of the present generation die (`serving.present`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving.generation import Generation, prune
from serving.metrics import Metrics
from serving.present import TRIES, Present, loadable
from serving.state import Desired
from serving.supervise import Failure, Plan, Worker

MOST = 2
"""Candidates: each loads everything that is served, in as many processes as answer."""
PATIENCE_SECONDS = 3
"""How long a change has the machine for itself before the next one is tried beside it; each time that it had to begin
anew PATIENCE_GROWTH times as long, or one that takes long to load would never serve beside one that changes often."""
PATIENCE_GROWTH = 4.0
AWAY_SECONDS = 5
"""How long a change waits for files that are not there of models that answer: they may be back soon, or about to be
removed all together."""

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
    lost: Sequence[Desired]
    """Models that answer, and whose files were not there to be loaded."""
    restarts: int
    """How often these changes had to begin anew, because others went before them."""

    @property
    def alone_until(self) -> float:
        """When something else may be tried beside it."""
        return self.began + PATIENCE_SECONDS * PATIENCE_GROWTH**self.restarts


class Fleet:
    """Starts, watches, replaces and ends workers. Used by one thread."""

    def __init__(self, plan: Plan, count: int = 1, metrics: Metrics | None = None) -> None:
        self.plan, self.count, self.metrics = plan, count, metrics or Metrics()
        self.sources: frozenset[str] = frozenset()
        """Names of the processes that may still write; replaced at each step, so another thread may read it."""
        self.folder = plan.folder
        self.present = Present(plan, count)
        self.ledger, self.pool, self.backlog = self.present.ledger, self.present.pool, self.present.backlog
        self._candidates: list[Candidate] = []
        self._away: float | None = None
        """Since when a change waits for files that are not there."""

    @property
    def current(self) -> Generation:
        """The generation that should answer now."""
        return self.present.generation

    @property
    def members(self) -> list[Worker]:
        """Its workers."""
        return self.present.members

    def step(self) -> float:
        """Look at everything once; returns the seconds after which to look again."""
        for worker in self._watched():
            worker.look()
        self.pool.end_leaving()
        self.present.keep()
        self.backlog.forget(self.current)
        for candidate in list(self._candidates):
            self._judge(candidate)
        if self.present.accepts:
            self._settle()
            self._begin()
        busy = bool(self._candidates) or not self.present.settled
        if not busy:
            self.pool.keep_spare()
        said = [worker.describe() for worker in [*self._watched(), *self.pool.leaving]]
        self.present.say_ready()
        self.sources = frozenset(one.source for one in [*self._watched(), *self.pool.all()])
        if self.ledger.workers(said):
            prune(self.folder, {self.current.number, *(one.generation.number for one in self._candidates)})
        return 0.02 if busy or self.pool.leaving else 0.1

    def stop(self) -> None:
        """End every worker; those that answer finish what they have."""
        self.plan.listener.close()
        for candidate in list(self._candidates):
            self._drop(candidate)
        for worker in self._watched():
            self.pool.retire(worker)
        self.pool.stop()

    def _watched(self) -> list[Worker]:
        loading = [worker for candidate in self._candidates for worker in candidate.members]
        return [*self.members, *self.present.old, *loading]

    def _settle(self) -> None:
        """What is asked for and answers already needs no process."""
        entries, asked = self.current.entries, self.ledger.desired()
        same = {
            name: asked[name]
            for name, serving in entries.items()
            if name in asked and self.backlog.pending(asked[name]) and asked[name].same_as(serving)
        }
        if same:
            self.present.generation = replace(self.current, entries={**entries, **same})
            self.ledger.settled(self.current.entries)
            for entry in same.values():
                self.backlog.served(entry)

    def _begin(self) -> None:
        """Start the changes that come next, if the machine is free for them."""
        clock = time.monotonic()
        if len(self._candidates) >= MOST or any(clock < candidate.alone_until for candidate in self._candidates):
            return
        changes = self.backlog.next(self.current, self._busy())
        if not changes or not loadable(self.current, {change.workload for change in changes})[1]:
            self._away = None
        else:
            self._away = self._away or clock
        if changes and (self._away is None or clock - self._away >= AWAY_SECONDS):
            self._try(changes)

    def _busy(self) -> set[str]:
        return {change.workload for candidate in self._candidates for change in candidate.changes}

    def _try(self, changes: Sequence[Desired], restarts: int = 0) -> None:
        generation, number = self.current, self.present.next_number()
        for change in changes:
            generation = generation.changed(number, change.workload, None if change.version is None else change)
        generation, lost = loadable(generation, {change.workload for change in changes})
        members = self._start(generation)
        candidate = Candidate(generation, changes, self.current.number, members, time.monotonic(), lost, restarts)
        self._candidates.append(candidate)

    def _start(self, generation: Generation) -> list[Worker]:
        """All workers of a generation, or none. Raises OSError."""
        started: list[Worker] = []
        try:
            for _ in range(self.count):
                started.append(self.present.start(generation))
        except OSError:
            for worker in started:
                worker.kill()
            raise
        return started

    def _judge(self, candidate: Candidate) -> None:
        """Promote it, refuse it, or let it go on loading."""
        desired, changes = self.ledger.desired(), candidate.changes
        wanted = [one for one in changes if desired.get(one.workload, Desired(one.workload, None)).asked == one.asked]
        failed = next((worker.failure for worker in candidate.members if worker.failure is not None), None)
        if len(wanted) < len(changes):
            for change in changes:
                if change not in wanted:
                    self.backlog.set_apart(change.workload)
            self._again(candidate, wanted)
        elif failed is not None:
            self._drop(candidate)
            self._refuse(changes, failed)
        elif candidate.base != self.current.number:  # another workload changed meanwhile
            self._again(candidate, changes)
        elif all(worker.phase == "loaded" for worker in candidate.members):
            self._promote(candidate)

    def _again(self, candidate: Candidate, changes: Sequence[Desired]) -> None:
        """Begin anew with those changes of it that are still wanted, and with what waits and may share with them."""
        self._drop(candidate)
        if changes:
            busy = self._busy() | {change.workload for change in changes}
            self._try(self.backlog.with_waiting(changes, self.current, busy), candidate.restarts + 1)

    def _promote(self, candidate: Candidate) -> None:
        self._candidates.remove(candidate)
        loaded = {one.workload for one in (*candidate.changes, *candidate.lost)}
        # Of what did not change the same may have been asked for anew meanwhile, which made no other generation.
        entries = {
            name: entry if name in loaded else self.current.entries[name]
            for name, entry in candidate.generation.entries.items()
        }
        for change in candidate.changes:
            self.backlog.served(change)
            self.metrics.swapped(change.workload, "serving", time.monotonic() - candidate.began)
            if change.version is None:
                self.ledger.gone(change.workload)
        self.present.give_up(candidate.lost)
        self.present.follow(replace(candidate.generation, entries=entries), candidate.members)

    def _refuse(self, changes: Sequence[Desired], failure: Failure) -> None:
        own = [change for change in changes if change.workload == failure.workload]
        for change in own or changes:
            tries = self.backlog.hold(change)
            if own or (not failure.workload and tries >= TRIES):
                self.backlog.refused(change)
                self.ledger.failed(change, self.current, failure.reason)
                self.metrics.swapped(change.workload, "failed")
            else:
                what = "Removal" if change.version is None else f"Version {change.version}"
                logger.error("%s %s of %s is tried again.", failure.reason, what, change.workload)
        if failure.workload in self.current.entries and not own:  # it answers, but may not be loadable any more
            self.present.blame(failure.workload, failure.reason)

    def _drop(self, candidate: Candidate) -> None:
        self._candidates.remove(candidate)
        for worker in candidate.members:
            worker.kill()
