"""What a worker is told at its start: one dataclass that travels as JSON on its command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from serving.guard import Protection
from serving.limits import Limits


@dataclass(frozen=True)
class Config:
    """How a worker answers; what it answers with is its generation's business."""

    protection: Protection | None = None
    """Who may ask for what; None: everybody for everything, with the default limits."""
    batching: bool = True
    """False: every request runs alone."""
    ack: str = "fast"
    """`durable`: an answer is sent after its log is on the disk. `fast`: after the operating system has it."""
    acks: Mapping[str, str] = field(default_factory=dict)
    """The same for single workloads."""

    @property
    def limits(self) -> Limits:
        """How much a client may ask."""
        return self.protection.limits if self.protection else Limits()

    def durable(self, workload: str) -> bool:
        """Whether the workload's answers wait for the disk."""
        return self.acks.get(workload, self.ack) == "durable"

    def to_json(self) -> str:
        """For a worker's command line; there is no secret in it."""
        return json.dumps({**asdict(self), "protection": self.protection and self.protection.to_json()})

    @classmethod
    def from_json(cls, text: str) -> Config:
        """What `to_json` wrote."""
        given = json.loads(text)
        protection = given["protection"]
        return cls(**{**given, "protection": Protection.from_json(protection) if protection else None})
