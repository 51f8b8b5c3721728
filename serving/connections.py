"""All connections of a worker, looked at together: those that take too long, and whether any may still bring a request.

Not here: what one of them does (`serving.http`).
"""

from __future__ import annotations

import asyncio
from typing import Any

SWEEP_SECONDS = 0.5
"""How often connections are looked at that took too long."""
SWEEP_AT_ONCE = 32
"""Connections that are looked at before the loop goes on: 8,000 at once held every request up for 27 ms."""
LAST_WORDS_SECONDS = 2.0
"""How long a connection may stay idle once the worker drains: a client that has just sent a request is still
answered."""
DRAIN_SECONDS = 0.02
"""Between two looks at whether a worker that ends has drained."""


async def sweep(connections: set[Any]) -> None:
    """Look at every connection again and again; runs until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        for count, connection in enumerate(list(connections), 1):
            if connection in connections:
                connection.sweep(loop.time())
            if count % SWEEP_AT_ONCE == 0:
                await asyncio.sleep(0)


async def drain(connections: set[Any]) -> None:
    """Wait until each connection that is left is at its last request; what stays silent is let go of."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.sleep(DRAIN_SECONDS)  # those that were just accepted are here by then
    while waiting := [one for one in connections if one.reading not in ("body", "answer", "nothing")]:
        for one in waiting:
            if one.reading == "headers" and loop.time() - max(began, one.since) > LAST_WORDS_SECONDS:
                one.transport.close()  # connected ahead, and nothing was sent
        await asyncio.sleep(DRAIN_SECONDS)
