"""The models that answer now, and what was asked for.

Swapping is replacing one reference in `Engine.models`; a request that began with the old model ends with it, and the
old one goes when the last such request does. Not here: loading (`serving.model`), HTTP, files that say what to serve.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from noria.errors import BundleError
from noria.runtime import Providers
from serving.model import Model, load
from serving.state import Desired, State, now


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
                folder = Path(desired.folder)
                model = load(desired.workload, desired.version, folder, self.providers, plain=desired.plain)
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
