"""The fleet by itself: what is desired is written down, its steps are taken here, its workers are real."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from serving import state
from serving.fleet import Fleet
from serving.state import Desired, State
from serving.supervise import Plan, listen
from tests.integration.test_repository import plain

NAMES = ("one", "two", "three", "four")


class Driven:
    """A fleet whose steps this process takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder / "serving", folder / "models"
        for name in NAMES:
            self.ask(name, 1)
        self.fleet = Fleet(Plan(listen("127.0.0.1", 0), self.folder, "cpu"))

    def ask(self, name, version, content=None):
        folder = self.models / name / str(version)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(content or plain(version))
        state.write(self.folder / "desired", Desired(name, version, str(folder), f"{version}", plain=True))

    def forget(self, *names):
        for name in names:
            state.remove(self.folder / "desired", name)

    def until(self, condition, seconds=30.0):
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds
            time.sleep(self.fleet.step())

    def serves(self, *names):
        phases = {worker.phase for worker in self.fleet.members}
        return set(self.fleet.current.entries) == set(names) and phases == {"accepting"}

    def versions(self):
        return {name: entry.version for name, entry in self.fleet.current.entries.items()}


@pytest.fixture
def driven(tmp_path):
    made = Driven(tmp_path)
    yield made
    made.fleet.stop()


def test_what_should_go_goes_together_however_it_was_tried_before(driven, caplog):
    driven.until(lambda: driven.serves(*NAMES))
    for name in NAMES[:3]:  # a look at the folder in the midst of their removal sees the first one gone
        shutil.rmtree(driven.models / name)
    driven.forget("one")
    driven.until(lambda: "Removal of one is tried again." in caplog.text)
    before = driven.fleet.current.number
    driven.forget("two", "three")
    driven.until(lambda: driven.serves("four"))
    assert driven.fleet.current.number == before + 2, "the one that was refused, and the one without all three"


def test_what_does_not_load_holds_up_neither_what_goes_nor_what_comes(driven):
    driven.until(lambda: driven.serves(*NAMES))
    shutil.rmtree(driven.models / "two")
    driven.forget("two")
    driven.ask("one", 2, b"no model")
    driven.ask("three", 2)
    driven.until(lambda: driven.serves("one", "three", "four") and driven.versions()["three"] == 2)
    assert driven.versions() == {"one": 1, "three": 2, "four": 1}
    assert set(state.read(driven.folder / "failed", State)) == {"one"}


def test_what_is_gone_when_the_first_worker_starts_leaves_nothing_behind(driven):
    shutil.rmtree(driven.models / "one")
    driven.forget("one")
    driven.until(lambda: driven.serves("two", "three", "four"))
    assert not state.read(driven.folder / "failed", State)


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
