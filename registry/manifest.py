"""The list of a bundle's files and their SHA-256: written last, so that a folder that has one is whole.

Not a signature: it finds damage and half-written folders, not an attacker who can rewrite the list too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import orjson

from noria.errors import BundleError

MANIFEST = "noria/manifest.json"
FORMAT = 1
"""Grows when a bundle's layout changes so that older code cannot read it."""
ADDED_BY_MLFLOW = frozenset({"registered_model_meta"})
"""What MLflow's own downloads write beside a registered model; it belongs to no version."""


def seal(folder: Path) -> None:
    """Hash every file below `folder` and write the manifest, aside first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    data = {"format": FORMAT, "files": {name: _hash(folder / name) for name in _files(folder)}}
    aside = folder / f"{MANIFEST}.part"
    aside.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
    aside.replace(folder / MANIFEST)


def verify(folder: Path) -> None:
    """Compare the folder with its manifest.

    Raises:
        BundleError: no manifest, or a file is missing, changed, extra, or no plain file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} has no {MANIFEST}: it was not written to the end. Fetch the version again.")
    try:
        data = orjson.loads(path.read_bytes())
        promised, version = dict(data["files"]), int(data["format"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise BundleError(f"{path} is not readable as a manifest. Fetch the version again.") from None
    if version > FORMAT:
        raise BundleError(f"{folder} has the bundle format {version}, newer than {FORMAT}: update noria to open it.")
    found = set(_files(folder)) - {MANIFEST}
    for sentence, names in (("missing", promised.keys() - found), ("extra", found - promised.keys())):
        if names:
            raise BundleError(f"{folder} has {sentence} files: {', '.join(sorted(names))}. Fetch the version again.")
    for name, expected in promised.items():
        if _hash(folder / name) != expected:
            raise BundleError(f"{folder / name} was changed after the version was registered. Fetch the version again.")


def digest_of(folder: Path) -> str:
    """SHA-256 of a bundle's manifest, which holds those of its files; empty when there is none."""
    path = folder / MANIFEST
    return _hash(path) if path.is_file() else ""


def _files(folder: Path) -> list[str]:
    """Names of the files below `folder`, relative, sorted."""
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise BundleError(f"{path} is a link; a bundle holds plain files only.")
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return [name for name in names if name not in ADDED_BY_MLFLOW]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
