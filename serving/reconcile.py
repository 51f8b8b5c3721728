"""From the registry's aliases to what the workers serve, and back: what happened is written on the version's tags.

One `step` is one poll. A version is tried once each time the alias comes to name it, also while another one still
loads; a version that fails leaves the one before it serving. One that served and cannot be loaded any more is asked for
again, later each time, and fetched again where its copy on this disk was damaged. What one workload's files do to this
process is no other's trouble. Not here: loading (`serving.engine`), processes (`serving.fleet`), tags
(`serving.telling`).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from noria.errors import BundleError, RegistryError
from registry.aliases import Registered, registered
from registry.manifest import digest_of, verify
from registry.store import PREFIX, Store
from serving import state
from serving.state import Desired, State
from serving.sweep import sweep
from serving.telling import Telling

LONGEST_PAUSE = 30.0
"""Between two tries to read what MLflow does not give, or to write what this disk does not take."""
LONGEST_REST = 300.0
"""Between two tries of a version that served, cannot be loaded any more, and has nothing to fall back to."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A version that the workers were asked for, and have not answered about yet."""

    desired: Desired
    back: Desired
    """What serves until then; no version: nothing."""
    origin: Literal["new", "restored", "repaired"] = "new"
    """Restored: an earlier process asked for it. Repaired: it served, and was asked for again."""
    previous: int | None = None
    """What the alias `previous` named when it was asked."""


class Reconciler:
    """Polls the aliases; keeps the desired files right. Used by one thread."""

    def __init__(self, store: Store, bundles: Path, folder: Path, stop: threading.Event | None = None) -> None:
        """Once `stop` is set a step ends with the call that it is in."""
        self.store, self.bundles, self.stop = store, bundles, stop or threading.Event()
        self.folder, self.desired_folder = folder, folder / "desired"
        self.telling = Telling(store, self.stop)
        self._handled: dict[str, tuple[int, int]] = {}
        """The version that the alias named when it was last acted on, and when its model was registered."""
        self._pending: dict[str, Pending] = {}
        self._lost: set[str] = set()
        """Requests for versions that the registry does not hold whole either."""
        self._said: set[str] = set()
        """Workloads whose name is taken, or that serve though no alias names what: said once."""
        self._named: dict[str, set[int]] = {}
        self._unreachable = ""
        self._retry_at: dict[tuple[str, int | None], tuple[float, float]] = {}
        self._look()
        # What an earlier process asked for is settled again: it may have been killed before it told the registry.
        for workload, desired in self._own().items():
            if desired.version is not None:
                self._pending[workload] = Pending(desired, _fallback(desired), "restored")

    def step(self) -> None:
        """Settle what the workers answered, then act on every alias that has moved."""
        self._look()
        for workload in self._own():
            self._fenced(workload, partial(self._settle, workload))
        if self.stop.is_set():
            return
        try:
            found = registered(self.store)
        except RegistryError as error:
            if str(error) != self._unreachable:
                logger.warning("%s Serving goes on with what was fetched.", error)
            self._unreachable = str(error)
            return
        if self._unreachable:
            logger.info("MLflow answers again.")
        self._unreachable = ""
        self._forget(found)
        for workload, model in found.items():
            self._fenced(workload, partial(self._follow, workload, model))
        self.telling.say()
        if not self.stop.is_set():
            self._sweep(found)

    def _look(self) -> None:
        """Read the files: once a step and once a fetch, however many models are registered."""
        self._desired = state.read(self.desired_folder, Desired)
        self._states = state.read(self.folder / "state", State)
        self._failures = state.read(self.folder / "failed", State)

    def _own(self) -> dict[str, Desired]:
        return {workload: entry for workload, entry in self._desired.items() if not entry.plain}

    def _fenced(self, workload: str, act: Callable[[], None]) -> None:
        """What the disk does not take of one workload does not keep the others from being followed."""
        if self.stop.is_set() or not self._due(workload):
            return
        try:
            act()
        except OSError as error:
            self._pause(workload, f"The files of {workload} cannot be written ({error}).")

    # What the registry says

    def _forget(self, found: Mapping[str, Registered]) -> None:
        """A model that is not registered any more goes on serving, but its name is free for another one."""
        self._handled = {workload: mark for workload, mark in self._handled.items() if workload in found}
        for workload, entry in self._own().items():
            if entry.version is None and not (workload in found and found[workload].ours):
                state.remove(self.desired_folder, workload)
                del self._desired[workload]
            elif workload not in found:
                self._say_unnamed(entry, "is not registered any more")

    def _follow(self, workload: str, model: Registered) -> None:
        if self._clash(workload):
            return
        number, entry = model.aliases.get("champion"), self._desired.get(workload)
        if number is not None:
            self._said.discard(workload)
            mark = (number, model.made)
            due = self._handled.get(workload) != mark and self._due(workload, number)
            if due and self._ask(workload, number, model.aliases.get("previous")):
                self._handled[workload] = mark
        elif entry is None and model.ours:
            self._write(Desired(workload, None))
        elif entry is not None and workload not in self._pending:
            self._handled.pop(workload, None)
            self._say_unnamed(entry, "has no champion any more")

    def _say_unnamed(self, entry: Desired, what: str) -> None:
        if entry.version is not None and entry.workload not in self._said:
            self._said.add(entry.workload)
            logger.warning("%s %s; version %s goes on serving. Remove %s to end that.", entry.workload, what,
                           entry.version, self.desired_folder / f"{entry.workload}.json")  # fmt: skip

    def _ask(self, workload: str, number: int, previous: int | None = None, *, again: bool = False) -> bool:
        """Fetch, check, and ask the workers for it. False: MLflow does not give it now."""
        before = self._desired.get(workload, Desired(workload, None))
        # Read before the fetch, which replaces the copy where the number names another version by now.
        held = before.content or digest_of(Path(before.folder)) if before.version == number else None
        try:
            version = self.store.get(workload, number)
            if before.version is None and not any(name.startswith(PREFIX) for name in version.tags):
                return True
            bundle = self.store.fetch(version, self.bundles)
        except BundleError as error:
            self.telling.report(workload, number, f"failed: {error}")
            if again:
                self._lost.add(before.asked)
            return True
        except RegistryError as error:
            self._pause(workload, str(error), number)
            return False
        folder, content = str(bundle.folder), digest_of(bundle.folder)
        if held == content and workload not in self._handled and not again:
            return True  # an earlier process asked for it
        self._look()  # a fetch takes its time, and what was asked for before may answer by now
        self._hear(workload)
        back = self._back(workload)
        last = _fallback(back) if back.folder == folder else back
        asked = Desired(workload, number, folder, uuid.uuid4().hex, last.version, last.folder, content=content)
        self._request(Pending(asked, back, "repaired" if again else "new", previous))
        return True

    def _back(self, workload: str) -> Desired:
        """What serves now, and serves on when the next version does not."""
        pending, reached = self._pending.get(workload), self._states.get(workload)
        if pending is not None and pending.origin == "new":
            return pending.back
        back, failed = self._desired.get(workload, Desired(workload, None)), self._failures.get(workload)
        unproven = reached is not None and reached.version != back.version
        return _fallback(back) if unproven or (failed is not None and failed.asked == back.asked) else back

    def _request(self, pending: Pending) -> None:
        """Ask the workers; what they were asked for before and have not loaded yet is not wanted any more."""
        workload, before = pending.desired.workload, self._pending.get(pending.desired.workload)
        self._write(pending.desired)
        self._pending[workload] = pending
        if before is not None and before.origin == "new" and before.desired.version != pending.desired.version:
            self.telling.report(workload, before.desired.version or 0, "was not served: the alias moved on meanwhile")

    # What the workers say

    def _hear(self, workload: str) -> None:
        """Act on the workers' answer, when there is one."""
        pending = self._pending.get(workload)
        failed, reached = self._failures.get(workload), self._states.get(workload)
        if pending is not None and failed is not None and failed.asked == pending.desired.asked:
            self._refuse(pending, failed.reason)
        elif pending is not None and reached is not None and reached.asked == pending.desired.asked:
            self._served(pending, reached)

    def _settle(self, workload: str) -> None:
        """Act on the workers' answer, and on their word that what they answered with does not load any more."""
        self._hear(workload)
        entry, failed = self._desired.get(workload), self._failures.get(workload)
        if entry is None or failed is None:
            return
        if failed.asked == entry.asked and workload not in self._pending:
            self._repair(entry, failed.reason)

    def _served(self, pending: Pending, reached: State) -> None:
        workload, number = reached.workload, reached.version
        del self._pending[workload]
        self._retry_at.pop((workload, number), None)
        anew = pending.back.version == number and pending.back.content != pending.desired.content
        replaced = None if anew else reached.replaced  # was a version that this registry does not know
        instead = "" if replaced is None else f", replaced version {replaced}"
        self.telling.report(workload, number, f"serving since {reached.since}{instead}")
        if replaced is not None:
            self.telling.report(workload, replaced, f"replaced by version {number} at {reached.since}")
            if pending.origin == "new":
                self.telling.lead_back(workload, number, pending.previous, replaced)

    def _refuse(self, pending: Pending, reason: str) -> None:
        """Go back to what served before; but a version that is not new may be sound, and only its copy on this disk or
        the moment was not: that one is given up only for another one, and not soon."""
        workload, number, back = pending.desired.workload, pending.desired.version or 0, pending.back
        if pending.origin != "restored":
            tired = self._retry_at.get((workload, number), (0.0, 0.0))[1] >= LONGEST_PAUSE
            if pending.origin == "new" or (tired and back.version is not None):
                self._write(replace(back, asked=uuid.uuid4().hex))
            else:
                self._pause(workload, reason, number, LONGEST_REST)
            self.telling.report(workload, number, f"failed: {reason}")
        del self._pending[workload]

    def _repair(self, entry: Desired, reason: str) -> None:
        """A version that serves and cannot be loaded any more is asked for once more: as it is where its copy is whole,
        for a busy machine may be to blame, else fetched again."""
        workload, number = entry.workload, entry.version
        if number is None or entry.asked in self._lost or not self._due(workload, number):
            return
        try:
            verify(Path(entry.folder))
        except BundleError:
            logger.warning("%s It is fetched again.", reason)
            self._ask(workload, number, again=True)
            return
        logger.warning("%s Its copy on this disk is whole, so it is tried again.", reason)
        self._request(Pending(replace(entry, asked=uuid.uuid4().hex), _fallback(entry), "repaired"))

    # Files

    def _sweep(self, found: Mapping[str, Registered]) -> None:
        """Remove bundles that neither an alias nor a request names, when what is named has changed."""
        named = {workload: set(model.aliases.values()) for workload, model in found.items()}
        for workload, entry in self._own().items():
            reached = self._states.get(workload)
            more = [entry.version, entry.fallback_version, reached.version if reached is not None else None]
            named.setdefault(workload, set()).update(number for number in more if number is not None)
        if named != self._named:
            sweep(self.bundles, named)
            self._named = named

    def _write(self, desired: Desired) -> None:
        state.write(self.desired_folder, desired)
        self._desired[desired.workload] = desired
        self._retry_at.pop((desired.workload, None), None)

    def _clash(self, workload: str) -> bool:
        """Whether the name is a model's of the repository; said once."""
        entry = self._desired.get(workload)
        if entry is None or not entry.plain:
            return False
        if workload not in self._said:
            self._said.add(workload)
            logger.error("%s is a registered workload and a folder of the model repository. The folder is served; "
                         "rename it to serve the workload.", workload)  # fmt: skip
        return True

    def _due(self, workload: str, number: int | None = None) -> bool:
        return time.monotonic() >= self._retry_at.get((workload, number), (0.0, 0.0))[0]

    def _pause(self, workload: str, reason: str, number: int | None = None, longest: float = LONGEST_PAUSE) -> None:
        """Try again later, and later each time: MLflow may be starting, or the version's files are gone for good."""
        pause = min(longest, self._retry_at.get((workload, number), (0.0, 0.5))[1] * 2)
        self._retry_at[workload, number] = (time.monotonic() + pause, pause)
        what = workload if number is None else f"Version {number} of {workload}"
        logger.warning("%s %s is tried again in %.0f s.", reason, what, pause)


def _fallback(desired: Desired) -> Desired:
    return Desired(desired.workload, desired.fallback_version, desired.fallback_folder)
