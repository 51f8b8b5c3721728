"""The fleet by itself: what is desired is written down, its steps are taken here, its workers are real."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from registry.bundle import write
from serving import everywhere, state
from serving.fleet import Fleet
from serving.state import Desired, State
from serving.supervise import Plan, Worker, listen
from tests.integration.test_repository import plain

NAMES = ("one", "two", "three", "four")


class Driven:
    """A fleet whose steps this process takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder / "serving", folder / "models"
        for name in NAMES:
            self.ask(name, 1)
        self.start()

    def start(self, count=1):
        self.fleet = Fleet(Plan(listen("127.0.0.1", 0), self.folder, "cpu"), count)

    def again(self, count=1):
        """Another server over the same folder."""
        self.fleet.stop()
        self.start(count)

    def ask(self, name, version, content=None, **more):
        path = self.file(name, version)
        path.parent.mkdir(parents=True)
        path.write_bytes(content or plain(version))
        state.write(self.folder / "desired", Desired(name, version, str(path.parent), f"{version}", plain=True, **more))

    def file(self, name, version=1):
        return self.models / name / str(version) / "model.onnx"

    def hang(self, name, version=1):
        """Whoever loads it from now on waits for ever."""
        self.file(name, version).unlink()
        os.mkfifo(self.file(name, version))

    def let_go(self, name, version=1):
        """It can be loaded, also by those that wait for it."""
        path = self.file(name, version)
        path.rename(path.with_name("hangs"))
        path.write_bytes(plain(version))
        with suppress(OSError):  # nobody waits
            waiting = os.open(path.with_name("hangs"), os.O_WRONLY | os.O_NONBLOCK)
            os.write(waiting, path.read_bytes())
            os.close(waiting)

    def tried(self):
        """The changes that are tried, by candidate."""
        return [{change.workload for change in candidate.changes} for candidate in self.fleet._candidates]

    def mend(self, name, version=1):
        self.file(name, version).unlink()
        self.file(name, version).write_bytes(plain(version))

    def loading(self, name):
        """The process that loads it."""
        candidates = [worker for candidate in self.fleet._candidates for worker in candidate.members]
        said = [(worker, worker.describe()["loading"]) for worker in [*self.fleet.members, *candidates]]
        return next((worker for worker, what in said if what.startswith(f"{name} ")), None)

    def kill(self, name):
        """End the next process that loads it."""
        self.until(lambda: self.loading(name))
        os.kill(self.loading(name).pid, signal.SIGKILL)
        self.until(lambda: not self.loading(name))

    def forget(self, *names):
        for name in names:
            state.remove(self.folder / "desired", name)

    def until(self, condition, seconds=30.0):
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds
            self.step()

    def step(self):
        pause = 0.05
        with suppress(OSError):  # as the server does: what could not be written is tried again
            pause = self.fleet.step()
        time.sleep(pause)

    def serves(self, *names):
        """All workers answer with these models, and only they do."""
        members = self.fleet.members
        calm = {worker.phase for worker in members} == {"accepting"} and len(members) == self.fleet.count
        return calm and not self.fleet.present.old and set(self.fleet.current.entries) == set(names)

    def told(self):
        """The processes, as others read of them."""
        return json.loads((self.folder / "workers.json").read_bytes())

    def failed(self):
        return set(state.read(self.folder / "failed", State))

    def versions(self):
        return {name: entry.version for name, entry in self.fleet.current.entries.items()}


@pytest.fixture
def driven(tmp_path):
    made = Driven(tmp_path)
    yield made
    made.fleet.stop()


def test_what_should_go_goes_together_however_it_is_looked_at(driven):
    driven.until(lambda: driven.serves(*NAMES))
    for name in NAMES[:3]:  # a look at the folder in the midst of their removal sees the first one gone
        shutil.rmtree(driven.models / name)
    before = driven.fleet.current.number
    driven.forget("one")
    for _ in range(10):
        driven.step()
    driven.forget("two", "three")
    driven.until(lambda: driven.serves("four"))
    assert driven.fleet.current.number == before + 1, "one of them went by itself"
    assert not driven.failed()


def test_models_whose_files_are_away_answer_until_another_one_changes_and_go_together(driven):
    driven.until(lambda: driven.serves(*NAMES))
    before = driven.fleet.current.number
    for name in ("two", "three"):
        driven.file(name).unlink()
    driven.ask("one", 2)
    driven.until(lambda: driven.fleet._candidates)
    assert driven.serves(*NAMES)
    assert not driven.failed()
    driven.until(lambda: driven.serves("one", "four") and driven.failed() == {"two", "three"})
    assert driven.versions()["one"] == 2
    assert driven.fleet.current.number == before + 1, "a process was started in vain"


def test_models_whose_files_are_away_are_left_out_together_at_the_start(driven):
    driven.until(lambda: driven.serves(*NAMES))
    driven.ask("one", 2, fallback_version=1, fallback_folder=str(driven.file("one").parent))
    driven.until(lambda: driven.serves(*NAMES) and driven.versions()["one"] == 2)
    for path in (driven.file("one", 2), driven.file("two"), driven.file("three")):
        path.unlink()
    before = driven.fleet.current.number
    driven.again()
    driven.until(lambda: driven.serves("one", "four") and driven.failed() == {"one", "two", "three"})
    assert driven.versions()["one"] == 1
    assert driven.fleet.current.number == before + 2, "a process was started in vain"


def test_what_does_not_load_holds_up_neither_what_goes_nor_what_comes(driven):
    driven.until(lambda: driven.serves(*NAMES))
    shutil.rmtree(driven.models / "two")
    driven.forget("two")
    driven.ask("one", 2, b"no model")
    driven.ask("three", 2)
    driven.until(lambda: driven.serves("one", "three", "four") and driven.versions()["three"] == 2)
    assert driven.versions() == {"one": 1, "three": 2, "four": 1}
    assert driven.failed() == {"one"}


def test_what_is_gone_when_the_first_worker_starts_leaves_nothing_behind(driven):
    shutil.rmtree(driven.models / "one")
    driven.forget("one")
    driven.until(lambda: driven.serves("two", "three", "four"))
    assert not driven.failed()


def test_what_answers_is_not_said_to_have_failed_when_a_process_ends_while_it_loads_it(driven):
    driven.until(lambda: driven.serves(*NAMES))
    for version in (2, 3):  # often enough in all, and never in a row
        driven.hang("two")
        driven.ask("one", version)
        for _ in range(2):
            driven.kill("two")
            assert not driven.failed()
        driven.mend("two")
        driven.until(lambda version=version: driven.serves(*NAMES) and driven.versions()["one"] == version)
    assert not driven.failed()


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_is_killed_while_it_starts_anew_is_started_again(driven, count):
    driven.again(count)
    driven.until(lambda: driven.serves(*NAMES))
    driven.hang("two")
    os.kill(driven.fleet.members[0].pid, signal.SIGKILL)
    for _ in range(2):
        driven.kill("two")
    driven.mend("two")
    driven.until(lambda: driven.serves(*NAMES))
    assert not driven.failed()
    assert set(everywhere.read(driven.folder)) == set(NAMES)


def test_two_workers_agree_when_one_cannot_load_what_the_other_answers_with(driven):
    driven.again(2)
    driven.until(lambda: driven.serves(*NAMES))
    driven.file("two").write_bytes(b"no model")
    os.kill(driven.fleet.members[0].pid, signal.SIGKILL)
    driven.until(lambda: driven.serves("one", "three", "four"))
    assert {worker.generation for worker in driven.fleet.members} == {driven.fleet.current.number}
    driven.until(lambda: set(everywhere.read(driven.folder)) == {"one", "three", "four"})
    assert driven.failed() == {"two"}


def test_what_ends_its_worker_before_it_is_named_keeps_nothing_else_from_being_served(driven, monkeypatch):
    present = driven.fleet.present
    start = present.start

    def ending(generation):
        worker = start(generation)
        if "four" in generation.entries:
            os.kill(worker.pid, signal.SIGKILL)
        return worker

    monkeypatch.setattr(present, "start", ending)
    driven.until(lambda: driven.serves("one", "two", "three"), 60)
    driven.until(lambda: driven.failed() == {"four"})


def test_what_answered_before_is_started_again_however_often_its_worker_ends(driven, monkeypatch):
    driven.until(lambda: driven.serves(*NAMES))
    present, ended = driven.fleet.present, []
    start = present.start

    def ending(generation):
        """Before it says what it loads: three ends while one version loads are that version's fault."""
        worker = start(generation)
        if len(ended) < 4:
            ended.append(worker)
            os.kill(worker.pid, signal.SIGKILL)
        return worker

    monkeypatch.setattr(present, "start", ending)
    os.kill(driven.fleet.members[0].pid, signal.SIGKILL)
    driven.until(lambda: len(ended) == 4 and driven.serves(*NAMES))
    assert not driven.failed()


def test_a_worker_that_is_ended_by_a_signal_without_a_name_is_replaced(driven):
    driven.until(lambda: driven.serves(*NAMES))
    (died,) = driven.fleet.members
    os.kill(died.pid, signal.SIGRTMIN + 1)
    driven.until(lambda: driven.serves(*NAMES) and driven.fleet.members != [died])
    assert died.failure.reason.startswith(f"The worker was ended by signal {signal.SIGRTMIN + 1} after ")


def test_of_workers_that_cannot_all_be_started_none_is_left(driven, monkeypatch):
    driven.again(2)
    driven.until(lambda: driven.serves(*NAMES))
    present, started = driven.fleet.present, []
    start = present.start

    def failing(generation):
        if len(started) == 1:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(start(generation))
        return started[-1]

    driven.ask("one", 2)
    with monkeypatch.context() as refused:
        refused.setattr(present, "start", failing)
        with pytest.raises(BlockingIOError):
            for _ in range(100):
                driven.fleet.step()
    assert started[0].ended
    driven.until(lambda: driven.serves(*NAMES) and driven.versions()["one"] == 2)


def test_a_version_that_hangs_at_a_start_is_not_waited_for_once_another_one_is_asked_for(driven, monkeypatch):
    monkeypatch.setattr("serving.present.SLOW", 0.01)
    driven.until(lambda: driven.serves(*NAMES))
    driven.hang("two")
    driven.again()
    driven.until(lambda: driven.loading("two"))
    driven.ask("two", 2)
    driven.until(lambda: driven.serves(*NAMES))
    assert driven.versions()["two"] == 2
    assert not driven.failed()


def test_a_version_that_is_slow_at_a_start_answers_before_the_one_that_is_asked_for_meanwhile(driven):
    driven.until(lambda: driven.serves(*NAMES))
    driven.hang("two")
    driven.again()
    driven.until(lambda: driven.loading("two"))
    driven.ask("two", 2)
    worker = driven.loading("two")
    end = time.monotonic() + 6
    driven.until(lambda: time.monotonic() > end)
    assert driven.loading("two") is worker
    driven.let_go("two")
    driven.until(lambda: driven.fleet.present.accepts)
    assert driven.versions()["two"] == 1
    driven.until(lambda: driven.serves(*NAMES) and driven.versions()["two"] == 2)


def test_a_fallback_that_was_loaded_with_another_change_is_what_answers(driven, monkeypatch):
    monkeypatch.setattr("serving.fleet.AWAY_SECONDS", 0.1)
    driven.until(lambda: driven.serves(*NAMES))
    driven.ask("two", 2, fallback_version=1, fallback_folder=str(driven.file("two").parent))
    driven.until(lambda: driven.versions()["two"] == 2)
    driven.file("two", 2).unlink()
    driven.ask("one", 2)
    driven.until(lambda: driven.versions()["one"] == 2)
    assert driven.fleet.current.entries["two"].version == 1
    assert driven.failed() == {"two"}


def test_a_model_that_goes_and_comes_back_as_it_was_is_loaded(driven):
    driven.until(lambda: driven.serves(*NAMES))
    (driven.models / "one").rename(driven.models / ".one")
    desired = driven.folder / "desired" / "one.json"
    asked = desired.read_bytes()
    worker = driven.fleet.members[0]
    os.kill(worker.pid, signal.SIGKILL)
    while not worker.ended:
        time.sleep(0.01)
    driven.forget("one")
    driven.until(lambda: driven.serves("two", "three", "four"))
    (driven.models / ".one").rename(driven.models / "one")
    desired.write_bytes(asked)
    driven.until(lambda: driven.serves(*NAMES))


def test_after_a_restart_what_answered_before_answers_while_the_rest_is_tried(driven):
    driven.until(lambda: driven.serves(*NAMES))
    driven.ask("one", 2, fallback_version=1, fallback_folder=str(driven.file("one").parent))
    driven.ask("five", 1)
    driven.hang("one", 2)
    driven.hang("five")
    driven.again()
    driven.until(lambda: driven.serves(*NAMES))
    assert driven.versions()["one"] == 1
    assert driven.fleet.current.missing == ("five",)


def test_what_is_asked_for_anew_while_another_change_loads_stays_answered(driven, tmp_path, make_contents):
    def ask(asked):
        bundle = Desired("trips", 1, str(tmp_path / "trips"), asked, content="same")
        state.write(driven.folder / "desired", bundle)

    def answered():
        return state.read(driven.folder / "state", State)["trips"].asked

    write(tmp_path / "trips", make_contents())
    ask("first")
    driven.until(lambda: driven.serves(*NAMES, "trips"))
    ask_hanging(driven, "five")
    driven.until(lambda: driven.loading("five"))
    ask("back")  # as when a version that was to follow it is refused
    driven.until(lambda: answered() == "back")
    driven.let_go("five")
    driven.until(lambda: driven.serves(*NAMES, "trips", "five"))
    assert answered() == "back"


def test_a_refusal_that_cannot_be_written_down_keeps_nothing_else_from_being_told_and_is_written_later(driven):
    driven.until(lambda: driven.serves(*NAMES))
    (driven.folder / "failed").write_text("in the way")
    driven.ask("one", 2, b"no model")
    driven.until(lambda: driven.fleet._candidates)
    driven.until(lambda: not driven.fleet._candidates)
    driven.ask("two", 2)
    driven.until(lambda: driven.serves(*NAMES) and driven.versions()["two"] == 2)
    driven.until(lambda: [one["pid"] for one in driven.told()] == [one.pid for one in driven.fleet.members])
    (driven.folder / "failed").unlink()
    driven.until(lambda: driven.failed() == {"one"})
    driven.until(lambda: state.read(driven.folder / "state", State)["two"].version == 2)


@pytest.mark.parametrize("started", [True, False], ids=["at a start", "while it runs"])
def test_when_a_version_and_its_fallback_fail_the_refusal_of_what_was_asked_for_stays(driven, started):
    driven.until(lambda: driven.serves(*NAMES))
    driven.ask("one", 2, fallback_version=1, fallback_folder=str(driven.file("one").parent))
    driven.until(lambda: driven.serves(*NAMES) and driven.versions()["one"] == 2)
    for version in (1, 2):
        driven.file("one", version).write_bytes(b"no model")
    if started:
        driven.again()
    else:
        os.kill(driven.fleet.members[0].pid, signal.SIGKILL)
    driven.until(lambda: driven.serves("two", "three", "four"))
    refused = state.read(driven.folder / "failed", State)["one"]
    assert (refused.version, refused.asked) == (2, "2")


def test_what_could_not_be_forgotten_is_forgotten_later(driven):
    driven.until(lambda: driven.serves(*NAMES))
    file = driven.folder / "everywhere.json"
    file.unlink()
    file.mkdir()
    driven.forget("one")
    driven.until(lambda: "one" not in driven.versions())
    file.rmdir()
    driven.until(lambda: driven.serves("two", "three", "four"))
    driven.until(lambda: set(state.read(driven.folder / "state", State)) == {"two", "three", "four"})


def test_a_worker_that_dies_while_the_disk_is_full_is_replaced(driven, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    driven.until(lambda: driven.serves(*NAMES))
    monkeypatch.setattr("os.fsync", full)
    (died,) = driven.fleet.members
    os.kill(died.pid, signal.SIGKILL)
    driven.until(lambda: driven.serves(*NAMES) and driven.fleet.members != [died])


def test_what_cannot_be_read_for_a_moment_goes_on_answering(driven):
    driven.until(lambda: driven.serves(*NAMES))
    path = driven.folder / "desired" / "one.json"
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        driven.fleet.step()
    path.rmdir()
    path.write_bytes(content)
    driven.ask("two", 2)
    driven.until(lambda: driven.versions()["two"] == 2)
    driven.until(lambda: driven.serves(*NAMES))


def test_a_spare_that_has_not_imported_everything_is_not_waited_for(driven, monkeypatch):
    def held_up(plan, *, ahead=False):
        made = Worker(plan, ahead=ahead)
        if ahead:
            os.kill(made.pid, signal.SIGSTOP)
        return made

    monkeypatch.setattr("serving.pool.Worker", held_up)
    driven.until(lambda: driven.serves(*NAMES) and driven.fleet.pool.all())
    (spare,) = driven.fleet.pool.all()
    driven.ask("one", 2)
    driven.until(lambda: driven.serves(*NAMES) and driven.versions()["one"] == 2)
    assert spare in driven.fleet.pool.all()
    os.kill(spare.pid, signal.SIGCONT)
    driven.until(lambda: spare.imported)
    driven.ask("one", 3)
    driven.until(lambda: driven.serves(*NAMES) and driven.versions()["one"] == 3)
    assert driven.fleet.members == [spare]


@pytest.fixture
def hasty(driven, monkeypatch):
    """A fleet that answers, and waits shortly before it tries changes side by side."""
    monkeypatch.setattr("serving.fleet.PATIENCE_SECONDS", 0.5)
    driven.until(lambda: driven.serves(*NAMES))
    return driven


def ask_hanging(driven, name, version=1):
    """Ask for a model that does not load for now."""
    driven.ask(name, version)
    driven.hang(name, version)


def test_no_more_than_two_generations_load_at_the_same_time(hasty):
    for number, name in enumerate(["five", "six"], 1):
        ask_hanging(hasty, name)
        hasty.until(lambda number=number: len(hasty.fleet._candidates) == number)
    hasty.ask("one", 2)
    for _ in range(100):  # of 20 ms
        hasty.step()
        assert len(hasty.fleet._candidates) == 2
    hasty.let_go("five")
    hasty.until(lambda: "five" in hasty.versions())
    hasty.let_go("six")
    hasty.until(lambda: hasty.serves(*NAMES, "five", "six") and hasty.versions()["one"] == 2)


def test_what_loads_while_another_change_is_served_begins_anew_at_once_and_is_not_overtaken_again(hasty, monkeypatch):
    monkeypatch.setattr("serving.fleet.PATIENCE_GROWTH", 1000.0)  # however long the machine takes for some steps
    ask_hanging(hasty, "five")
    hasty.until(lambda: hasty.tried() == [{"five"}])
    hasty.ask("one", 2)
    hasty.until(lambda: len(hasty.fleet._candidates) == 2)
    hasty.ask("two", 2)
    hasty.until(lambda: hasty.versions()["one"] == 2)
    hasty.step()
    assert hasty.tried() == [{"five", "two"}], "what waited shares with it"
    assert hasty.fleet._candidates[0].base == hasty.fleet.current.number
    hasty.ask("one", 3)
    for _ in range(50):  # of 20 ms
        hasty.step()
        assert hasty.tried() == [{"five", "two"}], "it would have to begin anew once more"
    hasty.let_go("five")
    hasty.until(lambda: "five" in hasty.versions())
    hasty.until(lambda: hasty.serves(*NAMES, "five") and hasty.versions()["one"] == 3)


def test_a_model_that_changes_again_while_it_loads_leaves_those_that_came_with_it_alone(hasty):
    ask_hanging(hasty, "five")
    hasty.ask("six", 1)
    hasty.until(lambda: hasty.tried() == [{"five", "six"}])
    ask_hanging(hasty, "five", 2)
    hasty.until(lambda: "six" in hasty.versions())
    assert hasty.tried() in ([], [{"five"}])
    hasty.let_go("five", 2)
    hasty.until(lambda: hasty.serves(*NAMES, "five", "six"))
