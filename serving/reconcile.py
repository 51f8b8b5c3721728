"""From the registry's aliases to what the workers serve, and back: what happened is written on the version's tags.

One `step` is one poll. A version is tried once each time the alias comes to name it; a version that fails leaves the
one before it serving. One that served and cannot be loaded any more, because its copy on this disk was damaged, is
fetched again. Not here: loading (`serving.engine`), processes (`serving.fleet`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from noria.errors import BundleError, RegistryError
from registry.aliases import aliases
from registry.store import Store
from serving import state
from serving.state import Desired, State
from serving.sweep import sweep

TAG = "noria.serving"
LONGEST_PAUSE = 30.0
"""Between two tries to read what MLflow does not give."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A version that the workers were asked for, and have not answered about yet."""

    desired: Desired
    origin: Literal["new", "restored", "repaired"] = "new"
    """Restored: an earlier process asked for it. Repaired: it served, and was fetched again."""
    previous: int | None = None
    """What the alias `previous` named when it was asked."""


class Reconciler:
    """Polls the aliases; keeps the desired files right. Used by one thread."""

    def __init__(self, store: Store, bundles: Path, folder: Path) -> None:
        self.store, self.bundles = store, bundles
        self.desired_folder, self.state_folder = folder / "desired", folder / "state"
        self.failed_folder = folder / "failed"
        self._handled: dict[str, int] = {}
        """The version that the alias named when it was last acted on."""
        self._pending: dict[str, Pending] = {}
        self._lost: set[str] = set()
        """Requests for versions that the registry does not hold whole either."""
        self._clashes: set[str] = set()
        self._named: dict[str, set[int]] = {}
        self._unsaid: dict[tuple[str, int], str] = {}
        """Tags not written yet, by workload and version."""
        self._unreachable = ""
        self._retry_at: dict[str, tuple[float, float]] = {}
        # What an earlier process asked for is settled again: it may have been killed before it told the registry.
        for desired in self._desired().values():
            if desired.version is not None:
                self._pending[desired.workload] = Pending(desired, "restored")

    def step(self) -> None:
        """Settle what the workers answered, then act on every alias that has moved."""
        for pending in list(self._pending.values()):
            self._settle(pending)
        self._repair()
        try:
            found = aliases(self.store)
        except RegistryError as error:
            if str(error) != self._unreachable:
                logger.warning("%s Serving goes on with what was fetched.", error)
            self._unreachable = str(error)
            return
        if self._unreachable:
            logger.info("MLflow answers again.")
        self._unreachable = ""
        for workload, named in found.items():
            self._follow(workload, named)
        self._say()
        self._sweep(found)

    def _repair(self) -> None:
        """A version that serves and cannot be loaded any more is fetched again, and asked for once more."""
        failures = state.read(self.failed_folder, State)
        for workload, desired in self._desired().items():
            failed = failures.get(workload)
            if failed is None or desired.version is None or failed.asked != desired.asked:
                continue
            if workload in self._pending or desired.asked in self._lost or not self._due(workload):
                continue
            logger.warning("%s It is fetched again.", failed.reason)
            if not self._ask(workload, desired.version, again=True):
                self._lost.add(desired.asked)

    def _follow(self, workload: str, named: Mapping[str, int]) -> None:
        if self._clash(workload):
            return
        number = named.get("champion")
        if number is None:
            self._without(workload)
        elif workload not in self._pending and self._handled.get(workload) != number and self._due(workload):
            self._ask(workload, number, named.get("previous"))

    def _without(self, workload: str) -> None:
        """No champion: say so once, and go on serving what serves."""
        serving = self._desired().get(workload)
        if serving is None:
            state.write(self.desired_folder, Desired(workload, None))
        elif serving.version is not None and workload in self._handled and workload not in self._pending:
            del self._handled[workload]
            logger.warning("%s has no champion any more; version %s goes on serving.", workload, serving.version)

    def _ask(self, workload: str, number: int, previous: int | None = None, *, again: bool = False) -> bool:
        """Fetch, check, and ask the workers for it. False: what the registry holds is not usable."""
        try:
            version = self.store.get(workload, number)
            if not any(name.startswith("noria.") for name in version.tags) and workload not in self._handled:
                self._handled[workload] = number
                return True
            bundle = self.store.fetch(version, self.bundles)
        except BundleError as error:
            self._handled[workload] = number
            self._report(workload, number, f"failed: {error}")
            return False
        except RegistryError as error:
            self._pause(workload, str(error))
            return True
        back, folder = self._fallback(workload, number)
        desired = Desired(
            workload, number, str(bundle.folder), uuid.uuid4().hex, fallback_version=back, fallback_folder=folder
        )
        self._pending[workload] = Pending(desired, "repaired" if again else "new", previous)
        state.write(self.desired_folder, desired)
        return True

    def _fallback(self, workload: str, number: int) -> tuple[int | None, str]:
        """What serves now: version and folder."""
        before = self._desired().get(workload) or Desired(workload, None)
        failed = state.read(self.failed_folder, State).get(workload)
        if before.version == number or (failed is not None and failed.asked == before.asked):
            return before.fallback_version, before.fallback_folder
        return before.version, before.folder

    def _settle(self, pending: Pending) -> None:
        """Act on the workers' answer, when there is one."""
        workload, asked = pending.desired.workload, pending.desired.asked
        failed = state.read(self.failed_folder, State).get(workload)
        reached = state.read(self.state_folder, State).get(workload)
        if failed is not None and failed.asked == asked:
            self._refuse(pending, failed.reason)
        elif reached is not None and reached.asked == asked:
            self._served(pending, reached)

    def _served(self, pending: Pending, reached: State) -> None:
        workload, number = reached.workload, reached.version
        if reached.replaced is None:
            self._report(workload, number, f"serving since {reached.since}")
        else:
            self._report(workload, number, f"serving since {reached.since}, replaced version {reached.replaced}")
            self._report(workload, reached.replaced, f"replaced by version {number} at {reached.since}")
            if pending.origin == "new":
                self._keep_previous(pending, reached.replaced)
        self._done(pending)

    def _refuse(self, pending: Pending, reason: str) -> None:
        """Go back to what served before; but a version that is not new may be sound, and its copy on this disk not."""
        workload, number = pending.desired.workload, pending.desired.version or 0
        if pending.origin == "restored":
            del self._pending[workload]
            return
        asked = pending.desired
        back = Desired(workload, asked.fallback_version, asked.fallback_folder, uuid.uuid4().hex)
        state.write(self.desired_folder, back)
        self._report(workload, number, f"failed: {reason}")
        self._done(pending)

    def _sweep(self, found: Mapping[str, Mapping[str, int]]) -> None:
        """Remove bundles that neither an alias nor a request names, when what is named has changed."""
        desired, reached = self._desired(), state.read(self.state_folder, State)
        named = {workload: set(numbers.values()) for workload, numbers in found.items()}
        for workload, entry in desired.items():
            state_of = reached.get(workload)
            more = [entry.version, entry.fallback_version, *([state_of.version] if state_of else [])]
            named.setdefault(workload, set()).update(number for number in more if number is not None)
        if named != self._named and not self._pending:
            sweep(self.bundles, named)
            self._named = named

    def _done(self, pending: Pending) -> None:
        self._handled[pending.desired.workload] = pending.desired.version or 0
        del self._pending[pending.desired.workload]

    def _keep_previous(self, pending: Pending, replaced: int) -> None:
        """Whoever moved the champion, the way back leads to the version that answered before; unless an alias has moved
        since, which somebody did on purpose."""
        workload = pending.desired.workload
        try:
            named = aliases(self.store).get(workload, {})
            unmoved = named.get("champion"), named.get("previous")
            if unmoved == (pending.desired.version, pending.previous) and replaced != pending.previous:
                self.store.move(workload, "previous", replaced)
                # A promotion of just that version may have come between: then the way back leads to this one.
                if aliases(self.store).get(workload, {}).get("champion") == replaced:
                    self.store.move(workload, "previous", pending.desired.version or 0)
        except RegistryError as error:
            logger.warning("The alias previous of %s could not be set: %s", workload, error)

    def _report(self, workload: str, number: int, sentence: str) -> None:
        """Tag the version as soon as MLflow takes it."""
        level = logging.ERROR if sentence.startswith("failed") else logging.INFO
        logger.log(level, "%s version %s %s", workload, number, sentence)
        self._unsaid[workload, number] = sentence[:4000]

    def _say(self) -> None:
        for (workload, number), sentence in list(self._unsaid.items()):
            try:
                self.store.tag(self.store.get(workload, number), {TAG: sentence})
            except RegistryError as error:
                logger.warning("The tag %s of %s version %s is not set: %s", TAG, workload, number, error)
            del self._unsaid[workload, number]

    def _desired(self) -> dict[str, Desired]:
        desired = state.read(self.desired_folder, Desired)
        return {workload: entry for workload, entry in desired.items() if not entry.plain}

    def _clash(self, workload: str) -> bool:
        """Whether the name is a model's of the repository; said once."""
        if not (self.desired_folder / f"{workload}.json").exists() or workload in self._desired():
            return False
        if workload not in self._clashes:
            self._clashes.add(workload)
            logger.error("%s is a registered workload and a folder of the model repository. The folder is served; "
                         "rename it to serve the workload.", workload)  # fmt: skip
        return True

    def _due(self, workload: str) -> bool:
        return time.monotonic() >= self._retry_at.get(workload, (0.0, 0.0))[0]

    def _pause(self, workload: str, reason: str) -> None:
        """Try again later, and later each time: MLflow may be starting, or the version's files are gone for good."""
        pause = min(LONGEST_PAUSE, self._retry_at.get(workload, (0.0, 0.5))[1] * 2)
        self._retry_at[workload] = (time.monotonic() + pause, pause)
        logger.warning("%s The champion of %s is tried again in %.0f s.", reason, workload, pause)
