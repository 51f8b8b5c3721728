"""A folder of plain models, NAME/VERSION/model.onnx, from which the highest version that loads is served.

One `step` is one look, and `start` the first ones. A new folder is asked for when its file has stopped growing, a
removed one is served no more, and a version that does not load is tried again, later each time. Operators may unload a
model, and load it again.
Not here: loading (`serving.model`), aliases (`serving.reconcile`).
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from noria.errors import ServiceError
from serving import everywhere, generation, orders, state
from serving.folder import Folder, Found, Mark, Versions
from serving.orders import Order
from serving.state import Desired, State

LOOK_SECONDS = 0.5
LONGEST_REST, RESTS = 5.0, 4
"""How long after a look the next one is, at most, and by how much longer than the look took: with thousands of models,
or on a slow share, looking would else be all that there is time for."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
ASKED = ("opening", "accepting", "leaving")
"""Phases of a worker in which a request may come to it."""
TRIES = 8
"""Of a file that does not load and does not change."""
SETTLED_SECONDS = 2.0
"""At the start a file that was not written for so long is whole."""
START_SECONDS = 5.0
"""How long the start waits for files that are still written."""

logger = logging.getLogger(__name__)


@dataclass
class Fault:
    """A version that did not load."""

    mark: Mark
    reason: str
    tries: int
    until: float
    """When it is tried again."""


def listed(folder: Path) -> list[str]:
    """Names of the repository's models, as the parent of the server in `folder` saw them last. Raises OSError."""
    try:
        names = json.loads((folder / "repository.json").read_bytes())
    except FileNotFoundError:
        return []
    return [name for name in names if isinstance(name, str)]  # an earlier noria wrote objects


class Repository:
    """Follows a model repository; keeps its desired files right. Used by one thread."""

    def __init__(self, source: Path | None, folder: Path) -> None:
        """`source` None: there is no repository, and what one asked for earlier is forgotten."""
        self.source, self.folder = source, folder
        self._models = None if source is None else Folder(source, self._say)
        self.desired_folder = folder / "desired"
        self._seen: dict[tuple[str, int], Mark] = {}
        self._faults: dict[tuple[str, int], Fault] = {}
        self._unloaded: set[str] = set()
        self._heard: set[str] = set()
        """Keys of the orders that were acted on."""
        self._loads: dict[int, Mapping[str, Desired]] = {}
        """What the workers that are there loaded, by generation: its file may be gone before the last of them."""
        self._asking: set[int] = set()
        """Generations of those that may still be asked."""
        self._said: set[str] = set()
        self._listed: list[str] | None = None
        self._growing = False
        """A file may still be written."""
        self._settled_before = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        orders.clear(folder)

    def start(self, stop: threading.Event) -> None:
        """Look until all files are whole: the first workers load them, so nothing is said to be ready without them. One
        that is written for longer than START_SECONDS is left for later, and so is all when `stop` is set, or when the
        disk is full."""
        until = time.monotonic() + START_SECONDS
        try:
            self.step()
            while self._growing and time.monotonic() < until and not stop.wait(LOOK_SECONDS):
                self.step()
        except OSError as error:
            logger.error("The model repository is looked at again soon, for something failed (%s).", error)

    def step(self) -> float:
        """Look once, and act on what has changed and on the orders that wait; returns the seconds after which to look
        again."""
        began = time.monotonic()
        waiting = orders.waiting(self.folder)
        found = Found({}) if self._models is None else self._models.look()
        if found is not None:
            self._act(found, waiting)
        return min(LONGEST_REST, max(LOOK_SECONDS, RESTS * (time.monotonic() - began)))

    def _act(self, found: Found, waiting: Sequence[Order]) -> None:
        marks = {(name, number): mark for name, versions in found.models.items() for number, mark in versions.items()}
        self._growing = not all(self._whole(key, mark) for key, mark in marks.items())
        for order in waiting:
            if order.key not in self._heard:
                self._hear(order)
        desired = state.read(self.desired_folder, Desired)
        refused = self._refused()
        for name in found.models:
            self._follow(name, found, desired.get(name), refused.get(name))
        for name, entry in desired.items():
            gone = name not in found.models and not found.hides(name, entry.version)
            if entry.plain and (gone or name in self._unloaded):
                state.remove(self.desired_folder, name)
        self._seen = marks
        self._list(sorted(found.models))
        self._look_at_workers()
        self._answer(waiting, found.models)

    def _refused(self) -> dict[str, State]:
        """What came of the versions that do not load. One that answers is not among them, whatever is said of it: the
        process that loads a change loads it too, and may fail just there."""
        states, answers = state.read(self.folder / "state", State), everywhere.read(self.folder) or {}
        return {
            name: failed
            for name, failed in state.read(self.folder / "failed", State).items()
            if name not in states or states[name].asked != failed.asked or answers.get(name) != failed.version
        }

    def _follow(self, name: str, found: Found, desired: Desired | None, failed: State | None) -> None:
        if desired is not None and not desired.plain:
            self._say(f"{name} is a registered workload and a folder of the model repository. The workload is served; "
                      "rename the folder to serve the model.")  # fmt: skip
            return
        versions = found.models[name]
        refused = failed if desired is not None and failed is not None and failed.asked == desired.asked else None
        if refused is not None:
            self._fault(name, refused, versions)
        elif desired is not None and desired.version not in versions and found.hides(name, desired.version):
            return  # asked for before this process began, and it may be as it was
        if name in self._unloaded:
            return
        usable = [number for number in sorted(versions, reverse=True) if self._usable(name, number, versions[number])]
        if not usable:
            if refused is not None:
                state.remove(self.desired_folder, name)
            return
        back = usable[1] if len(usable) > 1 else None
        wanted = Desired(
            name, usable[0], self._folder(name, usable[0]), self._asked(name, usable[0], versions[usable[0]]),
            fallback_version=back, fallback_folder=self._folder(name, back) if back is not None else "", plain=True,
        )  # fmt: skip
        if desired != wanted:
            state.write(self.desired_folder, wanted)

    def _usable(self, name: str, number: int, mark: Mark) -> bool:
        """Whether the file is whole, as far as one can see, and not known not to load."""
        fault = self._faults.get((name, number))
        if fault is not None and fault.mark == mark and time.monotonic() < fault.until:
            return False
        return self._whole((name, number), mark)

    def _whole(self, key: tuple[str, int], mark: Mark) -> bool:
        return self._seen.get(key) == mark or mark[1] < self._settled_before

    def _fault(self, name: str, failed: State, versions: Versions) -> None:
        key, mark = (name, failed.version), versions.get(failed.version)
        before = self._faults.get(key)
        if mark is None or failed.asked != self._asked(name, failed.version, mark):
            return  # the file was written anew since
        tries = before.tries + 1 if before is not None and before.mark == mark else 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)) if tries < TRIES else math.inf
        self._faults[key] = Fault(mark, failed.reason, tries, time.monotonic() + pause)
        then = f"in {pause:.0f} s" if tries < TRIES else "when it is written anew"
        logger.error("%s %s/%d/model.onnx is tried again %s.", failed.reason, name, failed.version, then)

    def _asked(self, name: str, number: int, mark: Mark) -> str:
        """Names a request for a file as it is now; another one for each try."""
        fault = self._faults.get((name, number))
        tries = fault.tries if fault is not None and fault.mark == mark else 0
        return f"{number}-{'-'.join(map(str, mark))}-{tries}"

    def _folder(self, name: str, number: int) -> str:
        return str((self.source or Path()).absolute() / name / str(number))

    def _list(self, names: list[str]) -> None:
        if names != self._listed and self.source is not None:
            state.write_file(self.folder / "repository.json", names)
        self._listed = names

    # Orders

    def _hear(self, order: Order) -> None:
        self._heard.add(order.key)
        if not order.load:
            self._unloaded.add(order.name)
            return
        self._unloaded.discard(order.name)
        for key, fault in self._faults.items():
            if key[0] == order.name:
                fault.until = 0.0

    def _look_at_workers(self) -> None:
        try:
            workers = json.loads((self.folder / "workers.json").read_bytes())
        except (OSError, ValueError):
            workers = []
        numbers = {worker["generation"] for worker in workers}
        self._loads = {number: entries for number, entries in self._loads.items() if number in numbers}
        for number in numbers - self._loads.keys():
            with suppress(ServiceError):  # it is gone, and they soon, too
                self._loads[number] = generation.read(generation.path_of(self.folder, number)).entries
        # An order's own answer may be all that is left of one that has drained.
        self._asking = {one["generation"] for one in workers if one["phase"] in ASKED and not one.get("drained")}

    def _answer(self, waiting: Sequence[Order], found: Mapping[str, Versions]) -> None:
        """Say what came of the orders of which that is known. What is loaded is the newest version, or nothing."""
        if not waiting:
            return
        desired, refused = state.read(self.desired_folder, Desired), self._refused()
        last = {order.name: order.load for order in waiting}
        for order in waiting:
            name, entry, failed = order.name, desired.get(order.name), refused.get(order.name)
            reason = None
            if last[name] != order.load:
                reason = f"A later order to {'load' if last[name] else 'unload'} {name} overrules this one."
            elif name not in found or (entry is not None and not entry.plain):
                self._unloaded.discard(name)
                reason = f"There is no model '{name}' in the repository of this server."
            elif not order.load:
                reason = "" if self._known(name, None) else None
            elif failed is not None and (entry is None or failed.asked == entry.asked):
                reason = failed.reason
            else:
                reason = self._loaded(name, found[name])
            if reason is not None:
                orders.answer(self.folder, order.key, reason)

    def _loaded(self, name: str, versions: Versions) -> str | None:
        """Why the newest version is not loaded, empty when every worker has it; None while one cannot know."""
        number = max(versions)
        mark, fault = versions[number], self._faults.get((name, number))
        if fault is not None and fault.mark == mark and time.monotonic() < fault.until:
            return fault.reason
        return "" if self._known(name, self._asked(name, number, mark)) else None

    def _known(self, name: str, asked: str | None) -> bool:
        """Whether every worker that may still be asked has loaded what was asked for, or (None) has not got the model;
        what else is loaded meanwhile does not matter."""
        loads = [self._loads.get(number) for number in self._asking]
        return bool(loads) and all(
            entries is not None and (entries[name].asked if name in entries else None) == asked for entries in loads
        )

    def _say(self, sentence: str) -> None:
        """Log an error once."""
        if sentence not in self._said:
            self._said.add(sentence)
            logger.error("%s", sentence)
