"""What the fleet reads and writes down: what is desired, what came of it, and how often. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serving import state
from serving.generation import Generation
from serving.state import Desired, State, now


class Ledger:
    """The files of one server's folder, on the side of the fleet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states, self.failures = folder / "state", folder / "failed"
        self._seen: object = None
        self._desired: dict[str, Desired] = {}
        self._workers: Sequence[Mapping[str, object]] = ()

    def desired(self) -> dict[str, Desired]:
        """What should serve, by workload; read again when a file of it was replaced."""
        mark = state.signature(self.folder / "desired")
        if mark != self._seen:
            self._desired = state.read(self.folder / "desired", Desired)
            self._seen = mark
        return self._desired

    def settled(self, entries: Mapping[str, Desired]) -> None:
        """These versions answer: write it down where that is new."""
        known, failures = state.read(self.states, State), state.read(self.failures, State)
        for workload, entry in entries.items():
            version = entry.version or 0
            before = known.get(workload)
            if before is not None and before.status != "serving":
                before = None
            if before is None or before.version != version or before.asked != entry.asked:
                self._serves(entry, before)
                if entry.asked and workload in failures and failures[workload].asked != entry.asked:
                    self._clear(failures[workload], version, before)

    def failed(self, entry: Desired, current: Generation, reason: str) -> None:
        """A version was refused."""
        serving = current.entries.get(entry.workload)
        version = serving.version if serving is not None else None
        refused = State(entry.workload, entry.version or 0, "failed", reason, now(), entry.asked, version)
        state.write(self.failures, refused)
        self._count(entry.workload, "failed")

    def gone(self, workload: str) -> None:
        """A workload is served no more, on purpose."""
        state.remove(self.states, workload)
        state.remove(self.failures, workload)

    def workers(self, described: Sequence[Mapping[str, object]]) -> bool:
        """Write down which processes there are, when that has changed; returns whether it had."""
        if described == self._workers:
            return False
        state.write_file(self.folder / "workers.json", described)
        self._workers = described
        return True

    def _serves(self, entry: Desired, before: State | None) -> None:
        version = entry.version or 0
        if before is not None and before.version == version:
            reached = replace(before, asked=entry.asked)
        else:
            replaced = before.version if before is not None else None
            reached = State(entry.workload, version, "serving", "", now(), entry.asked, replaced)
            self._count(entry.workload, "serving")
        state.write(self.states, reached)

    def _clear(self, failure: State, version: int, before: State | None) -> None:
        """A refusal is remembered until another version answers, or the refused one does after all."""
        if failure.version == version or before is None or before.version != version:
            state.remove(self.failures, failure.workload)

    def _count(self, workload: str, outcome: str) -> None:
        counts = state.swaps(self.folder)
        of_workload = counts.setdefault(workload, {})
        of_workload[outcome] = of_workload.get(outcome, 0) + 1
        state.write_file(self.folder / "swaps.json", counts)
