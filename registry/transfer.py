"""Bundles on their way to the registry and back: whole or not at all, whatever is killed half-way."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.models import Model

from noria.errors import BundleError
from noria.records import Version
from registry import flavour
from registry.bundle import Bundle, Contents, write
from registry.manifest import MANIFEST, verify

ABANDONED_SECONDS = 3600
"""A fetch that has lain aside for longer was killed; its folder is removed."""


def upload(client: MlflowClient, logged: LoggedModel, run_id: str, contents: Contents) -> None:
    """Write the bundle and send it to the logged model's place, the manifest when everything else is there."""
    with tempfile.TemporaryDirectory() as parent:
        folder, last = Path(parent) / "model", Path(parent) / "last"
        flavour.save(folder, contents, Model(logged.artifact_location, run_id=run_id, model_id=logged.model_id))
        write(folder, contents)
        last.mkdir()
        (folder / MANIFEST).rename(last / Path(MANIFEST).name)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.log_model_artifacts(logged.model_id, str(last), str(Path(MANIFEST).parent))


def has_manifest(client: MlflowClient, version: Version) -> bool:
    """Whether the upload of a version reached its end."""
    source = client.get_model_version_download_uri(version.workload, str(version.number))
    folder = f"{source}/{Path(MANIFEST).parent}"
    listed = mlflow.artifacts.list_artifacts(folder, tracking_uri=client.tracking_uri)
    return any(Path(entry.path).name == Path(MANIFEST).name for entry in listed)


def is_cached(target: Path, version: Version) -> bool:
    """Whether the folder is whole, and of this very registration (a new registry counts from 1 again)."""
    try:
        verify(target)
    except BundleError:
        return False
    described = target / "MLmodel"
    return described.is_file() and str(Model.load(str(described)).run_id or "") == version.run_id


def download(client: MlflowClient, version: Version, target: Path) -> None:
    """Fetch a version aside, check it, and rename it to `target`.

    Raises:
        BundleError: what was fetched is not a whole, safe bundle.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".fetch-*"):
        if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as parent:
        source = client.get_model_version_download_uri(version.workload, str(version.number))
        incoming = str(Path(parent) / "incoming")
        fetched = Path(mlflow.artifacts.download_artifacts(source, dst_path=incoming, tracking_uri=client.tracking_uri))
        Bundle.open(fetched)
        if target.exists():
            target.rename(Path(parent) / "replaced")
        fetched.rename(target)
