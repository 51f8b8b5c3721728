"""Where a workload's dashboard is: known without Evidently, which takes seconds to import."""

from __future__ import annotations

import uuid

NAMESPACE = uuid.UUID("6f1b3c52-7a0e-5d3b-9a57-0d6a6e6f7269")
"""Projects are found by an id made from the workload's name, so that two writers cannot make two."""


def project_of(workload: str) -> uuid.UUID:
    """The id of a workload's project, whether or not it is there yet."""
    return uuid.uuid5(NAMESPACE, workload)
