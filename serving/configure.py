"""From the settings to what a worker is told. Not on a worker's path: it reads no environment."""

from __future__ import annotations

from noria.settings import Settings
from noria.variables import variables
from serving.config import Config
from serving.guard import protection
from serving.limits import PREFIX


def configure(settings: Settings, host: str, *, is_open: bool, workers: int) -> Config:
    """How workers answer that listen on `host`. Raises SettingsError."""
    guarded = protection(settings, variables(PREFIX), host, is_open=is_open, workers=workers)
    pairs = [part.split("=") for part in settings.acks.split(",") if part.strip()]
    acks = {name.strip(): ack.strip() for name, ack in pairs}
    return Config(guarded, batching=settings.batching, ack=settings.ack, acks=acks)
