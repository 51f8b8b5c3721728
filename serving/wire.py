"""What the encodings and the batcher hand to each other: a decoded request, its share of a run, and the answer.

An encoding (JSON records, Arrow, v2 in JSON, binary or gRPC) turns bytes into something `Asked`; the batcher runs the
rows of many such requests at once and gives each its `Scored`; `Asked.answer` turns that into bytes. Everything that a
client can get wrong is a `Refusal`. Not here: HTTP, gRPC, and the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from noria.errors import NoriaError

if TYPE_CHECKING:  # who only refuses does without what a model needs
    import numpy as np

    from serving.outcome import Scored

RETRY = ((b"retry-after", b"1"),)
"""Headers of a refusal that a second may change."""
LONGEST_SENTENCE = 600


class Refusal(NoriaError):
    """A request that is answered with an error: `status` (HTTP's) and a sentence."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(status, message, headers)
        self.status = status
        self.message = message
        self.headers = headers

    def __str__(self) -> str:
        return self.message


@dataclass(slots=True)
class Answer:
    """What is sent back."""

    status: int
    body: bytes
    rows: int = 0
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    error: str = ""
    """The sentence of a refusal; empty otherwise."""


@dataclass(slots=True)
class Rows:
    """Rows to score."""

    tensors: dict[str, np.ndarray]
    """The graph's inputs, [n, ...] each."""
    count: int
    """n."""
    times: np.ndarray | None = None
    """When each row happened, microseconds since 1970, [n]; None: now."""

    def __len__(self) -> int:
        return self.count


class Asked(Protocol):
    """A decoded request."""

    rows: Rows
    tells_ids: bool
    """Its answer has the prediction ids in it."""

    def answer(self, scored: Scored) -> Answer:
        """The bytes that go back."""


def refused(refusal: Refusal) -> Answer:
    """A refusal as an answer: `{"error": sentence}`."""
    sentence = refusal.message
    if len(sentence) > LONGEST_SENTENCE:
        sentence = sentence[: LONGEST_SENTENCE - 3] + "..."
    # A lone surrogate cannot be written as UTF-8, and a sentence may quote what was sent.
    sentence = sentence.encode("utf-8", "replace").decode()
    return Answer(refusal.status, orjson.dumps({"error": sentence}), headers=refusal.headers, error=sentence)


def as_json(content: Any, status: int = 200) -> Answer:
    """Plain data as an answer."""
    return Answer(status, orjson.dumps(content))
