"""What the replicas of a cluster should serve: one reconciler for all, and one replica tries a new version first.

The reconciler is the one of `noria serve`; what it writes for its worker is handed to replicas here, and what they say
is written where it reads. A version that the first replica cannot load reaches no other. Replicas get a bundle's files
from here, so that only this process speaks with MLflow. Not here: Ray (`serving.cluster`), loading (`serving.replica`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from registry.manifest import digest_of
from registry.store import Store
from serving import state
from serving.reconcile import Reconciler
from serving.replica import Order, Orders
from serving.shared_key import shared_key
from serving.state import Desired, State

SILENT_SECONDS = 15
"""A replica that tries a version and says nothing for so long is taken for dead. It may have been bad luck, so another
one tries; when that happens twice the version is refused, for each try costs the requests of a replica."""

logger = logging.getLogger(__name__)


@dataclass
class Trial:
    """A version that one replica loads before the others may."""

    replica: str
    began: float
    heard: float
    again: bool = False
    """Another replica tried it before, and fell silent."""


class Rollout:
    """The registry's word to all replicas. Keeps its state in `<home>/rollout`, and goes on from there."""

    def __init__(self, mlflow_uri: str, home: str, lake: str, *, poll_seconds: float, load_seconds: float) -> None:
        self.folder, self.bundles = Path(home) / "rollout", Path(home) / "bundles"
        # Replicas say again what they serve; a copy that was damaged while nothing ran is found by the first.
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        self.reconciler = Reconciler(Store(mlflow_uri), self.bundles, self.folder)
        self._lake = lake
        self._number = int.from_bytes(os.urandom(2))
        # Kept here too: each replica of a cluster looks twice a second.
        self._wanted: dict[str, Desired] = {}
        self._digests: dict[str, str] = {}
        """Of the bundles that these name, by folder."""
        self._seen: object = None
        self._reached: dict[str, State] = {}
        self._proven: dict[str, tuple[int | None, str]] = {}
        """By workload, the version that was reached last, and its content."""
        self._failed = state.read(self.folder / "failed", State)
        # What an earlier process asked for is served at once: MLflow may take minutes not to answer.
        self.polled = any(desired.version is not None for desired in self._desired().values())
        """Whether the aliases were asked for once, with or without an answer."""
        self._trying: dict[str, Trial] = {}
        """Who tries a version first, by the reconciler's request."""
        self._load_seconds = load_seconds
        self._poll_seconds = poll_seconds
        self._thread = threading.Thread(target=self._poll, name="reconcile", daemon=True)
        self._thread.start()

    async def check_health(self) -> None:
        """Raises RuntimeError when nobody polls the aliases any more."""
        if not self._thread.is_alive():
            raise RuntimeError("The thread that polls the aliases has ended.")

    async def join(self) -> tuple[bytes, int]:
        """For a new replica: the key of the prediction ids, and a number that no other replica has now.

        Raises what the lake raises when it does not answer; the replica asks again.
        """
        self._number += 1
        number = self._number
        return await asyncio.to_thread(shared_key, self._lake, self.folder), number

    async def look(self, replica: str, said: tuple[State, ...]) -> Orders:
        """What `replica` should serve, given what it says of its earlier orders."""
        wanted = self._desired()
        for one in said:
            if one.workload in wanted and wanted[one.workload].asked == one.asked:
                self._hear(one)
        orders = [self._order(replica, desired) for desired in wanted.values()]
        return Orders(tuple(order for order in orders if order is not None), None in orders or not self.polled)

    async def leave(self, replica: str) -> None:
        """A replica was told to end: what it was trying is not to blame, and another one tries at once."""
        for asked in [asked for asked, trial in self._trying.items() if trial.replica == replica]:
            del self._trying[asked]

    async def files(self, folder: str) -> dict[str, bytes]:
        """The files of a fetched bundle. Raises ValueError for any other folder."""
        root = Path(folder).resolve()
        if not root.is_relative_to(self.bundles.resolve()):
            raise ValueError(f"{folder} is no fetched bundle.")
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def _hear(self, one: State) -> None:
        """What came of a request; the first word counts."""
        if _has(self._reached, one) or _has(self._failed, one):
            return
        if one.status == "serving":
            state.write(self.folder / "state", one)
            self._reached[one.workload] = one
            known = self._wanted[one.workload]
            self._proven[one.workload] = known.version, known.content
            state.remove(self.folder / "failed", one.workload)
            self._failed.pop(one.workload, None)
        else:
            state.write(self.folder / "failed", one)
            self._failed[one.workload] = one

    def _order(self, replica: str, desired: Desired) -> Order | None:
        """What this replica should serve of a workload; None: nothing yet, another one tries its first version."""
        if desired.version is None:
            return Order(desired)
        # A refused version leaves the one before it, asked for anew: the replicas serve it, and none need try it first.
        same = desired.content and self._proven.get(desired.workload) == (desired.version, desired.content)
        if same or _has(self._reached, desired):
            self._trying.pop(desired.asked, None)
            return Order(desired, self._digest(desired.folder), proven=True)
        if not _has(self._failed, desired) and self._first(replica, desired):
            return Order(desired, self._digest(desired.folder))
        if desired.fallback_version is None:
            return None
        asked = f"before-{desired.asked}"
        digest = self._digest(desired.fallback_folder)
        before = Desired(desired.workload, desired.fallback_version, desired.fallback_folder, asked, content=digest)
        return Order(before, digest, proven=True)

    def _desired(self) -> dict[str, Desired]:
        """What the reconciler wants, read when it changed."""
        mark = state.signature(self.folder / "desired")
        if mark != self._seen:
            self._wanted, self._digests = state.read(self.folder / "desired", Desired), {}
            self._seen = mark
        return self._wanted

    def _digest(self, folder: str) -> str:
        found = self._digests.get(folder) or digest_of(Path(folder))
        self._digests[folder] = found
        return found

    def _first(self, replica: str, desired: Desired) -> bool:
        """Whether this replica is the one that tries; a version that takes too long has failed."""
        clock = time.monotonic()
        trial = self._trying.setdefault(desired.asked, Trial(replica, clock, clock))
        if clock - trial.began > self._load_seconds:
            self._refuse(desired, f"No replica could load version {desired.version} within {self._load_seconds:g} s.")
            return False
        if trial.replica != replica:
            if clock - trial.heard < SILENT_SECONDS:
                return False
            if trial.again:
                self._refuse(desired, f"Two replicas ended or fell silent while they loaded version {desired.version}.")
                return False
            trial = self._trying[desired.asked] = Trial(replica, clock, clock, again=True)
        trial.heard = clock
        return True

    def _refuse(self, desired: Desired, reason: str) -> None:
        self._trying.pop(desired.asked, None)
        self._hear(State(desired.workload, desired.version or 0, "failed", reason, state.now(), desired.asked))

    def _poll(self) -> None:
        last = ""
        while True:
            try:
                self.reconciler.step()
                last = ""
            except Exception as error:
                if str(error) != last:
                    logger.exception("Following the aliases failed; it is tried again.")
                last = str(error)
            self.polled = True
            time.sleep(self._poll_seconds)


def _has(states: Mapping[str, State], of: Desired | State) -> bool:
    """Whether they tell what came of that request."""
    found = states.get(of.workload)
    return found is not None and found.asked == of.asked
