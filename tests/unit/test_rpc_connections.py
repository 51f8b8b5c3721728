"""What a worker that may open few files takes: nothing is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHARE = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (900, 900))\n"
    "from serving.limits import Limits; from serving.worker import _affordable\n"
    "print(_affordable(Limits(), int(sys.argv[1])).connections)"
)


@pytest.mark.parametrize(("ports", "connections"), [(1, 644), (2, 322)])
def test_the_ports_share_the_files_that_are_left(ports, connections):
    """Other files are there too: the log's, the state's."""
    done = subprocess.run([sys.executable, "-c", SHARE, str(ports)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == connections
