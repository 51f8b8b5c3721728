"""From a score to an action: ordered bands, declared as data, carried in the bundle.

Bands((Band("spam", 0.9), Band("review", 0.5)), otherwise="inbox")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from noria.errors import WorkloadError


@dataclass(frozen=True)
class Band:
    """Scores strictly above `above` (and in no higher band) lead to `action`."""

    action: str
    above: float


@dataclass(frozen=True)
class Bands:
    """Bands from the highest to the lowest. Without any, a score has no action."""

    bands: tuple[Band, ...] = ()
    otherwise: str | None = None

    def __post_init__(self) -> None:
        limits = [band.above for band in self.bands]
        if any(high <= low for high, low in pairwise(limits)):
            raise WorkloadError(f"Bands must be ordered from the highest limit to the lowest, and differ: {limits}.")
        if self.bands and not self.otherwise:
            raise WorkloadError("Bands need `otherwise`: the action of a score below every band.")

    def actions(self, scores: np.ndarray) -> list[str | None]:
        """The action of each score; `scores` has shape [n]."""
        if not self.bands:
            return [self.otherwise] * len(scores)
        chosen = np.full(len(scores), len(self.bands))
        for index in range(len(self.bands) - 1, -1, -1):
            chosen[scores > self.bands[index].above] = index
        names = [*(band.action for band in self.bands), self.otherwise]
        return [names[index] for index in chosen.tolist()]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; `from_json` reads it back equal."""
        return {
            "bands": [{"action": band.action, "above": band.above} for band in self.bands],
            "otherwise": self.otherwise,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Bands:
        """The bands that `to_json` wrote."""
        return cls(tuple(Band(**band) for band in data["bands"]), data["otherwise"])
