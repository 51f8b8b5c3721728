"""The spare worker: it waits for the next swap, and is in nobody's way until it does."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from serving import generation
from serving.generation import Generation
from serving.pool import Pool
from serving.supervise import Plan, listen

PATIENCE = 60


@pytest.fixture
def pool(tmp_path):
    """A pool without workers yet; what it started is ended afterwards."""
    listener = listen("127.0.0.1", 0)
    made = Pool(Plan(listener, tmp_path, "cpu"))
    yield made
    made.stop()
    listener.close()


@pytest.fixture
def nothing(tmp_path):
    """The file of a generation of no models."""
    return generation.write(tmp_path, Generation(1))


def spare_of(pool):
    pool.keep_spare()
    (spare,) = pool.all()
    return spare


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def heard(worker, phase):
    worker.look()
    assert worker.failure is None
    return worker.phase == phase


def test_a_spare_that_waits_is_the_next_worker_with_the_usual_priority(pool, nothing):
    spare = spare_of(pool)
    until(lambda: heard(spare, "waiting"))
    assert os.getpriority(os.PRIO_PROCESS, spare.pid) == 0  # of the thread that answers
    worker = pool.start(1, nothing)
    try:
        assert worker is spare
        until(lambda: heard(worker, "loaded"))
    finally:
        worker.kill()


def test_nobody_waits_for_a_spare_that_is_not_ready(pool, nothing):
    spare = spare_of(pool)
    worker = pool.start(1, nothing)
    try:
        assert worker is not spare and not psutil.pid_exists(spare.pid)
        until(lambda: heard(worker, "loaded"))
        assert not pool.all()
    finally:
        worker.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to the process elsewhere")
def test_a_spare_gives_way_while_it_imports(pool):
    spare, seen = spare_of(pool), set()

    def ready():
        for path in Path(f"/proc/{spare.pid}/task").iterdir():
            if int(path.name) != spare.pid:
                seen.add(os.getpriority(os.PRIO_PROCESS, int(path.name)))
        return heard(spare, "waiting")

    until(ready)
    assert 19 in seen
