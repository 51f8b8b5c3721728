"""Which of the hot routes a path is: the ones that carry predictions and labels. Everything else is `serving.app`'s."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

KEPT_CHARACTERS = 512
"""Longer paths are read anew each time: what clients choose must not fill the memory."""


class Hot(NamedTuple):
    """A hot route."""

    path: str
    """Decoded, without the query."""
    name: str
    """predict, infer or feedback."""
    workload: str
    version: int | None = None


NOWHERE = Hot("", "", "")
"""Where a request goes of which too little has come to say."""


def hot(path: str) -> Hot | None:
    """The hot route at a decoded path, without its query; None: another route."""
    return (_hot if len(path) <= KEPT_CHARACTERS else _hot.__wrapped__)(path)


def hot_url(url: bytes) -> Hot | None:
    """The same for a URL as it comes over the wire."""
    return (_hot_url if len(url) <= KEPT_CHARACTERS else _hot_url.__wrapped__)(url)


@lru_cache(1024)
def _hot(path: str) -> Hot | None:
    match path.split("/"):
        case ["", "predict" | "feedback" as name, workload]:
            return Hot(path, name, workload)
        case ["", "v2", "models", workload, "infer"]:
            return Hot(path, "infer", workload)
        case ["", "v2", "models", workload, "versions", version, "infer"] if is_version(version):
            return Hot(path, "infer", workload, int(version))
    return None


@lru_cache(1024)
def _hot_url(url: bytes) -> Hot | None:
    if not url.startswith(b"/"):
        return None
    return hot(unquote(url.split(b"?")[0].decode("latin-1")))


def is_version(text: str) -> bool:
    """Whether a path's part is a version number."""
    return text.isascii() and text.isdigit() and len(text) <= 9
