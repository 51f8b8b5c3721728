"""What a worker that may open few files takes, and what looking through its files leaves open: nothing is started."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving.rpc_drain import hang_up, leave

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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is looked through")
def test_a_descriptor_that_becomes_a_file_while_sockets_are_looked_through_is_not_kept(tmp_path, monkeypatch):
    gate = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, (tmp_path / "file").open("w") as file:
        duplicate = os.dup
        monkeypatch.setattr(os, "dup", lambda _: duplicate(file.fileno()))
        before = len(list(Path("/proc/self/fd").iterdir()))
        hang_up(server.getsockname()[1], set())
        asyncio.run(leave(server.getsockname()[1], gate, 0.1))
        assert len(list(Path("/proc/self/fd").iterdir())) == before
