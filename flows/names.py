"""What runs are called in the Prefect UI: the workload and the moment that they look back from."""

from __future__ import annotations

from prefect.runtime import flow_run

from flows.site import now_of
from noria.errors import NoriaError
from noria.workload import load


def run_name() -> str:
    """The running flow's workload, its `now`, and its reason where it has one: "taxi 2020-03-30 quality"."""
    given = flow_run.get_parameters()
    path, now = str(given.get("workload", "")), given.get("now")
    try:
        workload = load(path)
        end = now_of(workload, now)
    except (NoriaError, ValueError):
        # The flow itself will say what is wrong.
        return " ".join(str(part) for part in (path, now) if part)
    moment = f"{end:%Y-%m-%d}" if f"{end:%H:%M:%S}" == "00:00:00" else f"{end:%Y-%m-%d %H:%M}"
    return f"{workload.name} {moment} {given.get('reason', '')}".strip()
