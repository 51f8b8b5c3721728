"""What `noria shadow` shows: champion and challenger on the same requests of a window, and how the shadow stands.

Not here: the comparison itself (`monitoring.compare`), the shadow (`serving.shadow`).
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from rich.table import Table

from flows.site import Site
from monitoring.compare import Comparison, Rules, compare
from noria.errors import RegistryError, SettingsError
from noria.records import Interval, Window
from noria.workload import Workload
from registry.store import Store
from serving import shadow_state
from serving.shadow_state import Status

UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def window_of(length: str, now: datetime) -> Window:
    """The window of that length ("36h", "7d", "2w") that ends `now`. Raises SettingsError when it is none."""
    found = re.fullmatch(r"([1-9]\d{0,4})([hdw])", length)
    if not found:
        raise SettingsError(f"'{length}' is no length of time; write one such as 36h, 7d or 2w.")
    return Window.last(timedelta(**{UNITS[found[2]]: int(found[1])}), now)


def compared(site: Site, workload: Workload, window: Window) -> Comparison:
    """Champion and challenger of a workload in a window.

    Raises:
        RegistryError: MLflow does not answer, or there is no champion or no challenger.
    """
    store, name = Store(site.address("mlflow_uri")), workload.name
    numbers = {}
    for alias in ("champion", "challenger"):
        version = store.version(name, alias)
        if version is None:
            raise RegistryError(f"{name} has no {alias}; set the alias '{alias}' on a version in MLflow.")
        numbers[alias] = version.number
    lake = site.lake(workload)
    return compare(
        lake.predictions(window),
        lake.shadow(window, numbers["challenger"]),
        lake.labels(window.end),
        workload=name,
        versions=(numbers["champion"], numbers["challenger"]),
        window=window,
        rules=Rules(workload.loss, workload.gate.minimum_rows, workload.gate.level),
    )


def standing(site: Site) -> dict[str, Status]:
    """How each workload's shadow stands, where the server runs on this machine; empty where it does not, or where that
    cannot be read now."""
    try:
        return shadow_state.read(site.settings.serving / "shadow" / "status.json", Status)
    except OSError:
        return {}


def table(found: Comparison, unit: str) -> Table:
    """The figures for a terminal."""
    shown = Table(box=None, header_style="dim", padding=(0, 2))
    title = f"{found.workload} in {found.window}"
    for column in (title, f"champion {found.champion}", f"challenger {found.challenger}"):
        shown.add_column(column)
    errors = [_interval(one, unit) for one in (found.champion_error, found.challenger_error)]
    shown.add_row(f"error on {found.labelled:,} labelled rows", *errors)
    shown.add_row("batch of a row, mean", *(_number(one, " ms") for one in (found.champion_ms, found.challenger_ms)))
    shown.add_row("rows that both answered", f"{found.rows:,}")
    shown.add_row("same action", "no actions" if found.same_action is None else f"{found.same_action:.1%}")
    parts = (found.difference_mean, found.difference_p95, found.difference_max)
    shown.add_row("score difference: mean, 95%, largest", ", ".join(_number(one) for one in parts))
    shown.add_row("rank correlation", _number(found.rank_correlation))
    return shown


def _interval(found: Interval | None, unit: str) -> str:
    return "unknown" if found is None else f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g}) {unit}".strip()


def _number(value: float | None, unit: str = "") -> str:
    return "unknown" if value is None else f"{value:.3g}{unit}"
