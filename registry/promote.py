"""Act on a verdict: which alias moves first. Moving `champion` by hand in the MLflow UI deploys just the same.

Aliases move one at a time, so each order below is chosen for what is left when the process dies in between.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from noria.errors import RegistryError
from noria.records import Version

if TYPE_CHECKING:
    from registry.store import Store  # imports mlflow, which only the caller needs

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
PROMOTED_AT, REASON = "noria.promoted_at", "noria.reason"


def promote(store: Store, version: Version, *, reason: str, now: datetime) -> None:
    """Make a version the champion and the old champion `previous`; nothing happens when it is the champion already.

    Order: `previous`, tags, `champion`, so that until the last move the old champion serves and a repeat completes it.

    Raises:
        RegistryError: there is no such version, or it is no whole bundle.
    """
    version = store.get(version.workload, version.number)
    champion = store.version(version.workload, CHAMPION)
    if champion is not None and champion.number == version.number:
        return
    store.require_whole(version)
    if champion is not None:
        store.move(version.workload, PREVIOUS, champion.number)
    _install(store, version, reason, now)
    challenger = store.version(version.workload, CHALLENGER)
    if challenger is not None and challenger.number == version.number:
        store.drop(version.workload, CHALLENGER)


def rollback(store: Store, workload: str, *, now: datetime) -> Version:
    """Make `previous` the champion again and the champion `previous`; a second rollback undoes the first.

    Order: tags, `champion`, `previous`, so that a version is named by an alias until another names it.

    Raises:
        RegistryError: there is no champion, or nothing to go back to.
    """
    champion, previous = store.version(workload, CHAMPION), store.version(workload, PREVIOUS)
    if champion is None:
        raise RegistryError(f"'{workload}' has no champion to roll back; promote a version first.")
    if previous is None or previous.number == champion.number:
        raise RegistryError(
            f"'{workload}' has no previous champion; promote the version you want: `noria promote {workload} VERSION`."
        )
    store.require_whole(previous)
    _install(store, previous, f"Rolled back from version {champion.number}.", now)
    store.move(workload, PREVIOUS, champion.number)
    return store.get(workload, previous.number)


def _install(store: Store, version: Version, reason: str, now: datetime) -> None:
    store.tag(version, {PROMOTED_AT: now.isoformat(timespec="seconds"), REASON: reason})
    store.move(version.workload, CHAMPION, version.number)
