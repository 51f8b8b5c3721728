"""All registered models in one request, with their aliases and tags: what a server polls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry.connection import answered
from registry.store import PREFIX, Store


@dataclass(frozen=True)
class Registered:
    """One registered model."""

    aliases: Mapping[str, int]
    """The version that each alias names."""
    tags: Mapping[str, str]
    """Tags of the model itself, not of a version."""
    made: int = 0
    """When it was registered: one that was deleted and registered anew counts its versions from 1 again."""
    ours: bool = True
    """Whether it, or its newest version, was registered by noria."""


def registered(store: Store) -> dict[str, Registered]:
    """Every registered model by name.

    Raises:
        RegistryError: MLflow does not answer.
    """
    found: dict[str, Registered] = {}
    token: str | None = None
    with answered(store.uri, "reading the aliases"):
        while True:
            page = store.client.search_registered_models(max_results=1000, page_token=token)
            for model in page:
                named = {alias: int(number) for alias, number in model.aliases.items()}
                known = [*model.tags, *(tag for version in model.latest_versions for tag in version.tags)]
                ours = any(tag.startswith(PREFIX) for tag in known)
                found[model.name] = Registered(named, dict(model.tags), model.creation_timestamp, ours)
            token = page.token
            if not token:
                return found


def keep_previous(store: Store, workload: str, champion: int, previous: int | None, replaced: int) -> None:
    """Whoever moved the champion, the way back leads to the version that answered before, `replaced`; unless an alias
    has moved since, from `champion` and `previous`, which somebody did on purpose.

    Raises:
        RegistryError: MLflow does not answer.
    """
    named = _named(store, workload)
    if (named.get("champion"), named.get("previous")) != (champion, previous) or replaced == previous:
        return
    store.move(workload, "previous", replaced)
    # A promotion of just that version may have come between: then the way back leads to this one.
    if _named(store, workload).get("champion") == replaced:
        store.move(workload, "previous", champion)


def _named(store: Store, workload: str) -> Mapping[str, int]:
    model = registered(store).get(workload)
    return {} if model is None else model.aliases
