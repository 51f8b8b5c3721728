"""The home page: links to the UIs, and for each workload what serves, what the last watch said, what runs next.

A small ASGI app on loopback, served by its own process beside the stack. It reads; it changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader, select_autoescape
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from flows.site import Site, read_state
from noria.errors import NoriaError
from noria.workload import Workload, load
from registry.store import Store

LABELS = {"prefect": "Prefect", "mlflow": "MLflow", "evidently": "Evidently", "serving": "Server"}
PURPOSES = {
    "prefect": "schedule flows, see what triggered what",
    "mlflow": "promote models, compare runs",
    "evidently": "watch drift over time",
    "serving": "ask for predictions, read the API",
}
"""What each UI is for, in a newcomer's words."""


def overview(site: Site) -> dict[str, Any]:
    """What the page shows, as plain data (also served as /overview.json)."""
    state = read_state(site.settings.root)
    services = [
        {"name": LABELS[name], "purpose": PURPOSES[name], **{key: entry[key] for key in ("url", "ready", "restarts")}}
        for name, entry in state.get("services", {}).items()
        if name in LABELS
    ]
    store = Store(site.address("mlflow_uri"))
    workloads = [_workload(site, store, path) for path in site.settings.imports]
    return {
        "services": services,
        "workloads": workloads,
        "events": state.get("events", [])[-5:],
        "at": _show(datetime.now(UTC)),
    }


def _workload(site: Site, store: Store, path: str) -> dict[str, Any]:
    try:
        workload = load(path)
        champion = store.version(workload.name, "champion")
        tags = dict(champion.tags) if champion else {}
        mlflow, name = site.settings.mlflow_uri, workload.name
        return {
            "name": name,
            "champion": champion.number if champion else None,
            "since": tags.get("noria.promoted_at", "")[:16].replace("T", " "),
            "link": f"{mlflow}/#/models/{name}" + (f"/versions/{champion.number}" if champion else ""),
            "watch": json.loads(tags.get("noria.watch", "null")),
            "runs": _runs(workload),
        }
    except NoriaError as error:
        return {"name": path, "error": str(error)}


def _runs(workload: Workload) -> dict[str, list[dict[str, str]]]:
    """Last finished and next scheduled runs of the workload's deployments."""
    ended = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]
    with get_client(sync_client=True) as client:
        named = DeploymentFilter(name=DeploymentFilterName(any_=[workload.name]))
        deployments = {found.id: found for found in client.read_deployments(deployment_filter=named)}
        if not deployments:
            return {"last": [], "next": []}
        flows = {found.id: client.read_flow(found.flow_id).name for found in deployments.values()}

        def runs(states: list[StateType], sort: FlowRunSort) -> list[FlowRun]:
            wanted = FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=list(deployments)),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
            )
            return client.read_flow_runs(flow_run_filter=wanted, sort=sort, limit=3)

        last = runs(ended, FlowRunSort.START_TIME_DESC)
        following = runs([StateType.SCHEDULED], FlowRunSort.EXPECTED_START_TIME_ASC)
    return {"last": [_run(run, flows) for run in last], "next": [_run(run, flows) for run in following]}


def _run(run: FlowRun, flows: dict[Any, str]) -> dict[str, str]:
    state = str(run.state.name) if run.state else ""
    when = run.end_time or run.start_time or run.expected_start_time
    return {
        "flow": flows.get(run.deployment_id, ""),
        "state": state,
        "when": _show(when) if when else "",
        "id": str(run.id),
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
        return HTMLResponse(
            templates.get_template("home.html").render(**content, prefect=site.found().settings.prefect_url[:-4])
        )

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
