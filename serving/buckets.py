"""Token buckets by name, of one number each, in bounded memory.

A bucket that is full again looks like one that was never used, so forgetting it loses nothing; that bounds the memory.
Not here: what is limited by them (`serving.rates`, `serving.audit`).
"""

from __future__ import annotations

import ipaddress

MOST_BUCKETS = 10_000
OTHERS = ""
"""The bucket that newcomers share while every other is in use."""


class Buckets:
    """Token buckets by name. `now` is any clock that does not go back, in seconds."""

    def __init__(self, most: int = MOST_BUCKETS, burst: float = 1.0) -> None:
        """A bucket holds what comes in `burst` seconds, and at least one token; about `most` buckets are kept."""
        self.most, self.burst = most, burst
        self._full_at: dict[str, float] = {}
        self._forget_at = 0.0

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, name: str, rate: float, now: float) -> float:
        """Take one token; 0, or the seconds to wait for one. `rate` is tokens a second."""
        full_at = self._full_at.get(name)
        if full_at is None and len(self._full_at) >= self.most and not self._forget(now):
            name = OTHERS
            full_at = self._full_at.get(name)
        start = now if full_at is None or full_at < now else full_at
        wait = start + 1 / rate - now - max(self.burst, 1 / rate)
        if wait > 1e-9:  # less is rounding
            return wait
        self._full_at[name] = start + 1 / rate
        return 0.0

    def _forget(self, now: float) -> bool:
        """Drop buckets that are full again; at most once a second, or a flood of names would pay for it each time."""
        if now < self._forget_at:
            return False
        self._full_at = {name: full_at for name, full_at in self._full_at.items() if full_at > now}
        if len(self._full_at) > self.most * 3 // 4:
            self._forget_at = now + 1
        return len(self._full_at) < self.most


def source_of(client: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 network that one IPv6 site has at least."""
    if ":" not in client:
        return client or "unknown"
    try:
        address = ipaddress.IPv6Address(client.partition("%")[0])
    except ValueError:
        return "unknown"
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
