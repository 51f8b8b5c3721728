"""Steady requests from a thread: keep-alive clients, a fixed rate, every answer and every failure kept with its time.

A request that was sent and not wholly answered is a failure, also on a connection that the server closed meanwhile:
nothing is sent twice. Not here: what the answers mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import Self

PAUSE = 0.02
"""Before a client that failed tries again."""
PATIENCE = 10.0


@dataclass(frozen=True)
class Kept:
    """One answer."""

    at: float
    """`time.monotonic()` when it was whole."""
    seconds: float
    status: int
    content: bytes


@dataclass
class Traffic:
    """Requests to one address, while the `with` block runs."""

    port: int
    path: str
    content: bytes
    clients: int = 8
    rate: float = 300.0
    """Requests a second of all clients together; late ones are sent at once."""
    answers: list[Kept] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), name="traffic")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    async def _all(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(self.clients)))

    async def _client(self, number: int) -> None:
        head = f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(self.content)}\r\n\r\n".encode() + self.content
        every = self.clients / self.rate
        due = time.monotonic() + every * number / self.clients
        link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self._ending.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due + every, time.monotonic() - every)
            began = time.monotonic()
            try:
                link = link or await asyncio.open_connection("127.0.0.1", self.port)
                kept, is_open = await asyncio.wait_for(_exchange(*link, request, began), PATIENCE)
                self.answers.append(kept)
            except (OSError, EOFError, TimeoutError) as error:
                self.failures.append((began, f"{type(error).__name__}: {error}"))
                is_open = False
                await asyncio.sleep(PAUSE)
            if not is_open and link is not None:
                await _close(link[1])
                link = None
        if link is not None:
            await _close(link[1])


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, began: float
) -> tuple[Kept, bool]:
    """The answer, and whether the connection stays open. Raises OSError or EOFError."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    content = await reader.readexactly(length)
    now = time.monotonic()
    return Kept(now, now - began, int(head[9:12]), content), b"connection: close" not in head


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
