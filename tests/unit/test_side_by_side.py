"""`make test` runs two pytests: both are heard, and a failure in either is one of the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = "[pytest]\nmarkers = beside: of the one run\n"
TESTS = """
import pytest

@pytest.mark.beside
def test_one():
    assert {one}

def test_other():
    assert {other}
"""


@pytest.mark.parametrize(
    ("one", "other", "more", "code"),
    [
        (False, True, (), 1),
        (True, False, (), 1),
        (True, True, ("-k", "one"), 0),
        (True, True, ("-k", "neither"), 5),
    ],
)
def test_both_runs_count(tmp_path, one, other, more, code):
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "test_both.py").write_text(TESTS.format(one=one, other=other))
    command = [sys.executable, "-m", "tests.side_by_side", "-c", str(tmp_path / "pytest.ini"), str(tmp_path), *more]
    # Without anybody's plugins each pytest starts in half a second.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr
    chosen = {name: not more or name in more for name in ("one", "other")}
    assert ended.stdout.count("1 passed") + ended.stdout.count("1 failed") == sum(chosen.values())
