"""Keeping commands running, with small ones: order, restarts, stopping, and what a killed supervisor leaves."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from flows.site import Site, read_state, write_state
from flows.stack import BACKOFF, down, end_orphans, end_tree, lock
from noria.settings import Settings
from tests.conftest import gone

SLEEPER = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
STUBBORN = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ignoring = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-S", "-c", ignoring])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""
SUPERVISOR = """
import json, signal, sys
from pathlib import Path
from flows.site import Site
from flows.stack import Service, Supervisor, end_orphans, lock
from noria.settings import Settings

home, SLEEPER = Path(sys.argv[1]), sys.argv[2]
def service(name, after=()):
    mark = home / f"{name}.up"
    mark.unlink(missing_ok=True)
    return Service(name, (sys.executable, "-S", "-c", SLEEPER, str(mark)), f"here:{name}", mark.exists, after=after)

held = lock(home)
if held is None:
    sys.exit(9)
end_orphans(home)
services = [service("first"), service("second", after=("first",))]
if len(sys.argv) > 3:
    services.append(Service("broken", (sys.executable, "-S", "-c", "raise SystemExit(7)"), "", lambda: False))
supervisor = Supervisor(Site(Settings(home=home)), services)
signal.signal(signal.SIGTERM, lambda *_: supervisor.stopping.set())
supervisor.run()
"""


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def start(home):
    """Start a supervisor of two sleepers; whatever is left of it is ended afterwards."""
    started = []

    def begin(*extra):
        process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(home), SLEEPER, *extra])
        started.append(process)
        return process

    yield begin
    for process in started:
        end_tree(process.pid, patience=0.1)
        process.wait()
    end_orphans(home)


def wait(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return found


def ready(home, supervisor):
    state = read_state(home)
    return state if (state.get("pid"), state.get("phase")) == (supervisor.pid, "ready") else None


def process_of(state, name):
    return psutil.Process(state["services"][name]["pid"])


def test_services_start_in_order_and_are_stopped_together(home, start):
    supervisor = start()
    state = wait(lambda: ready(home, supervisor))
    first, second = (process_of(state, name) for name in ("first", "second"))
    assert first.create_time() < second.create_time()
    assert state["services"]["first"]["restarts"] == 0
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(60) == 0
    assert gone(first) and gone(second)
    assert read_state(home)["phase"] == "stopped"
    assert not down(Site(Settings(home=home)))


def test_a_killed_service_is_started_again_and_it_says_so(home, start):
    supervisor = start()
    state = wait(lambda: ready(home, supervisor))
    killed, other = (process_of(state, name) for name in ("second", "first"))
    killed.kill()
    state = wait(lambda: (found := ready(home, supervisor)) and found["services"]["second"]["restarts"] and found)
    assert process_of(state, "second") != killed
    assert process_of(state, "first") == other, "its neighbour goes on"
    assert "second ended with code -9; restarting it (see logs/second.log)" in state["events"][-1]


def test_a_service_that_never_lives_waits_longer_each_time(home, start):
    start("broken")
    state = wait(
        lambda: (found := read_state(home)).get("services", {}).get("broken", {}).get("restarts", 0) > 1 and found
    )
    assert state["phase"] == "starting"
    assert "broken ended with code 7" in state["events"][0]
    assert f"in {BACKOFF[1]:g} s" in state["events"][1]


def test_a_home_has_one_supervisor(home, start):
    supervisor = start()
    wait(lambda: ready(home, supervisor))
    assert lock(home) is None
    assert start().wait(60) == 9
    assert ready(home, supervisor)


def test_what_a_killed_supervisor_left_is_ended_by_the_next(home, start):
    first = start()
    orphans = [process_of(wait(lambda: ready(home, first)), name) for name in ("first", "second")]
    first.kill()
    first.wait()
    assert not any(gone(orphan) for orphan in orphans)
    second = start()
    state = wait(lambda: ready(home, second))
    assert all(gone(orphan) for orphan in orphans)
    assert process_of(state, "first") not in orphans


def test_down_ends_what_a_killed_supervisor_left(home, start):
    supervisor = start()
    state = wait(lambda: ready(home, supervisor))
    orphans = [process_of(state, name) for name in ("first", "second")]
    supervisor.kill()
    supervisor.wait()
    assert not down(Site(Settings(home=home))), "no stack was running"
    assert all(gone(orphan) for orphan in orphans)
    assert read_state(home) == {**state, "phase": "stopped", "services": {}}


def test_down_knows_the_end_also_where_nobody_collects_ended_processes(home, start):
    """In a container whose first process collects nothing, the ended supervisor stays as a zombie."""
    supervisor = start()
    wait(lambda: ready(home, supervisor))
    ask = "import sys; from flows.site import Site; from flows.stack import down; print(down(Site.here(), patience=20))"
    asked = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, "NORIA_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.stdout.strip() == "True", asked.stderr
    assert read_state(home)["phase"] == "stopped"


def test_a_process_that_only_has_the_number_is_let_live(home):
    home.mkdir()
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) as stranger:
        created = psutil.Process(stranger.pid).create_time()
        write_state(home, {"services": {"first": {"pid": stranger.pid, "created": created - 1}, "second": {}}})
        end_orphans(home)
        assert stranger.poll() is None
        write_state(home, {"services": {"first": {"pid": stranger.pid, "created": created}}})
        end_orphans(home)
        assert not psutil.pid_exists(stranger.pid)


def test_who_does_not_want_to_end_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "child"
    with subprocess.Popen([sys.executable, "-S", "-c", STUBBORN, str(mark)]) as parent:
        child = psutil.Process(int(wait(lambda: mark.exists() and mark.read_text())))
        end_tree(parent.pid, patience=0.3)
        assert not psutil.pid_exists(parent.pid)
        assert gone(child)
    end_tree(parent.pid)
