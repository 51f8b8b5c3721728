"""The parent beside its workers: its slow half where it fails or hangs, and how much memory it may have."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import psutil
import pytest

from noria.lake import Lake
from noria.records import Window
from noria.settings import load_settings
from serving import background
from serving.background_process import Background
from serving.capture import Log
from serving.drain import ANY
from serving.entries import Entry
from serving.ids import Ids
from serving.machine import memory

EVER = Window(datetime(1900, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))


@pytest.fixture
def silent():
    """Where an MLflow listens that answers nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.settimeout(60)
        yield listener


def log_row(folder, identity_model):
    """One row that a worker handed over."""
    values, log = np.full((1, 3), 0.5, np.float32), Log(folder, "one")
    entry = Entry(Ids(b"k" * 32, 1).base("same", 1), 1, {"x": values}, {"y": values}, 1_600_000_000_000_000, [], 0.5)
    assert log.predictions(replace(identity_model("FP32"), workload="same"), [entry])
    log.rotate()


def test_a_registry_that_hangs_holds_up_neither_the_end_nor_the_log(silent, tmp_path, identity_model):
    settings = load_settings(home=tmp_path)
    stop, ended = threading.Event(), threading.Event()
    work = background.Work(settings, f"http://127.0.0.1:{silent.getsockname()[1]}", stop)
    running = threading.Thread(target=work.run, args=(ended,), daemon=True)
    running.start()
    asking = [silent.accept()[0] for _ in range(2)]  # both followers ask for the aliases
    stop.set()
    log_row(settings.serving / "log", identity_model)
    ended.set()
    running.join(40)  # a call is given up after 90 s
    assert not running.is_alive()
    assert len(Lake(str(settings.lake), "same", ANY).predictions(EVER)) == 1
    for connection in asking:
        connection.close()


@pytest.fixture
def stuck(tmp_path, capfd):
    """The process where something is in the way of the log's folder, once it has said so."""
    settings = load_settings(home=tmp_path)
    settings.serving.mkdir()
    (settings.serving / "log").write_text("in the way of the folder")
    slow = Background(settings, "", threading.Event())
    slow.may_start.set()
    slow.start()
    began, said = time.monotonic(), ""
    while "A step of the server failed; it is tried again." not in said:
        assert time.monotonic() - began < 60
        time.sleep(0.05)
        said += capfd.readouterr().err
    return slow


def test_what_cannot_be_set_up_is_tried_again(stuck, identity_model):
    """Nor does it end by a signal that its parent got, too: that one ends it last."""
    settings, began = stuck.settings, time.monotonic()
    children = psutil.Process().children()
    (process,) = (child for child in children if "serving.background" in child.cmdline())
    process.terminate()
    (settings.serving / "log").unlink()
    log_row(settings.serving / "log", identity_model)
    while list((settings.serving / "log" / "ready").iterdir()):
        assert time.monotonic() - began < 90
        time.sleep(0.05)
    assert process.is_running()
    stuck.stop.set()
    stuck.finish()
    assert not process.is_running()
    assert len(Lake(str(settings.lake), "same", ANY).predictions(EVER)) == 1


def test_what_cannot_be_set_up_holds_up_no_end(stuck):
    stuck.stop.set()
    ending = threading.Thread(target=stuck.finish, daemon=True)
    ending.start()
    ending.join(30)
    assert not ending.is_alive()
    assert (stuck.settings.serving / "log").read_text() == "in the way of the folder"


def system(root, groups, limits):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in groups))
    for group, limit in limits.items():
        path = root / "sys/fs/cgroup" / group
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "found"),
    [
        (["0::/"], {"memory.max": 1 << 20}, 1 << 20),
        (["0::/"], {"memory.max": "max"}, None),
        (["0::/a.slice/b.service"], {"a.slice/memory.max": 2 << 20, "a.slice/b.service/memory.max": "max"}, 2 << 20),
        (["0::/a.slice"], {"a.slice/memory.max": 1 << 60}, None),
        (["4:cpu:/", "3:memory:/docker/7"], {"memory/memory.limit_in_bytes": 3 << 20}, 3 << 20),
        (["3:cpu,memory:/a", "0::/"], {"memory/a/memory.limit_in_bytes": 4 << 20}, 4 << 20),
        (["3:memory:/"], {"memory/memory.limit_in_bytes": 9223372036854771712}, None),
        (["0::/../../b"], {"memory.max": 5 << 20}, 5 << 20),
    ],
    ids=["a container", "no limit", "a service", "more than there is", "v1 container", "v1", "v1 no limit", "outside"],
)
def test_a_container_has_less_memory_than_the_machine(tmp_path, groups, limits, found):
    assert memory(system(tmp_path, groups, limits)) == (found or psutil.virtual_memory().total)


def test_another_system_has_what_the_machine_has(tmp_path):
    assert memory(tmp_path) == psutil.virtual_memory().total
    assert 0 < memory() <= psutil.virtual_memory().total
