"""What one look at a model repository makes of it: real folders, and the files in which the server's parts speak."""

from __future__ import annotations

import os
import shutil

import pytest

from serving import generation, orders, repository, state
from serving.generation import Generation
from serving.repository import LONGEST_REST, LOOK_SECONDS, Repository
from serving.state import Desired, State


class Looked:
    """A repository whose looks are taken here."""

    def __init__(self, folder):
        self.source, self.folder = folder / "models", folder / "serving"
        self.source.mkdir()
        self.begin()

    def begin(self, source=None):
        """As a server that starts."""
        self.repository = Repository(source or self.source, self.folder)

    def put(self, name, version, content=b"m"):
        path = self.source / name / str(version) / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        os.utime(path, (1, 1))  # old: whole with the first look
        return path

    def step(self, looks=2):
        for _ in range(looks):
            self.repository.step()
        return {name: entry.version for name, entry in self.desired().items()}

    def desired(self):
        return state.read(self.folder / "desired", Desired)

    def reached(self, name, **answers):
        """What the fleet writes down when it serves what is desired."""
        entry = self.desired()[name]
        state.write(self.folder / "state", State(name, entry.version, "serving", "", state.now(), entry.asked))
        state.write_file(self.folder / "everywhere.json", answers)

    def failed(self, name):
        """And when a process fails at it."""
        entry = self.desired()[name]
        state.write(self.folder / "failed", State(name, entry.version, "failed", "Killed.", state.now(), entry.asked))


@pytest.fixture
def looked(tmp_path):
    return Looked(tmp_path)


class Ordered(Looked):
    """Whose workers are written down, as the fleet does it."""

    def workers(self, *phases):
        """`phases` by generation: what each does; a generation's file may be gone."""
        drained = {"phase": "leaving", "drained": True}
        state.write_file(self.folder / "workers.json", [
            {"generation": number, **(drained if phase == "drained" else {"phase": phase, "drained": False})}
            for number, phase in phases
        ])  # fmt: skip

    def generation(self, number, *names):
        desired = self.desired()
        generation.write(self.folder, Generation(number, {name: desired[name] for name in names}))

    def order(self, name, *, load):
        """Given a moment after the one before; the time of a file turns some hundred times a second."""
        key = orders.order(self.folder, name, load)
        path = self.folder / "orders" / f"{key}.json"
        self.given = getattr(self, "given", path.stat().st_mtime - 60) + 1
        os.utime(path, (self.given, self.given))
        return key

    def outcome(self, key):
        self.step(1)
        return orders.outcome(self.folder, key)


@pytest.fixture
def ordered(tmp_path):
    made = Ordered(tmp_path)
    made.put("one", 1)
    made.put("other", 1)
    made.step()
    made.generation(1, "other")
    made.generation(2, "one", "other")
    return made


def unreadable(path):
    """A link to itself, which nobody can follow: whoever runs the tests may read everything else."""
    path.symlink_to(path.name)


def test_a_version_that_no_message_can_hold_is_passed_over_and_said_once(looked, caplog):
    looked.put("stamped", 20261123130736123456789)
    looked.put("large", 2**63 - 1)
    looked.put("both", 2**63)
    looked.put("both", 7)
    assert looked.step(3) == {"large": 2**63 - 1, "both": 7}
    assert caplog.text.count("20261123130736123456789 of the model repository is passed over") == 1
    assert caplog.text.count(f"{2**63} of the model repository is passed over") == 1


def test_what_cannot_be_read_concerns_only_itself(looked, caplog):
    kept = [looked.put("version", 2), looked.put("version", 1), looked.put("model", 1)]
    assert looked.step() == {"version": 2, "model": 1}
    before = looked.desired()
    kept[0].unlink()
    unreadable(kept[0])
    (looked.source / "model").rename(looked.folder / "away")
    unreadable(looked.source / "model")
    unreadable(looked.source / "never")
    looked.put("other", 1)
    assert looked.step() == {"version": 2, "model": 1, "other": 1}
    assert {name: looked.desired()[name] for name in before} == before
    for path in (kept[0].parent, looked.source / "model"):
        assert caplog.text.count(f"{path} of the model repository cannot be read") == 1
    kept[0].unlink()
    (looked.source / "model").unlink()
    assert looked.step() == {"version": 1, "other": 1}, "what is gone for sure, goes"


def test_what_cannot_be_read_at_a_start_stays_as_it_was_asked_for(looked):
    version, _, model = looked.put("version", 2), looked.put("version", 1), looked.put("model", 1)
    looked.step()
    before = looked.desired()
    for path in (version, model):
        path.unlink()
        unreadable(path)
    looked.begin()
    looked.step()
    assert looked.desired() == before
    shutil.rmtree(model.parent)
    version.unlink()
    assert looked.step() == {"version": 1}


def test_an_empty_folder_in_the_place_of_the_one_with_models_is_no_removal(looked, caplog):
    looked.put("one", 1)
    assert looked.step() == {"one": 1}
    mounted = looked.source.rename(looked.folder / "mounted")
    looked.source.mkdir()
    assert looked.step() == {"one": 1}, "the mount point of a share that is away"
    assert caplog.text.count("is another folder than before and has no models") == 1
    looked.source.rmdir()
    mounted.rename(looked.source)
    assert looked.step() == {"one": 1}
    shutil.rmtree(looked.source / "one")
    assert looked.step() == {}, "whoever empties the folder means it"


def test_another_folder_with_other_models_is_followed(looked):
    looked.put("one", 1)
    looked.step()
    looked.source.rename(looked.folder / "before")
    looked.put("two", 1)
    assert looked.step() == {"two": 1}


def test_new_weights_of_the_same_size_and_time_are_noticed(looked):
    path = looked.put("one", 1, b"old")
    looked.step()
    asked = [looked.desired()["one"].asked]
    written = (lambda: path.write_bytes(b"new"), lambda: (looked.folder / "aside").replace(path))
    (looked.folder / "aside").write_bytes(b"two")
    for write in written:
        last = path.stat().st_ctime_ns
        while path.stat().st_ctime_ns == last:  # its clock turns some hundred times a second
            write()
            os.utime(path, (1, 1))
            (looked.folder / "aside").write_bytes(b"two")
        looked.step()
        asked.append(looked.desired()["one"].asked)
    assert len(set(asked)) == 3
    (looked.source / "one").rename(looked.folder / "away")
    (looked.folder / "away").rename(looked.source / "one")
    assert looked.step() == {"one": 1}
    assert looked.desired()["one"].asked == asked[-1], "it is the file that it was"


def test_a_file_that_is_still_copied_waits(looked):
    looked.put("slow", 1)
    looked.step()
    path = looked.source / "slow" / "2" / "model.onnx"
    path.parent.mkdir()
    with path.open("wb", buffering=0) as file:
        for _ in range(5):
            file.write(b"part")
            assert looked.step(1) == {"slow": 1}
    assert looked.step(1) == {"slow": 2}, "it has not grown since"


@pytest.mark.parametrize("lower", [False, True])
def test_a_version_that_answers_is_not_taken_away_because_a_process_failed_at_it(looked, lower):
    looked.put("one", 2)
    if lower:
        looked.put("one", 1)
    looked.step()
    looked.reached("one", one=2)
    before = looked.desired()
    looked.failed("one")
    assert looked.step() == {"one": 2}
    assert looked.desired() == before
    looked.reached("one")  # no worker answers with it any more
    assert looked.step() == ({"one": 1} if lower else {})


def test_a_repository_that_moved_is_followed(looked, tmp_path):
    looked.put("one", 1)
    looked.step()
    before = looked.desired()["one"]
    looked.source.rename(tmp_path / "moved")
    looked.begin(tmp_path / "moved")
    looked.step()
    after = looked.desired()["one"]
    assert (after.folder, after.asked) == (str(tmp_path / "moved" / "one" / "1"), before.asked)


def test_what_would_serve_instead_follows_the_folder(looked):
    looked.put("one", 3)
    lower = looked.put("one", 2)
    looked.step()
    shutil.rmtree(lower.parent)
    looked.step()
    assert looked.desired()["one"].fallback_version is None
    looked.put("one", 1)
    looked.step()
    assert (looked.desired()["one"].version, looked.desired()["one"].fallback_version) == (3, 1)


def test_a_load_is_answered_when_all_that_may_be_asked_have_it_whatever_else_loads(ordered):
    ordered.workers((1, "accepting"), (2, "loaded"), (3, "loading"))
    key = ordered.order("one", load=True)
    assert ordered.outcome(key) is None
    ordered.workers((1, "accepting"), (2, "accepting"), (3, "loading"))
    assert ordered.outcome(key) is None
    ordered.workers((1, "leaving"), (2, "accepting"), (3, "loading"))
    assert ordered.outcome(key) is None
    ordered.workers((1, "drained"), (2, "accepting"), (3, "loading"))
    assert ordered.outcome(key) == orders.Outcome(True)


def test_an_unload_is_answered_when_none_that_may_be_asked_has_it(ordered):
    ordered.workers((2, "accepting"), (3, "loading"))
    key = ordered.order("one", load=False)
    assert ordered.outcome(key) is None
    assert list(ordered.desired()) == ["other"]
    ordered.generation(4, "other")
    ordered.workers((2, "leaving"), (4, "accepting"), (3, "loading"))
    generation.prune(ordered.folder, {4})
    assert ordered.outcome(key) is None, "the file of its generation is gone, the worker is not"
    ordered.workers((2, "drained"), (4, "accepting"), (3, "loading"))
    assert ordered.outcome(key) == orders.Outcome(True)


def test_a_load_of_a_file_written_anew_waits_for_the_workers_that_have_it(ordered):
    ordered.workers((2, "accepting"))
    assert ordered.outcome(ordered.order("one", load=True)) == orders.Outcome(True)
    (ordered.source / "one" / "1" / "model.onnx").write_bytes(b"new")
    key = ordered.order("one", load=True)
    assert ordered.outcome(key) is None
    ordered.step(1)  # it has not grown since
    ordered.generation(3, "one", "other")
    ordered.workers((2, "leaving"), (3, "accepting"))
    assert ordered.outcome(key) is None, "both answer as version 1"
    ordered.workers((3, "accepting"))
    assert ordered.outcome(key) == orders.Outcome(True)


def test_what_an_earlier_server_wrote_down_answers_no_order(ordered):
    ordered.workers((9, "accepting"))
    ordered.reached("one", one=1)
    assert ordered.outcome(ordered.order("one", load=True)) is None


def test_an_order_that_a_later_one_overrules_is_answered(ordered):
    ordered.workers((2, "accepting"))
    unload, load = ordered.order("one", load=False), ordered.order("one", load=True)
    assert ordered.outcome(load) == orders.Outcome(True)
    assert orders.outcome(ordered.folder, unload) == orders.Outcome(
        False, "A later order to load one overrules this one."
    )
    assert list(ordered.desired()) == ["one", "other"]


def test_the_longer_a_look_takes_the_less_often_there_is_one(looked, monkeypatch):
    assert looked.repository.step() == LOOK_SECONDS
    monkeypatch.setattr(repository, "LOOK_SECONDS", 0.0)
    assert 0.0 < looked.repository.step() <= LONGEST_REST
    monkeypatch.setattr(repository, "LONGEST_REST", 1e-9)
    assert looked.repository.step() == 1e-9
