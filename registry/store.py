"""The registry: runs, versions and aliases in MLflow, behind one class. Aliases say what should serve.

Not here: whether a version should be promoted (`registry.gate`) and in which order aliases move (`registry.promote`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from noria.errors import AbsentError, BundleError, RegistryError
from noria.records import Version
from registry.bundle import Bundle, Contents
from registry.card import model_card, version_card
from registry.connection import already_there, answered, connect, is_absent
from registry.manifest import MANIFEST
from registry.run import Run
from registry.transfer import download, has_manifest, is_cached, upload
from registry.words import measure

PREFIX = "noria."
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Experiment tag by which MLflow's UI shows runs with their losses, instead of guessing at language models."""


class Store:
    """MLflow at `uri` (the address of its server). Every method raises RegistryError when it does not answer."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.client = connect(self.uri)

    # Runs and registration

    @contextmanager
    def run(self, workload: str, name: str, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
        """A run in the workload's experiment, open while the block runs; failed when the block raises."""
        with answered(self.uri, f"opening a run of {workload}"):
            experiment = self._experiment(workload)
            created = self.client.create_run(experiment, run_name=name, tags=dict(tags or {}))
        run = Run(created.info.run_id, experiment, workload, self.uri, self.client)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        finally:
            with answered(self.uri, f"closing a run of {workload}"):
                self.client.set_terminated(run.id, status)

    def register(self, run: Run, contents: Contents) -> Version:
        """Write the bundle, upload it (its manifest last) and make it the workload's newest version, without an alias.

        Raises:
            BundleError: the contents do not make a sound bundle.
        """
        workload = contents.facts.name
        with answered(self.uri, f"registering {workload}"):
            self._model(workload, model_card(contents))
            logged = self.client.create_logged_model(run.experiment, workload, source_run_id=run.id)
            try:
                upload(self.client, logged, run.id, contents)
            except BaseException:
                self.client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
                raise
            self.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
            self.client.log_outputs(run.id, [LoggedModelOutput(logged.model_id, step=0)])
            made = self.client.create_model_version(
                workload,
                f"models:/{logged.model_id}",
                run.id,
                _facts(contents),
                description=version_card(contents),
                await_creation_for=0,
                model_id=logged.model_id,
            )
        run.metrics(_scores(contents), model_id=logged.model_id)
        return _version(made)

    # Versions and aliases

    def version(self, workload: str, alias: str) -> Version | None:
        """The version that an alias names; None when there is no such alias (or model)."""
        with answered(self.uri, f"reading {workload}@{alias}"):
            try:
                return _version(self.client.get_model_version_by_alias(workload, alias))
            except MlflowException as error:
                if is_absent(error):
                    return None
                raise

    def get(self, workload: str, number: int) -> Version:
        """The version with that number. Raises AbsentError when there is none."""
        with answered(self.uri, f"reading version {number} of {workload}"):
            try:
                return _version(self.client.get_model_version(workload, str(number)))
            except MlflowException as error:
                if is_absent(error):
                    raise AbsentError(
                        f"There is no version {number} of '{workload}' in MLflow at {self.uri}."
                    ) from None
                raise

    def versions(self, workload: str) -> list[Version]:
        """Every version, newest first; none when the workload was never registered."""
        found: list[ModelVersion] = []
        aliases: dict[str, list[str]] = {}
        with answered(self.uri, f"listing versions of {workload}"):
            token: str | None = None
            while True:
                page = self.client.search_model_versions(f"name = '{workload}'", max_results=200, page_token=token)
                found += page
                token = page.token
                if not token:
                    break
            if found:
                # A search leaves the aliases out.
                for alias, number in self.client.get_registered_model(workload).aliases.items():
                    aliases.setdefault(str(number), []).append(alias)
        versions = [_version(entry, tuple(aliases.get(str(entry.version), ()))) for entry in found]
        return sorted(versions, key=lambda version: -version.number)

    def move(self, workload: str, alias: str, number: int) -> None:
        """Let an alias name a version; the last of two concurrent moves wins."""
        self.get(workload, number)
        with answered(self.uri, f"moving {workload}@{alias} to version {number}"):
            self.client.set_registered_model_alias(workload, alias, str(number))

    def drop(self, workload: str, alias: str) -> None:
        """Remove an alias; nothing happens when there is none."""
        with answered(self.uri, f"dropping {workload}@{alias}"):
            try:
                self.client.delete_registered_model_alias(workload, alias)
            except MlflowException as error:
                if not is_absent(error):
                    raise

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version, by their full names ("noria.promoted_at")."""
        with answered(self.uri, f"tagging version {version.number} of {version.workload}"):
            for name, value in tags.items():
                self.client.set_model_version_tag(version.workload, str(version.number), name, str(value))

    # What is said about a workload as a whole

    def note(self, workload: str, values: Mapping[str, Any]) -> None:
        """Keep small JSON values with the workload, by full names ("noria.retrain"): tags of the registered model."""
        with answered(self.uri, f"noting on {workload}"):
            self._model(workload)
            for name, value in values.items():
                if not name.startswith(PREFIX):
                    raise RegistryError(f"'{name}' is no name of a note; begin it with '{PREFIX}'.")
                self.client.set_registered_model_tag(workload, name, orjson.dumps(value).decode())

    def notes(self, workload: str) -> dict[str, Any]:
        """What `note` kept, by full names; nothing for an unknown workload."""
        with answered(self.uri, f"reading notes of {workload}"):
            try:
                tags = self.client.get_registered_model(workload).tags
            except MlflowException as error:
                if is_absent(error):
                    return {}
                raise
        return {name: _json(value) for name, value in tags.items() if name.startswith(PREFIX)}

    def experiment(self, workload: str) -> str | None:
        """The id of the experiment that holds the workload's runs; None when there was no run yet."""
        with answered(self.uri, f"finding the runs of {workload}"):
            found = self.client.get_experiment_by_name(workload)
        return str(found.experiment_id) if found else None

    def describe(self, workload: str, text: str) -> None:
        """Replace the registered model's description (Markdown)."""
        with answered(self.uri, f"describing {workload}"):
            self._model(workload)
            self.client.update_registered_model(workload, text)

    def page(self, version: Version) -> str:
        """Address of the version's page in the MLflow UI."""
        return f"{self.uri}/#/models/{version.workload}/versions/{version.number}"

    # Bundles

    def require_whole(self, version: Version) -> None:
        """Raise RegistryError when the version is no noria bundle, or its upload did not reach the end."""
        with answered(self.uri, f"listing files of version {version.number} of {version.workload}"):
            whole = has_manifest(self.client, version)
        if not whole:
            raise RegistryError(
                f"Version {version.number} of '{version.workload}' has no {MANIFEST}: it was not registered by noria, "
                "or not to the end. Train and register it again."
            )

    def fetch(self, version: Version, folder: Path) -> Bundle:
        """The version's bundle in `folder/<workload>/<number>`, downloaded unless it is there and whole.

        Raises:
            BundleError: what the registry holds is not a whole, safe bundle of this workload.
        """
        target = folder / version.workload / str(version.number)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The server and a flow may want the same version at the same moment.
        with FileLock(target.parent / f".{version.number}.lock"):
            if not is_cached(target, version):
                with answered(self.uri, f"fetching version {version.number} of {version.workload}"):
                    download(self.client, version, target)
            opened = Bundle.open(target)
        if opened.facts.name != version.workload:
            raise BundleError(f"Version {version.number} of '{version.workload}' is a bundle of '{opened.facts.name}'.")
        return opened

    def file(self, version: Version, name: str) -> bytes | None:
        """A file that the version's run kept with `Run.file`; None when it kept none of that name."""
        with answered(self.uri, f"fetching {name} of version {version.number} of {version.workload}"):
            if name not in [entry.path for entry in self.client.list_artifacts(version.run_id)]:
                return None
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(version.run_id, name, folder)).read_bytes()

    # Made on first use

    def _experiment(self, workload: str) -> str:
        found = self.client.get_experiment_by_name(workload)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(workload, tags=KIND))
        except MlflowException as error:
            if not already_there(error):
                raise
            return str(self.client.get_experiment_by_name(workload).experiment_id)

    def _model(self, workload: str, description: str | None = None) -> None:
        """Make the registered model; a description that somebody wrote stays."""
        try:
            self.client.create_registered_model(workload, description=description)
        except MlflowException as error:
            if not already_there(error):
                raise
            if description and not self.client.get_registered_model(workload).description:
                self.client.update_registered_model(workload, description)


def _version(found: ModelVersion, aliases: tuple[str, ...] | None = None) -> Version:
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    names = tuple(sorted(found.aliases if aliases is None else aliases))
    return Version(found.name, int(found.version), found.run_id or "", created, names, dict(found.tags))


def _facts(contents: Contents) -> dict[str, str]:
    """Short tags that a list of versions shows."""
    ref, unit = contents.dataset, contents.facts.error_unit
    tags = {"noria.window": f"{ref.window.start:%Y-%m-%d}..{ref.window.end:%Y-%m-%d}", "noria.rows": str(ref.rows)}
    for subject, name in (("candidate", "error"), ("naive", "naive_error"), ("boosted", "boosted_error")):
        if subject in contents.evaluations:
            tags[f"{PREFIX}{name}"] = measure(contents.evaluations[subject].metrics["error"], unit)
    return tags


def _scores(contents: Contents) -> dict[str, float]:
    return {
        f"{'test' if subject == 'candidate' else subject}/{name}": value
        for subject, found in contents.evaluations.items()
        for name, value in found.metrics.items()
    }


def _json(value: str) -> Any:
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
