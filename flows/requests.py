"""How a retrain is asked for, and how one at a time is kept: the event, its resource, the lock, the running one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound

EVENT = "noria.retrain.requested"
LEASE = 60.0
"""Seconds after which the lock of a killed retrain is free again."""


class RetrainIsRunning(Exception):
    """A retrain of the workload already runs."""


def resource_id(workload: str) -> str:
    """The Prefect resource that events about a workload belong to."""
    return f"noria.workload.{workload}"


def single_flight_name(workload: str) -> str:
    """The global concurrency limit (of one) that every retrain of a workload takes, whoever asked for it."""
    return f"noria-retrain-{workload}"


def ask(workload: str, reason: str, because: str, now: datetime) -> None:
    """Emit the event that the automation answers by running the retrain deployment.

    `reason` is the policy's word (quality, drift, ...), `because` its sentences.
    """
    emit_event(
        EVENT,
        resource={"prefect.resource.id": resource_id(workload), "prefect.resource.name": workload},
        payload={"now": now.isoformat(), "reason": reason, "because": because},
    )


@contextmanager
def single_flight(workload: str) -> Iterator[None]:
    """Hold the workload's retrain lock.

    Raises:
        RetrainIsRunning: somebody else holds it.
    """
    name = single_flight_name(workload)
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, 1)
    try:
        # One second, not zero: zero means no limit to the waiting.
        with concurrency(name, timeout_seconds=1, strict=True, lease_duration=LEASE):
            yield
    except TimeoutError:
        raise RetrainIsRunning(f"A retrain of {workload} is running; this request is dropped.") from None


def retrain_is_running(workload: str) -> bool:
    """Whether somebody holds the workload's retrain lock now."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(single_flight_name(workload)).active_slots > 0
        except ObjectNotFound:
            return False
