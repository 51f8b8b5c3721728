"""A process that is started ahead of its time: who imports is out of the way, who answers is not."""

import os
import subprocess
import sys

import pytest

SEEN = """
import os, sys, threading

def nice():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

imported = nice()

def main():
    print(imported, nice(), sys.argv[1:])
"""


def spare(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-m", "serving.spare", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness belongs to the process")
def test_importing_has_a_low_priority_and_what_follows_does_not(tmp_path):
    (tmp_path / "seen.py").write_text(SEEN)
    here = os.getpriority(os.PRIO_PROCESS, 0)
    ended = spare(tmp_path, "seen", "--number", "3")
    assert ended.stdout == f"{min(here + 10, 19)} {here} ['--number', '3']\n", ended.stderr


def test_what_cannot_be_imported_is_said_once(tmp_path):
    (tmp_path / "broken.py").write_text("raise ValueError('broken')\n")
    ended = spare(tmp_path, "broken")
    assert ended.returncode == 1 and ended.stderr.count("ValueError: broken") == 1
