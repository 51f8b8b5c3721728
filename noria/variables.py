"""The environment: the only file that reads and changes it by itself, with the standard library alone.

A worker imports this and not the settings, whose library would be a quarter of its imports. Not here: what the
variables mean (`noria.settings`).
"""

from __future__ import annotations

import os


def variables(prefix: str) -> dict[str, str]:
    """The environment's variables that begin with `prefix`, such as NORIA_LIMIT_ (`serving.limits` knows which)."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment with `extra` on top: what a started service gets."""
    return {**os.environ, **extra}


def export(**variables: str) -> None:
    """Set variables that libraries read from the environment (for example PREFECT_API_URL) before they are imported."""
    os.environ.update(variables)


def replace_environment(variables: dict[str, str]) -> None:
    """Make the environment exactly `variables`: for a forked process that continues as another one."""
    os.environ.clear()
    os.environ.update(variables)
