"""Open-loop load: requests leave when the clock says so, whether or not earlier ones were answered.

    python -m benchmarks.serving.openloop PORT PATH BODY_FILE CONTENT_TYPE RATE SECONDS CONNECTIONS [HEADER VALUE]...

A request that finds no idle connection waits for none: it counts as `held`, and the run says so. Prints one line of
JSON. Meant to be pinned to the load's core. Not here: closed-loop load (`benchmarks.serving.load`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop

TICK = 0.001
SETTLE = 5.0
"""Seconds that answers may come in after the last request has left."""


@dataclass
class Tally:
    """What became of the requests."""

    sent: int = 0
    held: int = 0
    broken: int = 0
    fine: list[float] = field(default_factory=list)
    """Seconds until each good answer."""
    refused: list[float] = field(default_factory=list)
    """Seconds until each 503 or 429."""
    lags: list[float] = field(default_factory=list)
    """Seconds by which the generator itself was late, a tick each: what latencies are too long by."""
    other: dict[int, int] = field(default_factory=dict)
    """Any other status, counted."""

    def take(self, status: int, seconds: float) -> None:
        """Count one answer."""
        if status == 200:
            self.fine.append(seconds)
        elif status in (503, 429):
            self.refused.append(seconds)
        else:
            self.other[status] = self.other.get(status, 0) + 1

    def summary(self, seconds: float) -> dict[str, object]:
        """As it is printed: rates a second, latencies in milliseconds."""
        return {
            "offered": (self.sent + self.held) / seconds, "sent": self.sent, "held": self.held, "broken": self.broken,
            "other": self.other, "fine": len(self.fine), "refused": len(self.refused),
            "goodput": len(self.fine) / seconds,
            "fine_p50": percentile(self.fine, 50), "fine_p99": percentile(self.fine, 99),
            "lag_p99": percentile(self.lags, 99),
            "refused_p50": percentile(self.refused, 50), "refused_p99": percentile(self.refused, 99),
        }  # fmt: skip


def percentile(seconds: list[float], of: float) -> float | None:
    """In milliseconds; None when there is none."""
    return float(np.percentile(np.array(seconds) * 1000, of)) if seconds else None


class Client(asyncio.Protocol):
    """One connection, with one request in flight at most."""

    def __init__(self, idle: deque[Client], tally: Tally) -> None:
        self.idle, self.tally = idle, tally
        self.sent_at: float | None = None
        self.received = b""
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It may be used."""
        self.transport, self.open = transport, True
        self.idle.append(self)

    def send(self, request: bytes) -> None:
        """Send now."""
        self.sent_at, self.received = time.perf_counter(), b""
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Take an answer once it is whole."""
        self.received = self.received + data if self.received else data
        head = self.received.find(b"\r\n\r\n")
        if head < 0 or self.sent_at is None:
            return
        lower = self.received[:head].lower()
        length = int(lower.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self.received) < head + 4 + length:
            return
        self.tally.take(int(self.received[9:12]), time.perf_counter() - self.sent_at)
        self.sent_at = None
        if b"connection: close" in lower:
            self.open = False
            self.transport.close()
        else:
            self.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        """What was in flight is broken."""
        self.open = False
        if self.sent_at is not None:
            self.tally.broken += 1
            self.sent_at = None


async def drive(port: int, request: bytes, *, rate: float, seconds: float, connections: int) -> Tally:
    """Send `rate` requests a second for so many seconds; connections that the server closes are opened again."""
    loop, tally, idle = asyncio.get_running_loop(), Tally(), deque[Client]()
    clients: list[Client] = []

    async def connect() -> None:
        try:
            _, client = await loop.create_connection(lambda: Client(idle, tally), "127.0.0.1", port)
            clients.append(client)
        except OSError:
            tally.broken += 1

    for _ in range(connections):
        await connect()
    began = time.perf_counter()
    while tally.sent + tally.held < int(seconds * rate):  # what a stall made late is sent all the same
        elapsed = min(time.perf_counter() - began, seconds)
        for _ in range(int(elapsed * rate) - tally.sent - tally.held):
            while idle and not idle[0].open:
                idle.popleft()
            if idle:
                idle.popleft().send(request)
                tally.sent += 1
            else:
                tally.held += 1
        lost = len(clients) - sum(client.open for client in clients) if tally.held else 0
        clients = [client for client in clients if client.open] if lost else clients
        ticked = time.perf_counter()
        await asyncio.gather(*(connect() for _ in range(min(lost, 50))), asyncio.sleep(TICK))
        tally.lags.append(time.perf_counter() - ticked - TICK)
    deadline = time.perf_counter() + SETTLE
    while any(client.sent_at is not None for client in clients) and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)
    for client in clients:
        client.transport.close()
    await asyncio.sleep(TICK)  # their ends are counted: what is unanswered by now is broken
    return tally


def main(port: str, path: str, body: str, content_type: str, *rest: str) -> None:
    """Drive and print."""
    rate, seconds, connections, *pairs = rest
    content = Path(body).read_bytes()
    headers = {"host": "127.0.0.1", "content-type": content_type, "content-length": str(len(content))}
    headers |= dict(zip(pairs[::2], pairs[1::2], strict=True))
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    driven = drive(
        int(port), head.encode() + content, rate=float(rate), seconds=float(seconds), connections=int(connections)
    )  # fmt: skip
    print(json.dumps(uvloop.run(driven).summary(float(seconds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
