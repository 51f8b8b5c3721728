"""The short form of `make soak`: the same commands, fewer swaps and kills, and only counts are judged."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("form", [("--swaps", "3", "--kills", "0"), ("--swaps", "0", "--kills", "2")])
def test_nothing_is_lost_or_doubled(form):
    command = [sys.executable, "-m", "benchmarks.soak", *form, "--rate", "100", "--counts-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
