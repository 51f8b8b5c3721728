"""The home page: links to the UIs, and for each workload what serves, what the last watch said, what runs next.

A small ASGI app on loopback, served by its own process beside the stack. It reads; it changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader, select_autoescape
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from flows import links
from flows.shadow import standing
from flows.site import Site, read_state
from noria.errors import NoriaError
from noria.records import moment
from noria.workload import load
from registry.store import Store
from serving.shadow_state import Status

LABELS = {"prefect": "Prefect", "mlflow": "MLflow", "evidently": "Evidently", "serving": "Server"}
PURPOSES = {
    "prefect": "schedule flows, see what triggered what",
    "mlflow": "promote models, compare runs",
    "evidently": "watch drift over time",
    "serving": "ask for predictions, read the API",
}
"""What each UI is for, in a newcomer's words."""
SHOWN = 4
"""Runs of each list."""
BEGUN = [StateType.RUNNING, StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]


def overview(site: Site) -> dict[str, Any]:
    """What the page shows, as plain data (also served as /overview.json)."""
    state = read_state(site.settings.root)
    pages = {"prefect": links.deployments(site), "mlflow": links.models(site)}
    services = [
        {"name": LABELS[name], "purpose": PURPOSES[name], "page": pages.get(name, entry["url"])}
        | {key: entry[key] for key in ("url", "ready", "restarts")}
        for name, entry in state.get("services", {}).items()
        if name in LABELS
    ]
    store, shadows = Store(site.address("mlflow_uri")), standing(site)
    workloads = [_workload(site, store, path, shadows) for path in site.settings.imports]
    return {
        "services": services,
        "workloads": workloads,
        "events": state.get("events", [])[-5:],
        "at": _show(datetime.now(UTC)),
    }


def _workload(site: Site, store: Store, path: str, shadows: Mapping[str, Status]) -> dict[str, Any]:
    try:
        workload = load(path)
        name = workload.name
        champion = store.version(name, "champion")
        tags = dict(champion.tags) if champion else {}
        watch = json.loads(tags.get("noria.watch", "null"))
        found = _runs(site, name)
        pages = {
            "versions and aliases": links.model(site, name) if champion else "",
            "training runs": links.training_runs(site, store, name),
            "dashboard": links.dashboard(site, name),
            "try it": f"{site.settings.serving_url}/docs#{name}" if champion and site.settings.serving_url else "",
        }
        return {
            "name": name,
            "champion": champion.number if champion else None,
            "since": _show(moment(tags["noria.promoted_at"])) if "noria.promoted_at" in tags else "",
            "error": tags.get("noria.error", ""),
            "link": links.model(site, name, champion.number if champion else None),
            "watch": watch,
            "report": links.evidently(site, watch["page"]) if watch and "page" in watch else "",
            "shadow": _shadow(site, shadows[name], name) if name in shadows else None,
            "pages": {label: page for label, page in pages.items() if page},
            "runs": found,
        }
    except NoriaError as error:
        return {"name": path, "trouble": str(error)}


def _shadow(site: Site, status: Status, name: str) -> dict[str, Any]:
    """How the challenger of a workload stands."""
    since = _show(moment(status.since)) if status.since else ""
    return {**asdict(status), "since": since, "link": links.model(site, name, status.version)}


def _runs(site: Site, workload: str) -> dict[str, list[dict[str, str]]]:
    """The workload's deployments, and its last and next runs."""
    with get_client(sync_client=True) as client:
        flows = {found.id: found.name for found in client.read_flows()}
        named = DeploymentFilter(name=DeploymentFilterName(any_=[workload]))
        deployments = client.read_deployments(deployment_filter=named)

        def runs(states: list[StateType], sort: FlowRunSort) -> list[dict[str, str]]:
            wanted = FlowRunFilter(
                tags=FlowRunFilterTags(all_=["noria", workload]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
            )
            found = client.read_flow_runs(flow_run_filter=wanted, sort=sort, limit=SHOWN)
            return [_run(site, run, flows.get(run.flow_id, "")) for run in found]

        return {
            "deployments": [
                {"flow": flows[one.flow_id], "page": links.deployment(site, one.id)}
                for one in sorted(deployments, key=lambda one: flows[one.flow_id])
            ],
            "last": runs(BEGUN, FlowRunSort.START_TIME_DESC),
            "next": runs([StateType.SCHEDULED], FlowRunSort.EXPECTED_START_TIME_ASC),
        }


def _run(site: Site, run: FlowRun, flow: str) -> dict[str, str]:
    when = run.end_time or run.start_time or run.expected_start_time
    return {
        "flow": flow,
        "name": run.name,
        "state": str(run.state.name) if run.state else "",
        "when": _show(when) if when else "",
        "page": links.flow_run(site, run.id),
    }


def _show(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M}"


def make_app(site: Site) -> Starlette:
    """The home page's ASGI app."""
    templates = Environment(loader=PackageLoader("flows", "pages"), autoescape=select_autoescape(), trim_blocks=True)

    async def page(_: Request) -> Response:
        try:
            content = await asyncio.to_thread(overview, site.found())
        except NoriaError as error:
            return HTMLResponse(templates.get_template("home.html").render(problem=str(error)), status_code=503)
        return HTMLResponse(templates.get_template("home.html").render(**content))

    async def data(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(overview, site.found()))

    async def alive(_: Request) -> Response:
        return JSONResponse({"alive": True})

    return Starlette(routes=[Route("/", page), Route("/overview.json", data), Route("/health", alive)])


def main() -> None:
    """Serve the page on the port given as the first argument."""
    uvicorn.run(make_app(Site.here()), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
