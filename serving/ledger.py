"""What the fleet reads and writes down: what is desired, what came of it, and how often. Nothing is decided here.

Only the fleet writes `state/`, `failed/` and `swaps.json`, so they are read once, at the start, and what is known here
is what counts. It is told to others and promised to nobody: what cannot be written of it now, because the disk is full,
is written at a later step, and neither a worker nor the rest waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serving import repository, state
from serving.generation import Generation
from serving.state import Desired, State, now

logger = logging.getLogger(__name__)


class Ledger:
    """The files of one server's folder, on the side of the fleet. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError or ServiceError when the files cannot be read."""
        self.folder = folder
        self.states, self.failures = folder / "state", folder / "failed"
        self._watched = state.Watched(folder / "desired")
        self._seen: object = None
        self._desired: dict[str, Desired] = {}
        reached = state.read(self.states, State)
        self._reached = {name: one for name, one in reached.items() if one.status == "serving"}
        self._refused = state.read(self.failures, State)
        self._counts = state.swaps(folder)
        self._answering: Mapping[str, Desired] = {}
        """What was said to answer last."""
        self._owed: dict[Path, None] = {}
        """Files that do not say yet what is known here, in the order in which that came about."""
        self._workers: Sequence[Mapping[str, object]] = ()
        self._trouble: str | None = None
        """Why something could not be written; said once while it lasts."""

    def desired(self) -> dict[str, Desired]:
        """What should serve, by workload; read again when a file of it was replaced. Raises OSError or ServiceError."""
        mark = [*self._watched.mark(), state.written(self.folder / "repository.json")]
        if mark != self._seen:
            self._desired = state.read(self.folder / "desired", Desired)
            self._forget_others()
            self._seen = mark
        return self._desired

    def settled(self, entries: Mapping[str, Desired]) -> None:
        """These versions answer: write it down where that is new."""
        self._answering = entries
        for entry in entries.values():
            self._serves(entry)
        self._write()

    def failed(self, entry: Desired, current: Generation, reason: str) -> None:
        """A version was refused."""
        serving = current.entries.get(entry.workload)
        version = serving.version if serving is not None else None
        refused = State(entry.workload, entry.version or 0, "failed", reason, now(), entry.asked, version)
        self._refused[entry.workload] = refused
        self._owe(self.failures, entry.workload)
        self._count(entry.workload, "failed")
        self._write()

    def gone(self, workload: str) -> None:
        """A workload is served no more, on purpose."""
        self._answering = {name: entry for name, entry in self._answering.items() if name != workload}
        self._forget(workload)
        self._write()

    def workers(self, described: Sequence[Mapping[str, object]]) -> bool:
        """Write down which processes there are, when that has changed; returns whether it had. Called at each step, so
        what an earlier one could not write is tried again first."""
        self._write()
        if described == self._workers:
            return False
        try:
            state.write_file(self.folder / "workers.json", described)
        except OSError as error:
            self._postpone(error)
            return False
        self._workers = described
        return True

    def _owe(self, folder: Path, workload: str) -> None:
        self._owed[folder / f"{workload}.json"] = None

    def _write(self) -> None:
        """Have the files say what is known. One that the disk does not take holds up no other."""
        owed, trouble = list(self._owed), None
        for path in owed:
            try:
                self._write_one(path)
                del self._owed[path]
            except OSError as error:
                trouble = trouble or error
        if trouble is not None:
            self._postpone(trouble)
        elif owed:
            self._trouble = None

    def _write_one(self, path: Path) -> None:
        if path.parent == self.folder:
            state.write_file(path, self._counts)
            return
        known = (self._refused if path.parent == self.failures else self._reached).get(path.stem)
        if known is None:
            state.remove(path.parent, path.stem)
        else:
            state.write(path.parent, known)

    def _serves(self, entry: Desired) -> None:
        workload, version, before = entry.workload, entry.version or 0, self._reached.get(entry.workload)
        if before is not None and (before.version, before.asked) == (version, entry.asked):
            return
        is_new = before is None or before.version != version
        failure = self._refused.get(workload)
        if failure is not None and entry.asked not in ("", failure.asked) and (is_new or failure.version == version):
            # A refusal is remembered until another version answers, or the refused one does after all.
            del self._refused[workload]
            self._owe(self.failures, workload)
        if before is None or is_new:
            replaced = before.version if before is not None else None
            reached = State(workload, version, "serving", "", now(), entry.asked, replaced)
        else:
            reached = replace(before, asked=entry.asked)
        self._reached[workload] = reached
        self._owe(self.states, workload)
        if is_new:
            self._count(workload, "serving")

    def _forget_others(self) -> None:
        """What came of names that nobody asks for and nothing answers any more goes. A model of the repository that
        does not load is not asked for between two tries, and its failure stays."""
        known = {*self._desired, *self._answering, *repository.listed(self.folder)}
        for workload in {*self._reached, *self._refused} - known:
            self._forget(workload)
        self._write()

    def _forget(self, workload: str) -> None:
        for folder, known in ((self.states, self._reached), (self.failures, self._refused)):
            known.pop(workload, None)
            self._owe(folder, workload)

    def _count(self, workload: str, outcome: str) -> None:
        of_workload = self._counts.setdefault(workload, {})
        of_workload[outcome] = of_workload.get(outcome, 0) + 1
        self._owe(self.folder, "swaps")

    def _postpone(self, error: OSError) -> None:
        if error.strerror != self._trouble:
            logger.error("What serves cannot be written down (%s); it is tried again at each step.", error.strerror)
        self._trouble = error.strerror
