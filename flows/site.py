"""Where everything of one home is: the addresses of its services, its lake, its registry, its workloads.

The one thing that flows, commands and pages share. It starts nothing and imports no heavy library; the registry client
is made when asked for.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noria.errors import NoriaError, ServiceError, SettingsError, WorkloadError
from noria.records import moment
from noria.settings import Settings, load_settings
from noria.variables import export

if TYPE_CHECKING:
    from noria.lake import Lake
    from noria.workload import Workload

STATE = "stack.json"


def _load(path: str) -> Workload:
    from noria.workload import load

    return load(path)


def read_state(home: Path) -> dict[str, Any]:
    """What the home's supervisor last wrote; empty when there was none."""
    try:
        state: dict[str, Any] = json.loads((home / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return state


def write_state(home: Path, state: dict[str, Any]) -> None:
    """Replace the state file in one step."""
    aside = home / f"{STATE}.{os.getpid()}"
    aside.write_text(json.dumps(state, indent=2))
    aside.replace(home / STATE)


@dataclass(frozen=True)
class Site:
    """Settings with the addresses found."""

    settings: Settings

    @classmethod
    def here(cls, **changes: object) -> Site:
        """The site that the environment describes, with the addresses of its running stack."""
        return cls(load_settings(**changes)).found()

    def found(self) -> Site:
        """This site with the addresses of the stack that runs in its home; settings that name an address win."""
        state = read_state(self.settings.root)
        if state.get("phase") in (None, "stopped"):
            return self
        services = state["services"]
        wanted = {"mlflow_uri": "mlflow", "prefect_url": "prefect", "ray_address": "ray", "serving_url": "serving"}
        found = {
            setting: services[name]["url"] + ("/api" if name == "prefect" else "")
            for setting, name in wanted.items()
            if name in services and not getattr(self.settings, setting)
        }
        return Site(self.settings.model_copy(update=found))

    def forwarded(self) -> dict[str, str]:
        """The settings as environment variables, for a process that must see the same site."""
        given = {
            name: value for name, value in self.settings.model_dump().items() if name in self.settings.model_fields_set
        }
        return {f"NORIA_{name.upper()}": str(value) for name, value in {**given, "home": self.settings.root}.items()}

    def enter(self) -> None:
        """Make this site the one that flows of this process find. Call before prefect is imported: it reads its
        address from the environment then."""
        export(**self.forwarded())
        if self.settings.prefect_url:
            export(
                PREFECT_API_URL=self.settings.prefect_url,
                PREFECT_HOME=str(self.settings.root / "prefect"),
                PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL",
                DO_NOT_TRACK="1",
            )

    def address(self, setting: str) -> str:
        """An address that must be there.

        Raises:
            ServiceError: nothing runs and nothing is configured.
        """
        value = str(getattr(self.settings, setting))
        if not value:
            raise ServiceError(
                f"No stack runs in {self.settings.root} and NORIA_{setting.upper()} is not set; "
                "start one with `noria up`."
            )
        return value

    def lake(self, workload: Workload) -> Lake:
        """The lake's tables of a workload."""
        from noria.lake import Lake

        return Lake(str(self.settings.lake), workload.name, workload.schema)

    def workload(self, name: str) -> Workload:
        """A workload by name (one of NORIA_WORKLOADS) or by import string. Raises WorkloadError."""
        return _load(self.path(name))

    def path(self, name: str) -> str:
        """The import string of a workload given by name or import string."""
        if ":" in name:
            return name
        known: dict[str, str] = {}
        for path in self.settings.imports:
            try:
                known[_load(path).name] = path
            except NoriaError as error:
                known[path] = f"does not load: {error}"
        if name not in known:
            raise WorkloadError(
                f"There is no workload '{name}'; known are {', '.join(known)}. "
                "Give an import string (module:NAME) or add it to NORIA_WORKLOADS."
            )
        return known[name]


def now_of(workload: Workload, given: str | datetime | None = None) -> datetime:
    """The time that a flow runs at: as given, else the end of a recorded stream, else the clock.

    Raises:
        SettingsError: what is given is no time.
    """
    if given:
        try:
            return moment(given)
        except ValueError:
            raise SettingsError(f"'{given}' is no time; write one such as 2020-03-15 or 2020-03-15T08:30:00.") from None
    return workload.until or datetime.now(UTC)
