"""How much one client may ask of the server: sizes, times, counts; and the checks of a body before it is decoded.

Every limit is here with its default and may be set by `NORIA_LIMIT_` and its name, for example
`NORIA_LIMIT_BODY_BYTES=1048576`. Times and connections are enforced by whoever reads the socket. Not here: who may ask
(`serving.access`), how often (`serving.rates`), and the rows of a request (`serving.protocol`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np

from noria.errors import SettingsError
from serving.wire import Refusal

PREFIX = "NORIA_LIMIT_"
JSON_DEPTH = 64
"""Arrays and objects within each other. Not to be set: nothing that is asked here needs a tenth of it."""
JSON_LISTS, JSON_VALUES = 2**20, 2**23
"""Arrays and objects, and values (as many as commas), of one body. Each takes ten to thirty times its bytes once it is
read, and nothing else runs meanwhile. Not to be set either: 10,000 rows of 784 numbers are fewer."""
SLICE_BYTES = 16 * 1024
"""Compressed bytes that are handed to zlib at a time, as it copies what it left over."""
PIECE_BYTES = 256 * 1024
"""Inflated bytes that are taken from zlib at a time: it gathers them in blocks and joins these, so that they are there
twice. At deflate's best ratio (1,032) a slice would be a piece of 17 MB."""
ALWAYS_BYTES = 2**20
"""Bodies that inflate to no more than this may have any ratio."""
MOST_MEMBERS = 2_000
"""Members of one gzip body; each costs a new decompressor."""
ENCODINGS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 0}
"""Content encodings and zlib's window argument; deflate comes with zlib's header or without."""
ACCEPTED = ((b"accept-encoding", b"gzip, deflate, identity"),)


@dataclass(frozen=True)
class Limits:
    """Each is a positive number; times are seconds."""

    body_bytes: int = 10 * 2**20
    """Largest body as it arrives."""
    inflated_bytes: int = 64 * 2**20
    """Largest body after decompression."""
    ratio: int = 200
    """A body may inflate to so many times its size (or to 1 MiB): text reaches 20, tensors of zeros 1,000."""
    header_bytes: int = 32 * 2**10
    """Request line and header fields together; and what comes after a body, or between two pieces of it."""
    header_seconds: float = 10.0
    """From a request's first byte (or the connection's start) to the end of its header."""
    body_seconds: float = 30.0
    """From the end of the header to the end of the body."""
    idle_seconds: float = 60.0
    """How long a connection may stay open between two requests."""
    connections: int = 8_192
    """Open connections of one worker."""
    held_bytes: int = 512 * 2**20
    """Bodies of one worker that have begun to arrive and are not answered, together; a request that brings more is
    refused with 503."""
    queue: int = 4_096
    """Requests of one worker that wait for a run; one more is refused with 503."""

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Limits:
        """The defaults with what `NORIA_LIMIT_*` variables say.

        Raises:
            SettingsError: a variable names no limit, or its value is no positive number.
        """
        known = {name: type(default) for name, default in asdict(cls()).items()}
        given: dict[str, float] = {}
        for variable, text in variables.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in known:
                raise SettingsError(f"There is no limit {variable}; known are {PREFIX}{', '.join(known).upper()}.")
            try:
                value = known[name](text)
            except ValueError:
                value = 0
            if not 0 < value < float("inf"):
                raise SettingsError(f"{variable} is '{text[:40]}'; it must be a number above 0.")
            given[name] = value
        return cls(**given)  # type: ignore[arg-type]


DEFAULTS = Limits()


def inflate(body: bytes, encoding: bytes | None, limits: Limits = DEFAULTS) -> bytes:
    """The body without its content encoding; memory stays below twice what is allowed, whatever was sent.

    A large body belongs in a thread: zlib lets the interpreter go, and 64 MiB take a quarter of a second.

    Raises:
        Refusal: 415 an encoding that is not known, 413 too large once inflated, 400 a broken stream.
    """
    if not encoding or (encoding := encoding.strip().lower()) == b"identity":
        return body
    window = ENCODINGS.get(encoding)
    if window is None:
        shown = encoding[:40].decode("latin-1")
        raise Refusal(415, f"The content encoding '{shown}' is not known here; send gzip, deflate or none.", ACCEPTED)
    most = min(limits.inflated_bytes, max(ALWAYS_BYTES, limits.ratio * len(body)))
    try:
        return _inflate(memoryview(body), window or _deflate_window(body), most)
    except zlib.error:
        raise Refusal(400, f"The body is not {encoding.decode()}, or is damaged.") from None


def _inflate(body: memoryview, window: int, most: int) -> bytes:
    # Slices, so that a stream is left soon after it passes the bound; BytesIO, which grows in place and gives its
    # buffer away, where joined pieces would be there twice.
    out, stream, members, full = BytesIO(), zlib.decompressobj(window), 1, False
    for start in range(0, len(body), SLICE_BYTES):
        rest: bytes | memoryview = body[start : start + SLICE_BYTES]
        while rest or (full and not stream.eof):  # zlib may hold the end of a repetition, with nothing left to read
            if stream.eof:
                members += 1
                if window != ENCODINGS[b"gzip"] or members > MOST_MEMBERS:
                    raise Refusal(400, "The compressed body goes on after its end.")
                stream = zlib.decompressobj(window)
            asked = min(PIECE_BYTES, most - out.tell() + 1)
            full = out.write(stream.decompress(rest, asked)) == asked
            if out.tell() > most:
                raise Refusal(413, f"The body inflates to more than {most:,} bytes; send less in one request.")
            rest = stream.unused_data or stream.unconsumed_tail
    if not stream.eof:
        raise Refusal(400, "The compressed body ends before its end.")
    return out.getvalue()


def _deflate_window(body: bytes) -> int:
    """zlib's header is a byte whose low half is 8 and a pair divisible by 31; a raw stream never starts so: it would be
    a stored block with padding that is not zero."""
    zlib_header = len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS


SIBLING_OBJECTS, SIBLING_ARRAYS = (b"},{", b"}, {"), (b"],[", b"], [")
SCAN_BYTES = 64 * 1024
STEPS = np.zeros(256, np.int32)
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1


def check_depth(body: bytes, most: int = JSON_DEPTH) -> None:
    """Refuse JSON that is nested deeper than `most`, before anything parses it. Raises Refusal 400.

    Counting comes first, because it costs a third of a microsecond: there are no more levels than opening brackets, and
    none of a close directly before an open (`},{` between records), wherever strings begin and end.
    """
    arrays, objects = body.count(b"["), body.count(b"{")
    bound = arrays + objects
    if bound <= most:
        return
    for siblings in SIBLING_OBJECTS if objects > arrays else SIBLING_ARRAYS:
        bound -= body.count(siblings)
        if bound <= most:
            return
    if _depth(body, most) > most:
        raise Refusal(400, f"The JSON is nested deeper than {most} levels.")


def check_values(body: bytes) -> None:
    """Refuse JSON of very many values, before anything parses it. Raises Refusal 413.

    A smaller body than the limit cannot have so many, and is not looked at. Text may have as many brackets and commas
    as it likes.
    """
    if len(body) <= JSON_LISTS:
        return
    if body.count(b"[") + body.count(b"{") > JSON_LISTS and _outside_strings(body, b"[{") > JSON_LISTS:
        raise Refusal(413, f"The JSON has more than {JSON_LISTS:,} lists and objects; send fewer, or flat data.")
    if len(body) > JSON_VALUES and body.count(b",") > JSON_VALUES and _outside_strings(body, b",") > JSON_VALUES:
        raise Refusal(413, f"The JSON has more than {JSON_VALUES:,} values; send fewer in one request.")


def _outside_strings(body: bytes, kind: bytes) -> int:
    """How many bytes of this kind there are outside strings."""
    return sum(int(np.count_nonzero(outside & (part != ord('"')))) for part, outside in _marks(body, kind))


def _marks(body: bytes, kinds: bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The bytes of these kinds and the quotes, a piece at a time, and which are outside strings."""
    if b"\\" in body:
        # Escaped backslashes first: what is then left before a quote escapes it. (A regular expression would hold a
        # piece for each: 450 MB for a body of 8.)
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(body.translate(None, bytes(set(range(256)) - {ord('"'), *kinds})), np.uint8)
    quotes = 0
    for start in range(0, len(marks), SCAN_BYTES):
        part = marks[start : start + SCAN_BYTES]
        # An odd number of quotes before it: within a string.
        count = np.cumsum(part == ord('"'), dtype=np.int32) + quotes
        yield part, count % 2 == 0
        quotes = int(count[-1]) % 2


def _depth(body: bytes, enough: int) -> int:
    """How deep the brackets outside strings go; stops above `enough`."""
    level, deepest = 0, 0
    for part, outside in _marks(body, b"[]{}"):
        levels = np.cumsum(np.where(outside, STEPS[part], 0), dtype=np.int32) + level
        deepest = max(deepest, int(levels.max()))
        if deepest > enough:
            break
        level = int(levels[-1])
    return deepest
