"""What Prefect knows of noria: a work pool, three deployments a workload with their schedules, and the automation that
answers a request for a retrain.

Made anew at every start without touching what a person changed in the UI: an existing deployment gets new code and
parameters' schema only; its schedules, its pause and its parameters stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.states import Crashed
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from flows.requests import EVENT, resource_id, under_way
from noria.workload import load

POOL = "noria"
FLOWS = {
    "retrain": "flows.retrain.retrain",
    "watch": "flows.watch.watch",
    "batch": "flows.batch.batch",
}
ABOUT = {
    "retrain": "Train a candidate on the newest data, register it, and promote it if the gate lets it pass.",
    "watch": "Judge the champion on the newest window, publish the report, ask for a retrain when the policy says so.",
    "batch": "Score a table of the lake or a Parquet file with the champion.",
}


def deploy(workloads: Sequence[str], engine: Path, folder: Path) -> None:
    """Make or refresh the pool, and the deployments and automation of each workload (import strings)."""
    with get_client(sync_client=True) as client:
        _pool(client, engine, folder)
        for path in workloads:
            workload = load(path)
            made = {
                name: _deployment(client, entrypoint, workload.name, path, cron=getattr(workload.schedules, name))
                for name, entrypoint in FLOWS.items()
            }
            _automation(client, made["retrain"], workload.name)


def crash_orphans() -> None:
    """Say of runs that were under way when the worker ended that they crashed, so that they hold no place. Call before
    the worker starts."""
    with get_client(sync_client=True) as client:
        for run in under_way(client, DeploymentFilter(tags=DeploymentFilterTags(all_=["noria"]))):
            client.set_flow_run_state(
                run.id, Crashed(message="The stack stopped while this run was under way."), force=True
            )


def _pool(client: SyncPrefectClient, engine: Path, folder: Path) -> None:
    template = ProcessWorker.get_default_base_job_template()
    variables = template["variables"]["properties"]
    # -I -S: the relay needs the standard library only, and starts in 20 ms.
    variables["command"]["default"] = f"{sys.executable} -I -S {Path(__file__).with_name('run_warm.py')} {engine}"
    variables["working_dir"]["default"] = str(folder)
    try:
        client.read_work_pool(POOL)
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
    except ObjectNotFound:
        about = "Runs flows in processes forked from noria's warm engine"
        client.create_work_pool(
            WorkPoolCreate(name=POOL, type="process", base_job_template=template, description=about)
        )


def _deployment(client: SyncPrefectClient, entrypoint: str, name: str, path: str, *, cron: str | None) -> UUID:
    flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint)
    code: dict[str, Any] = {
        "entrypoint": entrypoint,
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        "description": ABOUT[flow.name],
        "work_pool_name": POOL,
    }
    try:
        found = client.read_deployment_by_name(f"{flow.name}/{name}")
        client.update_deployment(found.id, DeploymentUpdate(**code))
        return found.id
    except ObjectNotFound:
        schedules = (
            [DeploymentScheduleCreate(schedule=CronSchedule(cron=cron, timezone="UTC"), active=True)] if cron else []
        )
        return client.create_deployment(
            client.create_flow(flow),
            name,
            path=None,
            parameters={"workload": path},
            enforce_parameter_schema=True,
            tags=["noria", name],
            schedules=schedules,
            concurrency_limit=1,
            concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            **code,
        )


def _automation(client: SyncPrefectClient, deployment: UUID, workload: str) -> None:
    parameters = {
        key: {"__prefect_kind": "jinja", "template": f"{{{{ event.payload.{key} }}}}"}
        for key in ("now", "reason", "because")
    }
    wanted = AutomationCore(
        name=f"retrain {workload} when asked",
        description="A watch found a reason to retrain and emitted an event; this runs the retrain deployment.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={EVENT},
            match={"prefect.resource.id": resource_id(workload)},
            threshold=1,
            within=timedelta(0),
        ),
        actions=[RunDeployment(source="selected", deployment_id=deployment, parameters=parameters, job_variables=None)],
    )
    if not client.read_automations_by_name(wanted.name):
        client.create_automation(wanted)
