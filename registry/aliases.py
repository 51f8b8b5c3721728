"""All aliases of all registered models in one request: what a server polls. Nothing is decided here."""

from __future__ import annotations

from registry.connection import answered
from registry.store import Store


def aliases(store: Store) -> dict[str, dict[str, int]]:
    """By registered model, the version that each of its aliases names.

    Raises:
        RegistryError: MLflow does not answer.
    """
    found: dict[str, dict[str, int]] = {}
    token: str | None = None
    with answered(store.uri, "reading the aliases"):
        while True:
            page = store.client.search_registered_models(max_results=1000, page_token=token)
            for model in page:
                found[model.name] = {alias: int(number) for alias, number in model.aliases.items()}
            token = page.token
            if not token:
                return found
