"""How a worker that ends lets go of its gRPC connections without failing a call: each is told to leave, then ended.

grpc's own shutdown cancels what clients send before they hear of it. So this worker stops listening, tells each client
with a frame GOAWAY of HTTP/2 (RFC 9113, section 6.8: whatever it still sends is answered), and waits until it has left;
a client then connects anew, to another worker. grpc has no call for that frame, so it is written to the socket while
answers are held back and nothing else is on its way. A client that takes nothing is hung up on in the same way: grpc
has no call for that, either. Linux only; elsewhere grpc's shutdown is all there is. Not here: calls (`serving.rpc`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import stat
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

GOAWAY = struct.pack(">I", 8)[1:] + bytes((7, 0)) + struct.pack(">III", 0, 2**31 - 1, 0)
"""Frame of 8 bytes, type 7, no flags, of the whole connection: the last stream is the highest there is, no error."""
LOOK_SECONDS = 0.01
QUIET_SECONDS = 0.5
"""How long answers are held back at most, for the connections that have something on its way."""
INTERNET = (socket.AF_INET, socket.AF_INET6)
ESTABLISHED, LISTENING = 1, 10
"""States of a socket, in the first byte of `struct tcp_info`."""
WAITING_IN_TCP_INFO = slice(24, 28)
"""Where `struct tcp_info` of a listening socket has the number of connections that wait to be accepted."""
CONFIRMED_IN_TCP_INFO = slice(120, 128)
"""And that of a connection the number of bytes that the other side has confirmed."""
TCP_INFO_BYTES = 128
MAPPED = "::ffff:"
"""Before the address of a client of IPv4 that came to a socket of IPv6."""
SETTINGS_BYTES = 9
"""Of the smallest frame SETTINGS, which begins a connection."""

logger = logging.getLogger(__name__)


async def leave(port: int, gate: asyncio.Event, seconds: float) -> None:
    """Take no more connections on a port, and see off those that are there; at most so many seconds.

    `gate` holds the answers of calls while it is not set.
    """
    if sys.platform != "linux":
        return
    deadline = time.monotonic() + seconds
    try:
        with _sockets(port, LISTENING) as listening:
            for one in listening:
                await _close(one)
        await _tell(port, gate)
        while time.monotonic() < deadline:
            with _sockets(port, ESTABLISHED) as left:
                if not left:
                    return
            await asyncio.sleep(LOOK_SECONDS * 5)
    except OSError:
        logger.exception("gRPC connections could not be told to leave; some calls may be cancelled")
    finally:
        gate.set()


async def _close(listening: socket.socket) -> None:
    """Listen no more, at a moment when nobody waits to be accepted: they would be turned away."""
    for _ in range(100):
        if not any(_info(listening)[WAITING_IN_TCP_INFO]):
            break
        await asyncio.sleep(0.001)
    with contextlib.suppress(OSError):  # a descriptor of the same socket was here before
        listening.shutdown(socket.SHUT_RDWR)


async def _tell(port: int, gate: asyncio.Event) -> None:
    """Write the frame to each connection on which nothing is on its way, twice in a row: then no frame is half sent."""
    gate.clear()
    deadline = time.monotonic() + QUIET_SECONDS
    with _sockets(port, ESTABLISHED) as connections:
        left, quiet = list(connections), set[socket.socket]()
        while left and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)
            silent = {one for one in left if _heard(one) and not _unsent(one)}
            for one in silent & quiet:
                left.remove(one)
                with contextlib.suppress(OSError):  # it has left meanwhile
                    one.send(GOAWAY, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            quiet = silent
    gate.set()
    if left:
        logger.warning("%d gRPC connections have long answers on their way and were not told to leave", len(left))


def hang_up(port: int, peers: set[str]) -> None:
    """End this process's connections of a port to these clients, each as gRPC names it: `ipv4:127.0.0.1:5000`.

    For a thread: it looks through all open files.
    """
    if sys.platform != "linux":
        return
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since, or no connection
            if not stat.S_ISSOCK(path.stat().st_mode):
                continue
            with _duplicate(path) as one:
                if one.family in INTERNET and _peers(one) & peers and one.getsockname()[1] == port:
                    one.shutdown(socket.SHUT_RDWR)


def _peers(connection: socket.socket) -> set[str]:
    """What gRPC may call a client."""
    host, number, *_ = connection.getpeername()
    return {f"ipv4:{host.removeprefix(MAPPED)}:{number}", f"ipv6:%5B{host}%5D:{number}"}


def _heard(connection: socket.socket) -> bool:
    """Whether the other side has what begins a connection: no frame may come before it."""
    try:
        return int.from_bytes(_info(connection)[CONFIRMED_IN_TCP_INFO], sys.byteorder) >= SETTINGS_BYTES
    except OSError:
        return True


def _unsent(connection: socket.socket) -> int:
    """Bytes that the other side has not confirmed."""
    try:
        (size,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    except OSError:
        return 0
    return int(size)


@contextlib.contextmanager
def _sockets(port: int, state: int) -> Iterator[list[socket.socket]]:
    """This process's own TCP sockets of a port that are in a state, as duplicates."""
    found: list[socket.socket] = []
    try:
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # closed since
                if stat.S_ISSOCK(path.stat().st_mode):
                    one = _duplicate(path)
                    if _is(one, port, state):
                        found.append(one)
                    else:
                        one.close()
        yield found
    finally:
        for one in found:
            one.close()


def _duplicate(path: Path) -> socket.socket:
    """Raises OSError where the descriptor is closed by now, or another file's."""
    copy = os.dup(int(path.name))
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _is(one: socket.socket, port: int, state: int) -> bool:
    with contextlib.suppress(OSError):
        internet = one.family in INTERNET and one.type == socket.SOCK_STREAM
        return internet and one.getsockname()[1] == port and _info(one)[0] == state
    return False


def _info(one: socket.socket) -> bytes:
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
