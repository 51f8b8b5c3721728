"""Source data that a package registry carries: fetched once, pinned by SHA-256, kept as Parquet for quick reads.

    TAXI = Archive("pypi", "great-expectations", "1.24.1", sha256="d35f...", wanted="*/samples/*.csv")
    folder = fetch(TAXI, settings.downloads)

The one place that runs `pip download` and `npm pack`; packages are read as archives, never installed or imported. The
hash is checked before anything of an archive is used. Files are written aside and renamed, so that what lies in the
cache is whole; two processes that fetch at once wait for each other.

Not here: what the files mean (the workload's `records`) and the lake (`noria.lake`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from noria.errors import DataError
from noria.records import Window
from noria.schema import ARROW
from noria.variables import child_environment

Progress = Callable[[str], None]
PATIENCE = 600
"""Seconds that a registry client may take."""
BUILD_TOOLS = "setuptools<82\n"
"""pip asks a source archive for its metadata, which newer setuptools may refuse to build for older packages."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A pinned archive in a package registry, and which of its files are wanted."""

    registry: Literal["pypi", "npm"]
    """`pypi`: the source distribution."""
    package: str
    version: str
    sha256: str
    """Of the archive file."""
    wanted: str
    """Shell pattern of member paths, for example `*/data/*.csv` (`*` matches `/` too)."""

    @property
    def file_name(self) -> str:
        """The name under which the registry serves the archive."""
        plain = self.package.lstrip("@").replace("/", "-")
        if self.registry == "pypi":
            return f"{plain.replace('-', '_')}-{self.version}.tar.gz"
        return f"{plain}-{self.version}.tgz"

    @property
    def folder_name(self) -> str:
        """Names archive and pattern, so that a change of either is fetched anew."""
        mark = hashlib.sha256(f"{self.sha256} {self.wanted}".encode()).hexdigest()[:12]
        return f"{self.file_name.removesuffix('.tgz').removesuffix('.tar.gz')}-{mark}"


def fetch(archive: Archive, cache: Path, progress: Progress | None = None) -> Path:
    """The folder with the wanted files, at their paths inside the archive; downloads what is not there yet.

    `progress` gets sentences about what is being done; without one they go to the log.

    Raises:
        DataError: not reachable, not the file that the hash promises, or no wanted file in it.
    """
    folder = cache / archive.folder_name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{archive.folder_name}.lock"):
        if not folder.is_dir():
            _extract(archive, _downloaded(archive, cache, progress or log.info), folder)
    return folder


def convert(path: Path, read: Callable[[], pa.Table], time: str) -> Path:
    """The Parquet file at `path`, made once from what `read` returns, sorted by the column `time`.

    Small row groups: a reader of a window skips those outside of it.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            aside = path.with_suffix(f".{os.getpid()}.aside")
            pq.write_table(read().sort_by(time), aside, row_group_size=8192, compression="zstd")
            aside.replace(path)
    return path


def read_window(path: Path, time: str, window: Window) -> pa.Table:
    """Rows of a file that `convert` made whose `time` is in the window, oldest first."""
    kind = ARROW["timestamp"]
    start, end = pa.scalar(window.start, kind), pa.scalar(window.end, kind)
    return pq.read_table(path, filters=[(time, ">=", start), (time, "<", end)])


def _downloaded(archive: Archive, cache: Path, progress: Progress) -> Path:
    """The archive file, its hash checked; one that a person put into the cache counts as well."""
    kept = cache / archive.file_name
    if kept.is_file():
        _check(archive, kept)
        return kept
    progress(f"Downloading {archive.package} {archive.version} from {archive.registry}, once, into {cache}.")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as name:
        folder = Path(name)
        (_pip if archive.registry == "pypi" else _npm)(archive, folder, kept)
        arrived = folder / archive.file_name
        if not arrived.is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
            raise DataError(
                f"{archive.registry} delivered {found} instead of {archive.file_name}. {_by_hand(archive, kept)}"
            )
        _check(archive, arrived)
        arrived.replace(kept)
    return kept


def _pip(archive: Archive, folder: Path, kept: Path) -> None:
    """`pip download` of the source archive from whatever index pip is configured for.

    pip builds the package's metadata, which runs code of the package: it is told the hash, and checks it first.
    """
    if find_spec("pip") is None:
        raise DataError(f"There is no pip in {sys.prefix}: install it (python -m ensurepip). {_by_hand(archive, kept)}")
    wanted, tools = folder / "wanted.txt", folder / "tools.txt"
    wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    tools.write_text(BUILD_TOOLS)
    options = [
        "--no-deps",
        "--no-binary",
        archive.package,
        "--require-hashes",
        "--disable-pip-version-check",
        "--quiet",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(wanted)]
    # Older pips read constraints of build environments from PIP_CONSTRAINT, newer ones from PIP_BUILD_CONSTRAINT.
    _run(archive, command, kept, PIP_CONSTRAINT=str(tools), PIP_BUILD_CONSTRAINT=str(tools))


def _npm(archive: Archive, folder: Path, kept: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"{archive.package} comes from the npm registry, and there is no npm on this machine: install Node.js "
            f"(Debian: apt-get install npm). {_by_hand(archive, kept)}"
        )
    name = f"{archive.package}@{archive.version}"
    _run(archive, [npm, "pack", name, "--pack-destination", str(folder), "--loglevel", "error"], kept)


def _run(archive: Archive, command: list[str], kept: Path, **environment: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=kept.parent,
            env=child_environment(**environment), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DataError(
            f"{archive.package} {archive.version} did not arrive within {PATIENCE} s. {_by_hand(archive, kept)}"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = next((line for line in lines if line.lower().startswith(("error", "npm error"))), "")
        raise DataError(
            f"{archive.package} {archive.version} cannot be fetched from {archive.registry}: {said or lines[-1:]}. "
            f"Check the network. {_by_hand(archive, kept)}"
        )


def _by_hand(archive: Archive, kept: Path) -> str:
    return f"Or put the file (SHA-256 {archive.sha256}) at {kept} by hand."


def _check(archive: Archive, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise DataError(
            f"{path} is not {archive.package} {archive.version}: its SHA-256 is {found}, not {archive.sha256}. "
            "Delete it and try again; if it comes back, do not use it."
        )


def _extract(archive: Archive, source: Path, folder: Path) -> None:
    """Wanted members into `folder`, by way of a folder aside; links and paths that leave it are refused."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".extract-") as name:
        aside = Path(name) / "files"
        aside.mkdir()
        with tarfile.open(source) as tar:
            members = [entry for entry in tar if entry.isfile() and fnmatch.fnmatchcase(entry.name, archive.wanted)]
            if not members:
                raise DataError(f"{source} holds no file that matches '{archive.wanted}'.")
            try:
                tar.extractall(aside, members, filter="data")
            except tarfile.FilterError as error:
                raise DataError(f"{source} holds a file that must not be extracted: {error}.") from None
        aside.replace(folder)
