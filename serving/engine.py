"""The models that one process answers with, and what is known about them.

A worker fills it once, from its generation, and never changes it. Not here: loading one version (`serving.model`),
HTTP, and what to serve (`serving.generation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from noria.errors import BundleError
from noria.providers import Providers
from serving.generation import Generation
from serving.model import Model, load
from serving.state import Desired, State, now, read
from serving.wire import RETRY, Refusal


class Unloadable(BundleError):
    """A version of a generation cannot be loaded: its workload, its number, and why."""

    def __init__(self, workload: str, version: int, reason: str) -> None:
        super().__init__(workload, version, reason)
        self.workload, self.version, self.reason = workload, version, reason

    def __str__(self) -> str:
        return self.reason


@dataclass
class Engine:
    """The models that answer, by workload, and what is known about them."""

    providers: Providers = "auto"
    models: dict[str, Model] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    """Since when each answers, and what it replaced."""
    failures: dict[str, State] = field(default_factory=dict)
    """The last version that was refused, until another one serves."""
    known: dict[str, Desired] = field(default_factory=dict)
    """What should serve; no version: the workload is registered and has no champion yet."""
    everywhere: Mapping[str, int | None] | None = None
    """By workload, the version that every worker knows (`serving.everywhere`); None: this process is the only one."""
    missing: tuple[str, ...] = ()
    """Workloads of which nothing could be loaded when this process started."""

    @property
    def ready(self) -> bool:
        """Something serves, whichever worker is asked, and what should have been loaded at the start was."""
        wanted = (self.known.get(name) for name in self.missing)
        return any(map(self.answers, self.models)) and all(
            desired is None or desired.version is None for desired in wanted
        )

    def answers(self, workload: str, version: int | None = None) -> bool:
        """Whether the workload, or a version of it, is answered, whichever worker is asked."""
        model = self.models.get(workload)
        if model is None or (version is not None and version != model.version):
            return False
        if self.everywhere is None:
            return True
        return workload in self.everywhere and version in (None, self.everywhere[workload])

    def refusal(self, workload: str) -> Refusal:
        """Why nothing answers for the workload."""
        known, desired = sorted({*self.models, *self.known}), self.known.get(workload)
        if known and workload not in known:
            return Refusal(404, f"There is no workload '{workload[:60]}'; there are: {', '.join(known)}.")
        if desired is not None and desired.version is not None:
            sentence = f"Version {desired.version} of {workload} is not ready; try again in some seconds."
            return Refusal(503, sentence, RETRY)
        return Refusal(
            503,
            f"No version of {workload[:60]} has the alias champion; promote one in the MLflow UI or run "
            f"noria promote {workload[:60]} VERSION.",
        )

    def load(self, generation: Generation, began: Callable[[str, int], None]) -> None:
        """Load, warm and prove everything that a generation names; `began` hears of each before it is tried.

        Raises:
            Unloadable: one of them cannot be loaded.
        """
        self.missing = generation.missing
        self.known.update(generation.entries)
        for workload, entry in generation.entries.items():
            if entry.version is None:
                continue
            began(workload, entry.version)
            reached = self.take(entry)
            if reached.status == "failed":
                raise Unloadable(workload, entry.version, reached.reason)

    def follow(self, folder: Path) -> None:
        """Take in what the server's files say about the workloads by now; the models stay as they are.

        Raises:
            OSError, ServiceError: a file cannot be read, and everything stays.
        """
        known, failures = read(folder / "desired", Desired), read(folder / "failed", State)
        states = read(folder / "state", State)
        self.known, self.failures = known, failures
        for workload, reached in states.items():
            model = self.models.get(workload)
            if model is not None and model.version == reached.version and reached.status == "serving":
                self.states[workload] = reached

    def take(self, desired: Desired) -> State:
        """Make the workload's requests answered by the desired version, or refuse it and leave things as they are."""
        serving = self.models.get(desired.workload)
        replaced = serving.version if serving else None
        if desired.version is None:
            raise ValueError("There is nothing to take: the request names no version.")
        known = self.known.get(desired.workload, desired)
        if serving is not None and (serving.version, known.content) == (desired.version, desired.content):
            state = replace(self.states[desired.workload], asked=desired.asked)
        else:
            try:
                folder = Path(desired.folder)
                model = load(desired.workload, desired.version, folder, self.providers, plain=desired.plain)
            except BundleError as error:
                failed = State(desired.workload, desired.version, "failed", str(error), now(), desired.asked, replaced)
                self.failures[desired.workload] = failed
                return failed
            state = State(desired.workload, desired.version, "serving", "", now(), desired.asked, replaced)
            self.models[desired.workload] = model
            self.failures.pop(desired.workload, None)
        self.states[desired.workload] = state
        return state
