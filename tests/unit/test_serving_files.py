"""The files of a server when a disk is full, sick or slow, and those that outlive what they are about."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from noria.errors import ServiceError
from serving import everywhere, generation, state
from serving.engine import Engine
from serving.everywhere import Everywhere
from serving.generation import Generation
from serving.ledger import Ledger
from serving.state import Desired, State
from serving.supervise import Plan, Worker, listen
from serving.worker import Follower, Parent


def ask(folder, *names):
    for name in names:
        state.write(folder / "desired", Desired(name, 1, f"/{name}", "asked"))


def unreadable(path):
    """What opens with an error, whoever asks, as a file does when there is no descriptor left."""
    path.unlink()
    path.mkdir()


def test_a_file_that_cannot_be_read_is_not_taken_for_absent(tmp_path):
    ask(tmp_path, "one", "two")
    ledger = Ledger(tmp_path)
    known = ledger.desired()
    ask(tmp_path, "three")
    unreadable(tmp_path / "desired" / "one.json")
    with pytest.raises(OSError, match=r"one\.json"):
        ledger.desired()
    (tmp_path / "desired" / "one.json").rmdir()
    (tmp_path / "desired" / "one.json").write_text("{")
    with pytest.raises(ServiceError, match=r"one\.json is not what the server wrote there"):
        ledger.desired()
    ask(tmp_path, "one")
    assert sorted(ledger.desired()) == ["one", "three", "two"] and sorted(known) == ["one", "two"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(tmp_path):
    assert state.read(tmp_path / "desired", Desired) == {} and state.signature(tmp_path / "desired") == ()
    (tmp_path / "desired").write_text("")
    for read in (lambda folder: state.read(folder, Desired), state.signature):
        with pytest.raises(NotADirectoryError):
            read(tmp_path / "desired")


def test_what_was_damaged_is_set_aside_at_a_start(tmp_path, caplog):
    ask(tmp_path, "one", "two")
    (tmp_path / "desired" / "one.json").write_text("")
    state.set_aside(tmp_path / "desired", Desired)
    assert list(state.read(tmp_path / "desired", Desired)) == ["two"]
    assert "is renamed to one.json.broken" in caplog.text


def test_a_worker_keeps_what_it_knew_while_a_file_cannot_be_read(tmp_path):
    ask(tmp_path, "one")
    engine = Engine("cpu")
    follower = Follower(engine, tmp_path)
    follower.step()
    state.write(tmp_path / "failed", State("one", 1, "failed", "It hangs.", "", "asked"))
    ask(tmp_path, "two")
    unreadable(tmp_path / "desired" / "two.json")
    with pytest.raises(OSError, match=r"two\.json"):
        follower.step()
    assert list(engine.known) == ["one"] and not engine.failures
    (tmp_path / "desired" / "two.json").rmdir()
    follower.step()
    assert list(engine.known) == ["one"] and list(engine.failures) == ["one"]


def test_nothing_is_said_to_be_ready_while_the_fleets_word_cannot_be_read(tmp_path):
    assert everywhere.read(tmp_path) is None
    (tmp_path / everywhere.FILE).mkdir()
    assert everywhere.read(tmp_path) == {}


def test_a_worker_that_cannot_be_started_leaves_no_descriptor_open(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    plan = Plan(listen("127.0.0.1", 0), tmp_path, "cpu")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            Worker(plan)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    plan.listener.close()


def test_a_worker_reports_any_number(tmp_path):
    ours, theirs = os.pipe()
    parent = Parent.__new__(Parent)  # without the thread that ends this process when its standard input does
    parent._report = theirs
    parent.tell(loading="one", version=10**25)
    assert os.read(ours, 100) == b'{"loading": "one", "version": 10000000000000000000000000}\n'
    os.close(ours)
    os.close(theirs)


def test_a_generation_is_written_once(tmp_path):
    path = generation.write(tmp_path, Generation(7, {"a": Desired("a", 2, "/two", "x")}))
    before = path.stat().st_ino
    # The same version may be asked for anew, which changes nothing of what is loaded.
    assert generation.write(tmp_path, Generation(7, {"a": Desired("a", 2, "/two", "y")})) == path
    assert path.stat().st_ino == before


def test_what_answers_is_written_when_there_is_room_again(tmp_path, caplog):
    ledger, entries = Ledger(tmp_path), {"a": Desired("a", 1, "/a", "x"), "b": Desired("b", 1, "/b", "x")}
    for name in ("state/b.json", "swaps.json", "workers.json"):
        (tmp_path / name).mkdir(parents=True)  # no file can take its place
    ledger.settled(entries)
    assert not ledger.workers([{"pid": 1}]) and not ledger.workers([{"pid": 1}])
    assert caplog.text.count("cannot be written down") == 1
    for name in ("state/b.json", "swaps.json", "workers.json"):
        (tmp_path / name).rmdir()
    assert ledger.workers([{"pid": 1}]) and not ledger.workers([{"pid": 1}])
    assert sorted(state.read(tmp_path / "state", State)) == ["a", "b"]
    assert state.swaps(tmp_path) == {"a": {"serving": 1}, "b": {"serving": 1}}


def test_a_worker_may_not_join_before_its_models_are_said_to_be_known(tmp_path):
    fleet = Everywhere(tmp_path)
    fleet.made(Generation(1, {"a": Desired("a", 1), "b": Desired("b", 1)}))
    fleet.made(Generation(2, {"a": Desired("a", 2)}))
    assert fleet.say({1})
    (tmp_path / everywhere.FILE).unlink()
    (tmp_path / everywhere.FILE).mkdir()
    assert fleet.say({1}), "a worker of the same generation may, for nothing needs to be written"
    assert not fleet.say({1, 2})
    (tmp_path / everywhere.FILE).rmdir()
    assert fleet.say({1, 2}) and everywhere.read(tmp_path) == {"a": None}


def test_what_came_of_a_name_that_nobody_asks_for_goes(tmp_path):
    ask(tmp_path, "kept", "went", "bad")
    ledger = Ledger(tmp_path)
    ledger.settled({name: entry for name, entry in ledger.desired().items() if name != "bad"})
    ledger.failed(ledger.desired()["bad"], Generation(1), "It hangs.")
    state.write_file(tmp_path / "repository.json", ["bad"])
    state.remove(tmp_path / "desired", "bad")
    ledger.desired()
    assert list(state.read(tmp_path / "failed", State)) == ["bad"], "it is there, and tried again later"
    state.write_file(tmp_path / "repository.json", [])
    ledger.desired()
    assert not state.read(tmp_path / "failed", State)
    state.remove(tmp_path / "desired", "went")
    ledger.desired()
    assert sorted(state.read(tmp_path / "state", State)) == ["kept", "went"], "it answers until the fleet lets it go"
    Ledger(tmp_path).desired()
    assert list(state.read(tmp_path / "state", State)) == ["kept"], "it went while the server was down"


def test_a_change_is_seen_however_soon_it_follows_another(tmp_path, monkeypatch):
    ask(tmp_path, "one")
    watched = state.Watched(tmp_path / "desired", tmp_path / "none")
    folder, seen = tmp_path / "desired", [watched.mark()]
    times = (folder.stat().st_atime_ns, folder.stat().st_mtime_ns)
    ask(tmp_path, "two")
    os.utime(folder, ns=times)  # as where time moves in coarse steps
    seen.append(watched.mark())
    os.utime(folder, (1, 1))  # long ago
    seen += [watched.mark(), watched.mark()]
    assert seen[0] != seen[1] == seen[2] == seen[3]
    monkeypatch.setattr(state, "signature", lambda folder: pytest.fail("each file is looked at"))
    assert watched.mark() == seen[3]
    monkeypatch.undo()
    shutil.rmtree(folder)
    assert watched.mark() != seen[3]


def test_only_what_mlflow_asked_for_must_outlive_a_power_cut(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    entries = {name: Desired(name, 1, f"/{name}", "x", plain=True) for name in ("a", "b", "c")}
    for entry in entries.values():
        state.write(tmp_path / "desired", entry)
    Ledger(tmp_path).settled(entries)
    assert len(synced) == 1, "how many were served, once for all"
    state.write(tmp_path / "desired", Desired("taxi", 1, "/taxi", "x"))
    assert len(synced) == 2
