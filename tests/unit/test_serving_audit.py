"""The access log and the audit log: whole lines, bounded, and never a secret in them."""

from __future__ import annotations

import json
import logging
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from noria.settings import load_settings
from serving import keys
from serving.audit import Access, AccessLog, Audit
from serving.guard import Guard, protection
from serving.jsonlines import JsonLines
from serving.wire import Refusal, refused

LINE = Access(1_700_000_000.25, "abc", "10.0.0.1", "shop", "POST", "/predict/taxi", 200, 300, 120, 1.5, 1, 7)


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_line_says_what_was_answered(tmp_path):
    log = AccessLog(tmp_path / "logs" / "access.jsonl")
    log.add(LINE)
    log.add(LINE._replace(status=404, version=None, key=""))
    assert not (tmp_path / "logs").exists()  # nothing is written by the request
    log.close()
    first, second = lines(tmp_path / "logs" / "access.jsonl")
    assert first == {
        "time": "2023-11-14T22:13:20.250+00:00", "request": "abc", "client": "10.0.0.1", "key": "shop",
        "method": "POST", "path": "/predict/taxi", "status": 200, "received": 300, "sent": 120, "ms": 1.5,
        "rows": 1, "version": 7,
    }  # fmt: skip
    assert (second["status"], second["version"]) == (404, None)
    assert stat.S_IMODE((tmp_path / "logs" / "access.jsonl").stat().st_mode) == 0o600


def test_a_dash_is_standard_output():
    code = (
        "from serving.audit import AccessLog, Access\n"
        f"log = AccessLog('-')\nlog.add({tuple(LINE)!r} and Access(*{tuple(LINE)!r}))\nlog.close()\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["key"] == "shop"


ANY = st.text(st.characters(exclude_categories=()))  # lone surrogates, too


@example("/\ud800", "\udfff")
@given(ANY, ANY)
def test_whatever_a_client_chose_makes_one_line(tmp_path_factory, path, name):
    log = AccessLog(file := tmp_path_factory.mktemp("log") / "access.jsonl")
    log.add(LINE._replace(path=path, request=name))
    log.add(LINE)
    log.close()
    first, second = lines(file)
    assert len(first["path"]) <= 200 and second["path"] == LINE.path


def test_lines_beyond_the_queue_are_counted(tmp_path):
    log = AccessLog(tmp_path / "access.jsonl", most_waiting=10)
    for _ in range(15):
        log.add(LINE)
    log.flush()
    log.add(LINE)
    log.close()
    assert (log.dropped, len(lines(tmp_path / "access.jsonl"))) == (5, 11)


def test_a_log_that_cannot_be_written_drops_lines_and_says_so(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    log = AccessLog(tmp_path / "file" / "access.jsonl")
    for _ in range(2):
        log.add(LINE)
        log.flush()
    assert log.dropped == 2
    assert caplog.text.count("cannot be written") == 1
    audit = Audit(tmp_path / "file" / "audit.jsonl")
    audit.acted("load", "shop", "10.0.0.1")
    assert "The audit log cannot be written" in caplog.text


def test_adding_a_line_is_quick(tmp_path):
    log = AccessLog(tmp_path / "access.jsonl")

    def seconds(count=2000):
        began = time.perf_counter()
        for _ in range(count):
            log.add(LINE)
        return (time.perf_counter() - began) / count

    assert min(seconds() for _ in range(5)) < 5e-6
    log.close()


def test_a_large_file_is_put_aside_and_old_ones_go(tmp_path):
    file = JsonLines(tmp_path / "log", most_bytes=1000, kept=3)
    for number in range(100):
        file.write(b'{"n": %d, "fill": "%s"}\n' % (number, b"x" * 80))
    file.close()
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["log", "log.1", "log.2", "log.3"]
    numbers = [line["n"] for name in reversed(found) for line in lines(tmp_path / name)]
    assert numbers == list(range(numbers[0], 100))
    assert all(path.stat().st_size < 1200 for path in tmp_path.iterdir())


WRITE = """
import sys
from serving.jsonlines import JsonLines
file = JsonLines(sys.argv[1], most_bytes=20_000, kept=1000)
for number in range(2000):
    file.write(b'{"who": "%s", "n": %d}\\n' % (sys.argv[2].encode(), number))
"""


def test_processes_share_a_file_and_lose_no_line_when_it_is_put_aside(tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path / "log"), name]) for name in "abc"]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    found = [(line["who"], line["n"]) for path in tmp_path.iterdir() for line in lines(path)]
    assert len(list(tmp_path.iterdir())) > 3
    assert sorted(found) == [(who, number) for who in "abc" for number in range(2000)]


def test_a_link_in_the_logs_place_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("")
    (tmp_path / "log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        JsonLines(tmp_path / "log", 1000, 1).write(b"{}\n")


def test_actions_are_always_written(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    for number in range(500):
        audit.acted("load", "ops", "10.0.0.1", model="taxi", version=number)
    audit.close()
    found = lines(tmp_path / "audit.jsonl")
    assert len(found) == 500
    assert found[7]["action"] == "load" and found[7]["version"] == 7 and found[7]["key"] == "ops"


def test_a_flood_of_refusals_is_counted_and_does_not_hide_another_client(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    for number in range(5000):
        audit.refused(401, "10.0.0.1", "GET", f"/{number}")
    audit.refused(403, "10.0.0.2", "GET", "/metrics", "shop")
    for number in range(5000):
        audit.refused(401, f"10.1.{number >> 8}.{number & 255}", "GET", "/x")
    audit.close()
    found = lines(tmp_path / "audit.jsonl")
    assert [line["client"] for line in found[:13]].count("10.0.0.1") == 12
    other = next(line for line in found if line["client"] == "10.0.0.2")
    assert (other["status"], other["key"], other["suppressed"]) == (403, "shop", 5000 - 12)
    assert 250 < len(found) < 350
    assert sum(line.get("suppressed", 0) for line in found) + audit.suppressed + len(found) == 10_001


def test_no_secret_is_ever_written(tmp_path, caplog, capsys):
    """Keys in every place where a client or an operator could put one; then every file and every word is searched."""
    caplog.set_level(logging.DEBUG)
    home = tmp_path / "home"
    known = keys.add(home / "serving" / "keys.json", "shop", ["predict"], "now")
    unknown = "noria_" + "Zx9-_" * 8 + "abc"
    settings = load_settings(home=home, access_log=str(home / "access.jsonl"))
    guard = Guard(protection(settings, {}, "127.0.0.1"))
    said = []
    for key in (known, unknown):
        for header in (f"Bearer {key}", f"Basic {key}", key):
            for path in ("/predict/taxi", "/metrics", f"/predict/{key}", f"/{key}"):
                for host in (b"localhost", key.encode()):
                    try:
                        guard.admit("POST", path, host, header.encode(), "10.0.0.1")
                    except Refusal as refusal:
                        said.append(repr(refused(refusal)) if host == b"localhost" else "")
                guard.access_log.add(LINE._replace(path=path, request=key))
        guard.audit.acted("load", "shop", "10.0.0.1", model=key, header=f"Bearer {key}")
    said.append(repr(guard.keys.check(f"Bearer {known}".encode(), "predict")) + repr(vars(guard.keys)))
    said.append(protection(settings, {}, "127.0.0.1").to_json())
    guard.close()
    printed = capsys.readouterr()
    texts = [*said, caplog.text, printed.out, printed.err]
    texts += [path.read_text() for path in home.rglob("*") if path.is_file()]
    assert sum("(a key)" in text for text in texts) == 2
    for key in (known, unknown):
        assert not [text for text in texts if key[6:] in text]
