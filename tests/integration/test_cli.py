"""The command where no stack runs: answers quickly, in sentences, with the exit codes that its module promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.site import write_state

NORIA = str(Path(sys.executable).with_name("noria"))
HEAVY = {"torch", "ray", "mlflow", "prefect", "evidently", "matplotlib"}
COMMANDS = (
    "demo",
    "up",
    "down",
    "status",
    "serve",
    "train",
    "watch",
    "batch",
    "promote",
    "rollback",
    "shadow",
    "new",
    "check",
)


@pytest.fixture
def noria(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}
    given = {**clean, "NORIA_HOME": str(tmp_path / "home"), "COLUMNS": "200"}

    def run(*arguments):
        return subprocess.run(
            [NORIA, *arguments], env=given, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def test_help_names_every_command(noria):
    said = noria("--help")
    assert said.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in said.stdout, command


def test_without_a_command_there_is_help(noria):
    said = noria()
    assert said.returncode == 2
    assert "Usage" in said.stdout + said.stderr


def test_status_without_a_stack(noria):
    said = noria("status", "--json")
    assert (said.returncode, json.loads(said.stdout)) == (3, {"phase": "stopped", "services": {}})
    said = noria("status")
    assert said.returncode == 3
    assert "noria up" in said.stdout


def test_down_without_a_stack(noria):
    said = noria("down")
    assert (said.returncode, said.stdout.strip()) == (0, "nothing was running")


SENTENCES = {
    ("train", "taxi"): "No stack runs in",
    ("promote", "taxi", "1"): "No stack runs in",
    ("rollback", "taxi"): "No stack runs in",
    ("shadow", "taxi"): "No stack runs in",
    ("shadow", "taxi", "--window", "soon"): "'soon' is no length of time",
    ("check", "bus"): "There is no workload 'bus'; known are taxi, spam.",
    ("check", "nowhere:WORKLOAD"): "Cannot import 'nowhere'",
    ("demo", "--from", "soon"): "--from and --to take dates such as 2019-12-02",
    ("demo", "--from", "2020-06-01", "--to", "2020-01-01"): "--from must lie",
    ("new", "No-Name"): "lower-case letters",
}


@pytest.mark.parametrize("arguments", SENTENCES, ids=" ".join)
def test_mistakes_get_a_sentence(noria, arguments):
    said = noria(*arguments)
    assert said.returncode == (5 if arguments[1] == "nowhere:WORKLOAD" else 1)
    told = said.stdout + said.stderr
    assert SENTENCES[arguments] in told
    assert "Traceback" not in told


@pytest.mark.parametrize("arguments", [("train",), ("promote", "taxi", "none"), ("promote", "taxi", "0"), ("fly",)])
def test_wrong_usage_is_2(noria, arguments):
    assert noria(*arguments).returncode == 2


def test_a_new_workload_is_written_once(noria, tmp_path):
    assert noria("new", "bus").returncode == 0
    assert (tmp_path / "bus.py").exists()
    again = noria("new", "bus")
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_the_command_is_light_until_it_must_not_be():
    code = "import sys; import flows.cli; print(' '.join(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(said.stdout.split())


def test_a_stack_that_was_killed_is_not_a_traceback(noria, tmp_path):
    """What is left in the home after the machine lost its power: addresses where nobody answers."""
    services = {
        name: {"url": f"http://127.0.0.1:{port}"} for name, port in (("prefect", 3), ("mlflow", 4), ("serving", 5))
    }
    (tmp_path / "home").mkdir()
    write_state(tmp_path / "home", {"pid": 2**30, "phase": "ready", "events": [], "services": services})
    assert noria("status").returncode == 3
    for arguments, who in {("train", "taxi"): "Prefect", ("rollback", "taxi"): "The MLflow server"}.items():
        said = noria(*arguments)
        assert said.returncode == 1
        assert f"{who}" in said.stderr and "noria up" in said.stderr
        assert "Traceback" not in said.stderr
