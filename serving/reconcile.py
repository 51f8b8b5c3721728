"""From the registry's aliases to what the workers serve, and back: what happened is written on the version's tags.

One `step` is one poll. A version is tried once each time the alias comes to name it; a version that fails leaves the
one before it serving. Not here: loading (`serving.engine`), processes (`serving.supervise`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from noria.errors import BundleError, RegistryError
from registry.aliases import aliases
from registry.store import Store
from serving import state
from serving.state import Desired, State

TAG = "noria.serving"
PATIENCE_SECONDS = 60
"""How long a worker may take to load a version."""
LONGEST_PAUSE = 30.0
"""Between two tries to read what MLflow does not give."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A version that the worker was asked for."""

    desired: Desired
    starts: int
    """Workers started when it was asked: more of them since means that a worker died of it."""
    deadline: float
    restored: bool = False
    """Asked before this process, or this worker, started."""
    previous: int | None = None
    """What the alias `previous` named when it was asked."""


class Reconciler:
    """Polls the aliases; keeps the desired files right. Used by one thread."""

    def __init__(self, store: Store, bundles: Path, folder: Path, starts: Callable[[], int]) -> None:
        self.store, self.bundles, self.starts = store, bundles, starts
        self.desired_folder, self.state_folder = folder / "desired", folder / "state"
        self._handled: dict[str, int] = {}
        """The version that the alias named when it was last acted on."""
        self._pending: dict[str, Pending] = {}
        self._unsaid: dict[tuple[str, int], str] = {}
        """Tags not written yet, by workload and version."""
        self._unreachable = ""
        self._retry_at: dict[str, tuple[float, float]] = {}
        # What an earlier process asked for is settled again: it may have been killed before it told the registry.
        for desired in self._desired().values():
            if desired.version is not None:
                self._wait_for(desired, restored=True)

    def step(self) -> None:
        """Settle what the worker answered, then act on every alias that has moved."""
        self._notice()
        for pending in list(self._pending.values()):
            self._settle(pending)
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

    def _notice(self) -> None:
        """A worker that started anew may fail on what its forerunner served: the copy on this disk was damaged."""
        answers = state.read(self.state_folder, State)
        for workload, desired in self._desired().items():
            reached = answers.get(workload)
            if workload in self._pending or reached is None or desired.version is None:
                continue
            if reached.asked == desired.asked and reached.status == "failed":
                self._wait_for(desired, restored=True)

    def _follow(self, workload: str, named: Mapping[str, int]) -> None:
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

    def _ask(self, workload: str, number: int, previous: int | None) -> None:
        """Fetch, check, and ask the worker for it."""
        try:
            version = self.store.get(workload, number)
            if not any(name.startswith("noria.") for name in version.tags) and workload not in self._handled:
                self._handled[workload] = number
                return
            bundle = self.store.fetch(version, self.bundles)
        except BundleError as error:
            self._handled[workload] = number
            self._report(workload, number, f"failed: {error}")
            return
        except RegistryError as error:
            self._pause(workload, str(error))
            return
        before = self._desired().get(workload) or Desired(workload, None)
        desired = Desired(
            workload, number, str(bundle.folder), uuid.uuid4().hex,
            fallback_version=before.version, fallback_folder=before.folder,
        )  # fmt: skip
        self._wait_for(desired, previous=previous)
        state.write(self.desired_folder, desired)

    def _wait_for(self, desired: Desired, restored: bool = False, previous: int | None = None) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        self._pending[desired.workload] = Pending(desired, max(self.starts(), 1), deadline, restored, previous)

    def _settle(self, pending: Pending) -> None:
        """Act on the worker's answer, when there is one."""
        workload, number = pending.desired.workload, pending.desired.version or 0
        reached = state.read(self.state_folder, State).get(workload)
        if reached is not None and reached.asked == pending.desired.asked:
            if reached.status == "serving":
                self._served(pending, reached)
            else:
                self._refuse(pending, reached.reason)
        elif self.starts() > pending.starts:
            self._refuse(pending, "The worker died while it loaded this version.")
        elif time.monotonic() > pending.deadline:
            self._refuse(pending, f"The worker did not load version {number} within {PATIENCE_SECONDS} s.")

    def _served(self, pending: Pending, reached: State) -> None:
        workload, number = reached.workload, reached.version
        if reached.replaced is None:
            self._report(workload, number, f"serving since {reached.since}")
        else:
            self._report(workload, number, f"serving since {reached.since}, replaced version {reached.replaced}")
            self._report(workload, reached.replaced, f"replaced by version {number} at {reached.since}")
            if not pending.restored:
                self._keep_previous(pending, reached.replaced)
        self._done(pending)

    def _refuse(self, pending: Pending, reason: str) -> None:
        """Go back to what served before."""
        workload, number = pending.desired.workload, pending.desired.version or 0
        asked = pending.desired
        back = Desired(workload, asked.fallback_version, asked.fallback_folder, uuid.uuid4().hex)
        state.write(self.desired_folder, back)
        if pending.restored:
            # The copy on this disk may be at fault: it is fetched and asked for once more.
            del self._pending[workload]
            self._handled.pop(workload, None)
            return
        self._report(workload, number, f"failed: {reason}")
        self._done(pending)

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
        return state.read(self.desired_folder, Desired)

    def _due(self, workload: str) -> bool:
        return time.monotonic() >= self._retry_at.get(workload, (0.0, 0.0))[0]

    def _pause(self, workload: str, reason: str) -> None:
        """Try again later, and later each time: MLflow may be starting, or the version's files are gone for good."""
        pause = min(LONGEST_PAUSE, self._retry_at.get(workload, (0.0, 0.5))[1] * 2)
        self._retry_at[workload] = (time.monotonic() + pause, pause)
        logger.warning("%s The champion of %s is tried again in %.0f s.", reason, workload, pause)
