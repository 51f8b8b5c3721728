"""What the replicas of a cluster should serve: one reconciler for all, and one replica tries a new version first.

The reconciler is the one of `noria serve`; what it writes for its worker is handed to replicas here, and what they say
is written where it reads. A version that the first replica cannot load reaches no other. Replicas get a bundle's files
from here, so that only this process speaks with MLflow. Not here: Ray (`serving.cluster`), loading (`serving.replica`).
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

from registry.store import Store
from serving import state
from serving.reconcile import Reconciler
from serving.replica import Order, Orders, digest_of
from serving.state import Desired, State

SILENT_SECONDS = 15
"""A replica that tries a version and says nothing for so long is taken for dead; another one tries."""

logger = logging.getLogger(__name__)


class Rollout:
    """The registry's word to all replicas. Keeps its state in `<home>/rollout`, and goes on from there."""

    def __init__(self, mlflow_uri: str, home: str, poll_seconds: float) -> None:
        self.folder, self.bundles = Path(home) / "rollout", Path(home) / "bundles"
        # Replicas say again what they serve; a copy that was damaged while nothing ran is found by the first.
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        self.reconciler = Reconciler(Store(mlflow_uri), self.bundles, self.folder, lambda: 1)
        self.polled = False
        """Whether the aliases were asked for once, with or without an answer."""
        self._trying: dict[str, tuple[str, float]] = {}
        """Who tries a version first and when it was last heard, by the reconciler's request."""
        self._poll_seconds = poll_seconds
        self._thread = threading.Thread(target=self._poll, name="reconcile", daemon=True)
        self._thread.start()

    async def check_health(self) -> None:
        """Raises RuntimeError when nobody polls the aliases any more."""
        if not self._thread.is_alive():
            raise RuntimeError("The thread that polls the aliases has ended.")

    async def look(self, replica: str, said: tuple[State, ...]) -> Orders:
        """What `replica` should serve, given what it says of its earlier orders."""
        wanted = state.read(self.folder / "desired", Desired)
        reached = state.read(self.folder / "state", State)
        for one in said:
            asked = wanted.get(one.workload)
            before = reached.get(one.workload)
            if asked is not None and asked.asked == one.asked and (before is None or before.asked != one.asked):
                state.write(self.folder / "state", one)
                reached[one.workload] = one
        orders = [self._order(replica, desired, reached.get(name)) for name, desired in wanted.items()]
        return Orders(tuple(order for order in orders if order is not None), None in orders or not self.polled)

    async def files(self, folder: str) -> dict[str, bytes]:
        """The files of a fetched bundle. Raises ValueError for any other folder."""
        root = Path(folder).resolve()
        if not root.is_relative_to(self.bundles.resolve()):
            raise ValueError(f"{folder} is no fetched bundle.")
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def _order(self, replica: str, desired: Desired, reached: State | None) -> Order | None:
        """What this replica should serve of a workload; None: nothing yet, another one tries its first version."""
        if desired.version is None:
            return Order(desired)
        if reached is not None and reached.asked == desired.asked and reached.status == "serving":
            self._trying.pop(desired.asked, None)
            return Order(desired, digest_of(Path(desired.folder)), proven=True)
        failed = reached is not None and reached.asked == desired.asked
        if not failed and self._first(replica, desired.asked):
            return Order(desired, digest_of(Path(desired.folder)))
        if desired.fallback_version is None:
            return None
        before = Desired(
            desired.workload, desired.fallback_version, desired.fallback_folder, f"before-{desired.asked}"
        )  # fmt: skip
        return Order(before, digest_of(Path(before.folder)), proven=True)

    def _first(self, replica: str, asked: str) -> bool:
        """Whether this replica is the one that tries."""
        now = time.monotonic()
        holder, heard = self._trying.get(asked, (replica, now))
        if holder != replica and now - heard < SILENT_SECONDS:
            return False
        self._trying[asked] = (replica, now)
        return True

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
