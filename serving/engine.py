"""Loaded models: open a bundle beside the one that serves, warm it, prove it, then answer with it.

A `Model` never changes. Swapping is replacing one reference in `Engine.models`; a request that began with the old model
ends with it, and the old one goes when the last such request does. Not here: HTTP, JSON, files that say what to serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from noria.decision import Bands
from noria.errors import BundleError
from noria.runtime import Providers, open_session, score
from noria.schema import Schema, Tensors
from registry.bundle import Bundle, Facts
from registry.proof import ABSOLUTE, RELATIVE
from serving.state import Desired, State, now

WARM = (1, 2, 8, 64, 256, 1024)
"""Batch sizes that are run, and must agree with each other, before a model answers."""


@dataclass(frozen=True)
class Model:
    """One version of a workload, ready to answer."""

    workload: str
    version: int
    facts: Facts
    schema: Schema
    bands: Bands
    session: ort.InferenceSession
    example: Mapping[str, Any]
    """A real record: the first of the bundle's proof."""

    def score(self, tensors: Tensors) -> np.ndarray:
        """Scores [n], float32, of raw tensors [n]. Thread-safe."""
        return score(self.session, tensors)


@dataclass
class Engine:
    """The models that answer now, by workload, and what was asked for."""

    providers: Providers = "auto"
    models: dict[str, Model] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    failures: dict[str, State] = field(default_factory=dict)
    """The last version that was refused, until another one serves."""
    known: dict[str, Desired] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Something serves, and every workload that should serve does."""
        wanted = {name for name, desired in self.known.items() if desired.version is not None}
        return bool(self.models) and wanted <= set(self.models)

    def take(self, desired: Desired, earlier: State | None = None) -> State:
        """Make the workload's requests answered by the desired version, or refuse it and leave things as they are.

        Call it beside the event loop (it takes as long as loading takes). `earlier` is what the last worker said; its
        `since` is kept when it served the same version.
        """
        serving = self.models.get(desired.workload)
        replaced = serving.version if serving else None
        if desired.version is None:
            raise ValueError("There is nothing to take: the request names no version.")
        if serving is not None and serving.version == desired.version:
            state = replace(self.states[desired.workload], asked=desired.asked)
        else:
            try:
                model = load(desired, self.providers)
            except BundleError as error:
                failed = State(desired.workload, desired.version, "failed", str(error), now(), desired.asked, replaced)
                self.failures[desired.workload] = failed
                return failed
            since = now()
            if earlier and earlier.status == "serving" and earlier.version == desired.version:
                since, replaced = earlier.since, earlier.replaced
            state = State(desired.workload, desired.version, "serving", "", since, desired.asked, replaced)
            self.models[desired.workload] = model
            self.failures.pop(desired.workload, None)
        self.states[desired.workload] = state
        return state


def load(desired: Desired, providers: Providers) -> Model:
    """Open, warm and prove the bundle that `desired` names.

    Raises:
        BundleError: it does not open, does not run, or does not give its own proof's scores.
    """
    name = f"Version {desired.version} of {desired.workload}"
    try:
        bundle = Bundle.open(Path(desired.folder))
        if bundle.facts.name != desired.workload:
            raise BundleError(f"the bundle was made for the workload '{bundle.facts.name}'.")
        session = open_session(bundle.model, providers)
    except Exception as error:  # ONNX Runtime raises a dozen types of its own, and any of them means the same here
        raise BundleError(f"{name} cannot be loaded: {_line(error)}") from error
    try:
        _prove(bundle, session)
    except Exception as error:
        raise BundleError(f"{name} fails its proof: {_line(error)}") from error
    example = bundle.proof.records[0]
    number = desired.version or 0
    return Model(desired.workload, number, bundle.facts, bundle.schema, bundle.bands, session, example)


def _prove(bundle: Bundle, session: ort.InferenceSession) -> None:
    """Compare with the scores that were promised, alone and at every warm-up size. Raises BundleError."""
    bundle.proof.check(session, bundle.schema)
    tensors = bundle.schema.parse(bundle.proof.records)
    expected = np.asarray(bundle.proof.scores, np.float64)
    for size in WARM:
        rows = np.arange(size) % len(expected)
        found = score(session, {name: values[rows] for name, values in tensors.items()})
        wrong = ~np.isclose(found, expected[rows], rtol=RELATIVE, atol=ABSOLUTE)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise BundleError(
                f"Reference row {rows[first]} scores {found[first]:g} in a batch of {size} rows instead of "
                f"{expected[rows[first]]:g}: rows of a batch disturb each other in this graph."
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
