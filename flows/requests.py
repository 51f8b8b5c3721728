"""How runs are asked for: the event that asks for a retrain, and running a deployment while following what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import LogSort
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound

from noria.errors import ServiceError

EVENT = "noria.retrain.requested"
UNDER_WAY = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def resource_id(workload: str) -> str:
    """The Prefect resource that events about a workload belong to."""
    return f"noria.workload.{workload}"


def ask(workload: str, reason: str, because: str, now: datetime) -> None:
    """Emit the event that the automation answers by running the retrain deployment.

    `reason` is the policy's word (quality, drift, ...), `because` its sentences.
    """
    emit_event(
        EVENT,
        resource={"prefect.resource.id": resource_id(workload), "prefect.resource.name": workload},
        payload={"now": now.isoformat(), "reason": reason, "because": because},
    )


def retrain_is_running(workload: str) -> bool:
    """Whether a retrain of the workload is under way; false where nothing was deployed."""
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"retrain/{workload}")
        except ObjectNotFound:
            return False
        return bool(under_way(client, DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))))


def under_way(client: SyncPrefectClient, deployments: DeploymentFilter) -> list[FlowRun]:
    """Runs of these deployments that are pending or running."""
    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNDER_WAY)))
    return client.read_flow_runs(flow_run_filter=wanted, deployment_filter=deployments)


def run_and_follow(name: str, parameters: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Run a deployment ("retrain/taxi") in the warm engine, pass on what it logs, return what its flow returned.

    Raises:
        ServiceError: there is no such deployment, the run failed or was dropped (with its own sentence), or Prefect
            does not answer, for example because the stack was killed.
    """
    try:
        return _run_and_follow(name, parameters, say)
    except ObjectNotFound:
        raise ServiceError(
            f"Nothing is deployed as {name}; is the workload in NORIA_WORKLOADS of `noria up`?"
        ) from None
    except httpx.TransportError as error:
        raise ServiceError(
            f"Prefect does not answer ({error}); `noria status` shows what runs, `noria up` starts it."
        ) from None


def _run_and_follow(name: str, parameters: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    made = run_deployment(name, parameters=parameters, timeout=0, as_subflow=False)
    with get_client(sync_client=True) as client:
        seen = 0
        while True:
            run = client.read_flow_run(cast(FlowRun, made).id)
            seen += _pass_on(client, run.id, seen, say)
            if run.state is not None and run.state.is_final():
                break
            time.sleep(0.3)
        _pass_on(client, run.id, seen, say)
    if not run.state.is_completed():
        raise ServiceError(f"{name} ended {str(run.state.name).lower()}: {run.state.message or 'see the Prefect UI'}")
    outcome: dict[str, Any] = run.state.result()
    return outcome


def _pass_on(client: SyncPrefectClient, run: UUID, offset: int, say: Callable[[str], None]) -> int:
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    entries = client.read_logs(log_filter=wanted, sort=LogSort.TIMESTAMP_ASC, offset=offset, limit=100)
    for entry in entries:
        say(entry.message)
    return len(entries)
