"""All registered models in one request, with their aliases and tags: what a server polls. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry.connection import answered
from registry.store import Store


@dataclass(frozen=True)
class Registered:
    """One registered model."""

    aliases: Mapping[str, int]
    """The version that each alias names."""
    tags: Mapping[str, str]
    """Tags of the model itself, not of a version."""


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
                found[model.name] = Registered(named, dict(model.tags))
            token = page.token
            if not token:
                return found


def aliases(store: Store) -> dict[str, dict[str, int]]:
    """By registered model, the version that each of its aliases names. Raises RegistryError as `registered` does."""
    return {name: dict(model.aliases) for name, model in registered(store).items()}
