"""How often one key may ask, or one address where keys are off.

A second's worth may come at once. A server of n workers gives each 1/n of the rate: a client that keeps one connection
open talks to one worker, is held to that share, and is told it, for that is what it can keep to. Workers share nothing,
so that the limit can neither cost a lock nor fail. Not here: who asks (`serving.access`), the buckets themselves.
"""

from __future__ import annotations

from math import ceil

from serving.access import Principal
from serving.buckets import MOST_BUCKETS, Buckets, source_of
from serving.wire import Refusal


class Rates:
    """The rate limits of one worker."""

    def __init__(self, rate: float = 0, workers: int = 1, most: int = MOST_BUCKETS) -> None:
        """`rate`: requests a second of a key that has none of its own, or of an address; 0: no limit."""
        self.rate = rate
        self.workers = workers
        self.keys, self.addresses = Buckets(most), Buckets(most)

    def take(self, principal: Principal, now: float, client: str = "") -> None:
        """Count one request of a key, or of the address `client` where there is none.

        Raises:
            Refusal: 429 with the headers that tell a client when to come again.
        """
        rate = principal.rate or self.rate
        if not rate:
            return
        share = rate / self.workers
        if principal.name:
            wait = self.keys.take(principal.name, share, now)
        else:
            wait = self.addresses.take(source_of(client), share, now)
        if wait:
            raise _too_often(principal, rate, share, wait)


def _too_often(principal: Principal, rate: float, share: float, wait: float) -> Refusal:
    """The fields of the IETF's draft (RateLimit-Policy, RateLimit: quota, window, remaining, seconds), and the three of
    its earlier revisions, which is what clients in use read. They tell the share of the worker that answers."""
    window = max(1, ceil(1 / share))
    quota, seconds = max(1, int(share * window)), max(1, ceil(wait))
    policy = "key" if principal.name else "address"
    headers = {
        "retry-after": str(seconds),
        "ratelimit-policy": f'"{policy}";q={quota};w={window}',
        "ratelimit": f'"{policy}";r=0;t={seconds}',
        "ratelimit-limit": str(quota),
        "ratelimit-remaining": "0",
        "ratelimit-reset": str(seconds),
    }
    whose = f"The key '{principal.name}'" if principal.name else "Your address"
    each = f", and {share:.3g} times over one connection" if share < rate else ""
    return Refusal(
        429,
        f"{whose} may ask {rate:g} times a second{each}; come again in {seconds} s.",
        tuple((name.encode(), value.encode()) for name, value in headers.items()),
    )
