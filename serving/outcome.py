"""What one run of a model gave, and each request's share of it.

The values of a run become JSON or bytes once, however many requests share it. Not here: what an answer is made of
(`serving.results`), the run (`serving.batch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import orjson

from noria.runtime import SCORE
from serving.datatypes import to_bytes

if TYPE_CHECKING:
    from serving.model import Model

PREDICTION_ID = "prediction_id"


class Outcome:
    """One run."""

    __slots__ = ("_raw", "_texts", "actions", "ids", "inner", "model", "outputs", "shared")

    def __init__(
        self,
        model: Model,
        outputs: Mapping[str, np.ndarray],
        ids: Sequence[str],
        actions: Sequence[str | None],
        *,
        shared: bool = False,
    ) -> None:
        """`outputs` are the graph's, [n, ...] each; `ids` the prediction ids [n]; `actions` what the decision bands say
        of each score [n], empty for a plain model; `shared`: several requests have a share."""
        self.model, self.outputs, self.ids, self.actions, self.shared = model, outputs, ids, actions, shared
        first = 1 if shared else 0
        self.inner = tuple([array.shape[first:] for array in outputs.values()])
        """The shapes of the outputs; of shared ones without the rows."""
        self._texts: dict[str, list[bytes]] = {}
        self._raw: dict[str, tuple[bytes, int]] = {}

    def whole(self) -> Scored:
        """The share of the only request."""
        return Scored(self, 0, len(self.ids))

    def texts(self, name: str) -> list[bytes]:
        """The values of each row of a numeric output as JSON, without the brackets around them."""
        found = self._texts.get(name)
        if found is None:
            array = self.outputs[name]
            flat = array.reshape(len(array), -1)
            dumped = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)
            found = self._texts[name] = dumped[2:-2].split(b"],[")
        return found

    def raw(self, name: str, datatype: str) -> tuple[bytes, int]:
        """The bytes of a numeric output, and how many a row has."""
        found = self._raw.get(name)
        if found is None:
            content = to_bytes(datatype, self.outputs[name])
            found = self._raw[name] = content, len(content) // len(self.outputs[name])
        return found


@dataclass(slots=True)
class Scored:
    """One request's share: the rows from `start` to `end`, or everything where nobody else has a share."""

    outcome: Outcome
    start: int
    end: int

    @property
    def model(self) -> Model:
        """What ran."""
        return self.outcome.model

    @property
    def ids(self) -> Sequence[str]:
        """Prediction ids [n]."""
        return self.outcome.ids[self.start : self.end]

    @property
    def actions(self) -> Sequence[str | None]:
        """What the decision bands say of each score [n]; empty for a plain model."""
        return self.outcome.actions[self.start : self.end]

    def array(self, name: str) -> np.ndarray:
        """One of the graph's outputs, [n, ...]."""
        whole = self.outcome.outputs[name]
        return whole[self.start : self.end] if self.outcome.shared else whole

    def scores(self) -> np.ndarray:
        """A workload's scores [n]."""
        return self.array(SCORE)

    def strings(self, name: str) -> list[str]:
        """The flat values of an output of strings: of the graph, or one that the server adds."""
        if name in self.outcome.outputs:
            values: list[str] = self.array(name).ravel().tolist()
            return values
        return list(self.ids) if name == PREDICTION_ID else [action or "" for action in self.actions]

    def text(self, name: str, datatype: str) -> bytes:
        """The flat values of an output as a list in JSON."""
        if datatype == "BYTES":
            return orjson.dumps(self.strings(name))
        if not self.outcome.shared or not self.outcome.outputs[name].size:
            return orjson.dumps(self.array(name).ravel(), option=orjson.OPT_SERIALIZE_NUMPY)
        return b"[%b]" % b",".join(self.outcome.texts(name)[self.start : self.end])

    def raw(self, name: str, datatype: str) -> bytes:
        """The flat values of an output as bytes."""
        if datatype == "BYTES":
            return to_bytes(datatype, self.strings(name))
        if not self.outcome.shared:
            return to_bytes(datatype, self.outcome.outputs[name])
        content, size = self.outcome.raw(name, datatype)
        return content[self.start * size : self.end * size]
