"""Archives and conversions: what counts as fetched, and what must never.

The clients that download are in tests/integration/test_fetch.py.
"""

import hashlib
import io
import multiprocessing
import os
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from noria import source
from noria.errors import DataError
from noria.records import Window, moment
from noria.source import Archive, convert, fetch, read_window


def _tar(path, files, extra=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
        for entry in extra:
            tar.addfile(entry)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _by_hand(cache, files, wanted, extra=()):
    """A cache that already holds the archive."""
    cache.mkdir(exist_ok=True)
    return Archive("npm", "@a/b", "1.0", _tar(cache / "a-b-1.0.tgz", files, extra), wanted)


def test_nothing_leaves_the_folder(tmp_path):
    archive = _by_hand(tmp_path / "cache", {"../../escaped.csv": "x", "ok.csv": "y"}, "*.csv")
    with pytest.raises(DataError, match="must not be extracted"):
        fetch(archive, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.csv"))


def test_links_are_not_followed(tmp_path):
    link = tarfile.TarInfo("link.csv")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    archive = _by_hand(tmp_path / "cache", {"ok.csv": "y"}, "*.csv", [link])
    assert [path.name for path in fetch(archive, tmp_path / "cache").iterdir()] == ["ok.csv"]


def test_an_archive_without_the_wanted_files(tmp_path):
    archive = _by_hand(tmp_path / "cache", {"ok.csv": "y"}, "*.parquet")
    with pytest.raises(DataError, match=r"no file that matches '\*.parquet'"):
        fetch(archive, tmp_path / "cache")


def test_fetches_at_once_extract_once(tmp_path, monkeypatch):
    archive = _by_hand(tmp_path / "cache", {f"{number}.csv": "y" for number in range(200)}, "*.csv")
    done = []
    extract = source._extract
    monkeypatch.setattr(source, "_extract", lambda *given: (done.append(1), extract(*given)))
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch(archive, tmp_path / "cache"), range(8)))
    assert len(folders) == 1 and len(done) == 1
    assert len(list(folders.pop().iterdir())) == 200


def _fetch_slowly(archive, cache):
    def slow(self, *given, **options):
        (cache / "begun").touch()
        time.sleep(60)

    tarfile.TarFile.extractall = slow
    fetch(archive, cache)


def test_killed_half_way_leaves_nothing_that_counts(tmp_path):
    cache = tmp_path / "cache"
    archive = _by_hand(cache, {"ok.csv": "y"}, "*.csv")
    process = multiprocessing.get_context("spawn").Process(target=_fetch_slowly, args=(archive, cache))
    process.start()
    for _ in range(600):
        if (cache / "begun").exists():
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (cache / archive.folder_name).exists()
    assert [path.name for path in fetch(archive, cache).iterdir()] == ["ok.csv"]


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    archive = Archive("npm", "@tiny/mails", "1.0.0", "0" * 64, "*")
    with pytest.raises(DataError, match=r"no npm on this machine: install.*tiny-mails-1.0.0.tgz by hand"):
        fetch(archive, tmp_path / "cache")


def _rows(times):
    return pa.table({"at": pa.array(times, pa.timestamp("us", tz="UTC")), "x": list(range(len(times)))})


def test_converted_rows_are_sorted_and_read_by_window(tmp_path):
    times = [moment(f"2020-01-0{day}") for day in (3, 1, 2, 4)]
    path = convert(tmp_path / "deep" / "rows.parquet", lambda: _rows(times), "at")
    found = read_window(path, "at", Window(times[1], times[0]))
    assert found.column("at").to_pylist() == [times[1], times[2]]
    assert convert(path, lambda: 1 / 0, "at") == path


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "rows.parquet"
    with pytest.raises(ZeroDivisionError):
        convert(path, lambda: 1 / 0, "at")
    assert not path.exists()
    assert convert(path, lambda: _rows([moment("2020-01-01")]), "at").is_file()


def test_names_of_archives():
    assert Archive("pypi", "great-expectations", "1.24.1", "", "").file_name == "great_expectations-1.24.1.tar.gz"
    assert Archive("npm", "@stdlib/x-y", "0.2.3", "", "").file_name == "stdlib-x-y-0.2.3.tgz"
    assert Path(Archive("npm", "@stdlib/x-y", "0.2.3", "", "").folder_name).suffix != ".tgz"
