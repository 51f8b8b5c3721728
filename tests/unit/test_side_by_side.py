"""`make test` runs three pytests: all are heard, and a failure in any is one of the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("ray", "servers", "rest")
SETTINGS = "[pytest]\nmarkers =\n    ray: one run\n    servers: another\n"
TESTS = """
import pytest

@pytest.mark.ray
def test_ray():
    assert {ray}

@pytest.mark.servers
def test_servers():
    assert {servers}

def test_rest():
    assert {rest}
"""


@pytest.mark.parametrize(
    ("broken", "more", "code"),
    [
        ("ray", (), 1),
        ("servers", (), 1),
        ("rest", (), 1),
        ("", ("-k", "servers"), 0),
        ("", ("-k", "none"), 5),
    ],
)
def test_all_runs_count(tmp_path, broken, more, code):
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "test_all.py").write_text(TESTS.format(**{name: name != broken for name in NAMES}))
    command = [sys.executable, "-m", "tests.side_by_side", "-c", str(tmp_path / "pytest.ini"), str(tmp_path), *more]
    # Without anybody's plugins each pytest starts in half a second.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr
    chosen = [name for name in NAMES if not more or name in more]
    assert ended.stdout.count("1 passed") + ended.stdout.count("1 failed") == len(chosen)
