"""The changes that wait: what is desired and does not serve yet, when each is tried, and which ones are tried together.

Not here: the processes that try them, and what follows when they fail (`serving.fleet`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from serving import state
from serving.generation import Generation
from serving.ledger import Ledger
from serving.state import Desired, State

LONGEST_HOLD = 30.0
"""Between two tries of a change that failed without a fault of its own."""


@dataclass
class Held:
    """A change that waits until it is tried again."""

    asked: str
    tries: int = 0
    until: float = 0.0


class Backlog:
    """What is desired, less what serves and what was refused. Used by one thread."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._tried: dict[str, str] = {}
        """By workload, the request that was acted on last."""
        self._held: dict[str, Held] = {}

    def first(self, number: int) -> Generation:
        """What the first workers load: what answered before, by `state/`. Anything else may hang or crash, so that its
        fallback answers until it is tried as a change. Where nothing answered before there is nothing to wait with."""
        desired = self.ledger.desired()
        wanted = Generation(number, {name: entry for name, entry in desired.items() if entry.version is not None})
        first = wanted
        for name in self._unproven(wanted):
            first = first.without(number, name)
        first = first if first.entries else wanted
        self._tried = {name: entry.asked for name, entry in desired.items() if first.entries.get(name) == entry}
        return first

    def proven(self, generation: Generation, number: int) -> Generation | None:
        """What is left of it when only what answered before is loaded; the rest is tried as changes. None: all of it
        did."""
        unproven = self._unproven(generation)
        if not unproven:
            return None
        for name in unproven:
            self._tried.pop(name, None)
        entries = {name: entry for name, entry in generation.entries.items() if name not in unproven}
        return Generation(number, entries, (*generation.missing, *unproven))

    def _unproven(self, generation: Generation) -> list[str]:
        """Workloads whose version there is not known to have answered."""
        reached = state.read(self.ledger.states, State)
        return [name for name, entry in generation.entries.items() if not _answered(entry, reached.get(name))]

    def next(self, current: Generation, busy: Collection[str]) -> list[Desired]:
        """The changes to try now, without those of `busy` workloads. Models of a repository share a generation, for
        many may come at once; but what has failed is tried by itself. What should go, goes with any other change: its
        files may be gone already, and then no generation that still has it can be loaded."""
        waiting, due = self._due(current, busy)
        if not due:
            return []
        going = [change for change in waiting if change.version is None]
        together = [change for change in due if self._shares(change)]
        coming = together if due[0] in together else due[:1]
        return [*going, *(change for change in coming if change not in going)]

    def with_waiting(self, changes: Sequence[Desired], current: Generation, busy: Collection[str]) -> list[Desired]:
        """Changes that are tried anew, and what waits and may share their generation."""
        if not all(map(self._shares, changes)):
            return list(changes)
        return [*changes, *filter(self._shares, self._due(current, busy)[1])]

    def pending(self, change: Desired) -> bool:
        """Whether the request was not acted on yet."""
        return self._tried.get(change.workload) != change.asked

    def served(self, change: Desired) -> None:
        """It answers."""
        self._tried[change.workload] = change.asked
        self._held.pop(change.workload, None)

    def refused(self, change: Desired) -> None:
        """It is not tried again."""
        self._tried[change.workload] = change.asked

    def set_apart(self, workload: str) -> None:
        """It changed again before it was served: its next version is tried by itself, after what waits longer."""
        self._held.setdefault(workload, Held(""))

    def hold(self, change: Desired) -> int:
        """It was tried in vain, and is tried again later, each time later; returns how often that was."""
        held = self._held[change.workload] = self._of(change)
        held.tries += 1
        held.until = time.monotonic() + min(LONGEST_HOLD, 0.5 * 2**held.tries)
        return held.tries

    def forget(self, current: Generation) -> None:
        """What is gone is forgotten: when it comes back as it was, that is a change."""
        for workload in self._tried.keys() - self.ledger.desired().keys() - current.entries.keys():
            del self._tried[workload]
            self._held.pop(workload, None)

    def _of(self, change: Desired) -> Held:
        held = self._held.get(change.workload)
        return held if held is not None and held.asked == change.asked else Held(change.asked)

    def _shares(self, change: Desired) -> bool:
        return change.plain and change.workload not in self._held

    def _due(self, current: Generation, busy: Collection[str]) -> tuple[list[Desired], list[Desired]]:
        """All changes that wait, and those of them that may be tried now: first what was not tried before."""
        clock = time.monotonic()
        waiting = [one for one in self._waiting(current) if one.workload not in busy]
        due = [one for one in waiting if self._of(one).until <= clock]
        return waiting, sorted(due, key=lambda one: one.workload in self._held)

    def _waiting(self, current: Generation) -> Iterator[Desired]:
        """What is desired and was not tried yet; no version: the workload should go."""
        desired = self.ledger.desired()
        for workload, entry in desired.items():
            if self.pending(entry) and (entry.version is not None or workload in current.entries):
                yield entry
        for workload in current.entries.keys() - desired.keys():
            yield Desired(workload, None, plain=current.entries[workload].plain)


def _answered(entry: Desired, reached: State | None) -> bool:
    """Whether `state/` names it as serving; of a fallback it knows the version only."""
    if reached is None or (reached.status, reached.version) != ("serving", entry.version):
        return False
    return entry.asked in ("", reached.asked)
