"""How a retrain is asked for, and how one at a time is kept: the event, its resource, the running one, the lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType

EVENT = "noria.retrain.requested"


def resource(workload: str) -> dict[str, str]:
    """The Prefect resource that events about a workload belong to."""
    return {"prefect.resource.id": f"noria.workload.{workload}", "prefect.resource.name": workload}
