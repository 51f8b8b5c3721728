"""The parent's side of the shadow: which challenger shadows what, and what the registry and the pages are told.

A workload's alias `challenger` is all it takes; the registered model's tag `noria.shadow_share` (0 to 1) says how much
of the traffic. One `step` is one look. A version that fails is tried again only when the alias has moved. Nothing here
touches a request: the drain offers segments that it is done with (`serving.feed`), a process of the lowest priority
scores them (`serving.shadow`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import deque
from pathlib import Path

from noria.errors import BundleError, RegistryError
from registry.aliases import Registered, registered
from registry.store import Store
from serving import shadow_state
from serving.feed import Feed
from serving.shadow_process import Process
from serving.shadow_state import Ask, Reached, Status
from serving.telling import Telling

SHARE_TAG = "noria.shadow_share"
LOOK_SECONDS = 2.0
"""How often serve() should call `step`."""
MOST_ENDS, WITHIN_SECONDS = 3, 600.0
"""A challenger whose process ended by itself so often, so soon, is given up."""
RETRY_SECONDS = 30.0
"""Until what MLflow did not give is asked for again."""

logger = logging.getLogger(__name__)


class Shadowing:
    """Follows the alias `challenger` of every registered model. Used by one thread; `feed.offer` by another."""

    def __init__(self, store: Store, bundles: Path, folder: Path, stop: threading.Event | None = None) -> None:
        """Once `stop` is set a step ends with the call that it is in."""
        self.store, self.bundles, self.folder = store, bundles, folder / "shadow"
        self.stopping = stop or threading.Event()
        self.telling = Telling(store, self.stopping)
        self.feed = Feed(self.folder)
        self.process = Process(folder)
        self._asks = shadow_state.read(self.folder / "asked.json", Ask)
        self._written = dict(self._asks)
        self._failed: dict[str, tuple[int, str]] = {}
        """Given up by this side: version and sentence, until the alias moves."""
        self._ends: dict[str, deque[float]] = {}
        self._restarts: dict[str, int] = {}
        self._troubles: dict[str, str] = {}
        """What is wrong with a workload's share."""
        self._said: dict[tuple[str, int], str] = {}
        """What was reported last, by workload and version."""
        self._retry_at: dict[str, float] = {}
        self._unreachable = ""
        for workload, status in shadow_state.read(self.folder / "status.json", Status).items():
            self.feed.dropped[workload], self._restarts[workload] = status.dropped, status.restarts
            if status.status == "failed":
                self._failed[workload] = status.version, status.sentence.removeprefix("failed: ")
        self._want()

    def step(self) -> None:
        """Look at the aliases, at the process, and at what it made of what was asked; tell."""
        try:
            self._follow(registered(self.store))
            self._unreachable = ""
        except RegistryError as error:
            if str(error) != self._unreachable:
                logger.warning("%s Shadowing goes on with what was fetched.", error)
            self._unreachable = str(error)
        if self.stopping.is_set():
            return
        self.feed.forget_others(self._asks)
        self._keep_process()
        self._tell()
        self.telling.say()

    def stop(self) -> None:
        """End the process."""
        self.process.stop()

    # What should shadow

    def _follow(self, models: dict[str, Registered]) -> None:
        for workload in set(self._asks) | set(self._failed):
            model = models.get(workload)
            asked = self._asks[workload].version if workload in self._asks else self._failed[workload][0]
            if model is None or model.aliases.get("challenger") != asked or model.aliases.get("champion") == asked:
                self._end(workload, asked, model)
        for workload, model in models.items():
            number, champion = model.aliases.get("challenger"), model.aliases.get("champion")
            if champion is not None:
                self.telling.withdraw(workload, champion)  # what serves is told by `serving.reconcile`
            if number is not None and number != champion and workload not in self._failed:
                self._ask(workload, number, self._share(workload, model))
        self._save()

    def _ask(self, workload: str, number: int, share: float) -> None:
        ask = self._asks.get(workload)
        if ask is not None:
            self._asks[workload] = Ask(number, ask.folder, share, ask.asked)
            return
        if self.stopping.is_set() or time.monotonic() < self._retry_at.get(workload, 0.0):
            return
        try:
            version = self.store.get(workload, number)
            if not any(name.startswith("noria.") for name in version.tags):
                self._retry_at[workload] = time.monotonic() + RETRY_SECONDS
                return  # somebody else's model in the same registry
            bundle = self.store.fetch(version, self.bundles)
        except BundleError as error:
            self._failed[workload] = number, str(error)
            return
        except (RegistryError, OSError) as error:
            self._retry_at[workload] = time.monotonic() + RETRY_SECONDS
            logger.warning("%s The challenger of %s is tried again in %.0f s.", error, workload, RETRY_SECONDS)
            return
        self._restarts.pop(workload, None)
        self.feed.dropped.pop(workload, None)
        self._asks[workload] = Ask(number, str(bundle.folder), share, uuid.uuid4().hex)

    def _end(self, workload: str, number: int, model: Registered | None) -> None:
        """The alias names another version, or none, or the challenger has become the champion."""
        shadowed = self._asks.pop(workload, None) is not None
        self._failed.pop(workload, None)
        self._ends.pop(workload, None)
        self._retry_at.pop(workload, None)
        self.feed.forget(workload)
        if model is None or model.aliases.get("champion") == number:
            self._said.pop((workload, number), None)
        elif shadowed:
            self._say(workload, number, f"stopped shadowing at {shadow_state.now()}")
            self._said.pop((workload, number), None)  # it may come back

    def _share(self, workload: str, model: Registered) -> float:
        """As the tag says; 1 where there is none; what it was where the tag makes no sense."""
        given = model.tags.get(SHARE_TAG, "1")
        try:
            share = float(given)
        except ValueError:
            share = math.nan
        if 0 <= share <= 1:
            self._troubles.pop(workload, None)
            return share
        trouble = f"the model's tag {SHARE_TAG} is '{given[:40]}'; it must be a number from 0 to 1"
        if self._troubles.get(workload) != trouble:
            logger.warning("Shadowing %s: %s.", workload, trouble)
        self._troubles[workload] = trouble
        return self._asks[workload].share if workload in self._asks else 1.0

    def _save(self) -> None:
        """Tell the process and the drain what should shadow; what this disk does not take is written later."""
        if self._asks != self._written:
            shadow_state.write(self.folder / "asked.json", self._asks)
            self._written = dict(self._asks)
            self._want()

    def _want(self) -> None:
        self.feed.wanted = frozenset(workload for workload, ask in self._asks.items() if ask.share > 0)

    # The process

    def _keep_process(self) -> None:
        if not self._asks:
            self.process.stop()
            return
        how = self.process.keep()
        if how:
            for workload in self._culprits():
                self._count_end(workload, how)

    def _culprits(self) -> list[str]:
        """The workloads that the process was busy with when it ended; all, where it was busy with none."""
        reached = shadow_state.read(self.folder / "state.json", Reached)
        busy = [
            workload
            for workload, ask in self._asks.items()
            if self.feed.taken(workload)
            or (workload in reached and reached[workload].asked == ask.asked and reached[workload].status == "loading")
        ]
        return busy or list(self._asks)

    def _count_end(self, workload: str, how: str) -> None:
        now = time.monotonic()
        ends = self._ends.setdefault(workload, deque(maxlen=MOST_ENDS))
        ends.append(now)
        self._restarts[workload] = self._restarts.get(workload, 0) + 1
        if len(ends) == MOST_ENDS and now - ends[0] < WITHIN_SECONDS:
            number = self._asks[workload].version
            self._give_up(workload, number, f"Its process {how}, and that was end number {MOST_ENDS} in a short time.")

    def _give_up(self, workload: str, number: int, reason: str) -> None:
        self._failed[workload] = number, reason
        del self._asks[workload]
        self.feed.forget(workload)
        self._save()

    # What is told

    def _tell(self) -> None:
        reached = shadow_state.read(self.folder / "state.json", Reached)
        for workload, ask in list(self._asks.items()):
            found = reached.get(workload)
            if found is not None and found.asked == ask.asked and found.status == "failed":
                self._give_up(workload, ask.version, found.reason)
        shown = {workload: self._status(workload, ask, reached.get(workload)) for workload, ask in self._asks.items()}
        for workload, (number, reason) in self._failed.items():
            shown[workload] = Status(
                number, 0.0, "failed", f"failed: {reason}", restarts=self._restarts.get(workload, 0)
            )
        for workload, status in shown.items():
            if status.status != "loading":
                self._say(workload, status.version, status.sentence)
        if shown != shadow_state.read(self.folder / "status.json", Status):
            shadow_state.write(self.folder / "status.json", shown)

    def _status(self, workload: str, ask: Ask, found: Reached | None) -> Status:
        if found is None or found.asked != ask.asked:
            found = Reached(ask.version, ask.asked, "loading")
        sentence = f"shadowing since {found.since}, share {ask.share:g}"
        if workload in self._troubles:
            sentence += f" ({self._troubles[workload]})"
        return Status(
            version=ask.version,
            share=ask.share,
            status=found.status,
            sentence=sentence if found.since else "loading as a shadow",
            since=found.since,
            asked=ask.asked,
            rows=found.rows,
            agreement=found.agreed / found.rows if found.rows else None,
            difference=found.difference / found.rows if found.rows else None,
            errors=found.errors,
            error=found.error,
            dropped=self.feed.dropped.get(workload, 0),
            waiting=self.feed.waiting(workload),
            restarts=self._restarts.get(workload, 0),
        )

    def _say(self, workload: str, number: int, sentence: str) -> None:
        """Once a sentence."""
        if self._said.get((workload, number)) != sentence:
            self._said[workload, number] = sentence
            self.telling.report(workload, number, sentence)
