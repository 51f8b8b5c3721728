"""The warm engine and its relay, with small modules: a run lives and ends exactly as if it had been started itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import flows
from tests.conftest import gone

RELAY = Path(flows.__file__).with_name("run_warm.py")
ENGINE = "import sys; from pathlib import Path; from flows.engine import Engine; Engine(Path(sys.argv[1])).serve()"
MODULES = {
    "says": "import os, sys\nprint(os.environ['WORD'], os.getcwd(), __name__)\nprint('oh', file=sys.stderr)\n",
    "leaves": "import sys\nsys.exit(int(sys.argv[0] == 'leaves') * 7)\n",
    "breaks": "raise ValueError('broken')\n",
    "waits": "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n",
    "tidies": (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)\n"
    ),
}


@pytest.fixture
def folder(tmp_path):
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


@pytest.fixture
def engine(folder):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen([sys.executable, "-c", ENGINE, str(folder / "s")], env=environment) as process:
        wait((folder / "s").exists)
        yield process
        process.kill()


def relay(folder, module):
    environment = {**os.environ, "PYTHONPATH": str(folder), "WORD": "hello"}
    command = [sys.executable, "-I", "-S", str(RELAY), str(folder / "s"), module]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def wait(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
    return found


def test_a_run_has_the_callers_environment_folder_and_terminal(engine, folder):
    with relay(folder, "says") as run:
        said, complaints = run.communicate(timeout=30)
    assert (run.returncode, said, complaints) == (0, f"hello {folder} __main__\n", "oh\n")


@pytest.mark.parametrize(("module", "code"), [("leaves", 7), ("breaks", 1)])
def test_the_exit_code_comes_back(engine, folder, module, code):
    with relay(folder, module) as run:
        _, complaints = run.communicate(timeout=30)
    assert run.returncode == code
    assert ("ValueError: broken" in complaints) == (module == "breaks")


def test_a_signal_reaches_the_run_and_how_it_ended_comes_back(engine, folder):
    with relay(folder, "tidies") as run:
        run.stdout.readline()
        run.terminate()
        assert run.wait(30) == 5
    with relay(folder, "waits") as run:
        run.stdout.readline()
        run.terminate()
        assert run.wait(30) == -signal.SIGTERM


def test_killing_the_relay_kills_the_run(engine, folder):
    with relay(folder, "waits") as run:
        process = psutil.Process(int(run.stdout.readline()))
        run.kill()
    wait(lambda: gone(process))
    with relay(folder, "leaves") as run:
        assert run.wait(30) == 7, "the engine goes on"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ends_with_its_engine(engine, folder, how):
    with relay(folder, "waits") as run:
        process = psutil.Process(int(run.stdout.readline()))
        engine.send_signal(how)
        assert run.wait(30) == 70
    wait(lambda: gone(process))


def test_runs_do_not_wait_for_each_other(engine, folder):
    with relay(folder, "waits") as one, relay(folder, "waits") as other:
        pids = {int(run.stdout.readline()) for run in (one, other)}
        assert len(pids) == 2
        one.kill()
        other.kill()
