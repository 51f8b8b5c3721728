"""Bodies before they are decoded: compression, bombs, nesting; and which hosts are ours."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from contextlib import suppress

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from noria.errors import SettingsError
from serving.hosts import allowed_hosts, check_host, host_allowed
from serving.limits import DEFAULTS, JSON_LISTS, JSON_VALUES, Limits, check_depth, check_values, inflate
from serving.messages import MESSAGES, MOST_FIELDS, bounded
from serving.wire import Refusal

MIB = 2**20


def raw(body):
    return zlib.compress(body, wbits=-15)


WAYS = {b"gzip": gzip.compress, b"x-gzip": gzip.compress, b"GZip ": gzip.compress, b"deflate": zlib.compress}


def status(call, *given):
    with pytest.raises(Refusal) as caught:
        call(*given)
    return caught.value.status


def peak(call):
    """What a call returned, the most bytes that it held, and the seconds of processor that it took."""
    tracemalloc.start()
    began = time.process_time()
    try:
        found = call()
        return found, tracemalloc.get_traced_memory()[1], time.process_time() - began
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200_000), st.sampled_from(sorted(WAYS)))
def test_every_encoding_comes_back(body, encoding):
    assert inflate(WAYS[encoding](body), encoding) == body
    assert inflate(raw(body), b"deflate") == body
    assert inflate(body, None) == inflate(body, b"") == inflate(body, b" Identity ") == body


@given(st.lists(st.binary(max_size=50_000), min_size=1, max_size=5))
def test_members_of_one_gzip_body_are_joined(parts):
    assert inflate(b"".join(map(gzip.compress, parts)), b"gzip") == b"".join(parts)


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, gzip", b"compress", b"\xff", b"x" * 9999])
def test_an_unknown_encoding_is_415_and_says_which_are_known(encoding):
    with pytest.raises(Refusal) as caught:
        inflate(b"{}", encoding)
    assert caught.value.status == 415
    assert dict(caught.value.headers)[b"accept-encoding"] == b"gzip, deflate, identity"
    assert len(str(caught.value)) < 200


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_a_broken_stream_is_400_and_never_another_body(body, data):
    whole = gzip.compress(body)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert status(inflate, whole[:cut], b"gzip") == 400
    assert status(inflate, whole + b"rest", b"gzip") == 400
    at = data.draw(st.integers(10, len(whole) - 1))
    try:
        # Some bits of a deflate stream mean nothing; the checksum holds then.
        assert inflate(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], b"gzip") == body
    except Refusal as refusal:
        assert refusal.status == 400


@given(st.binary(max_size=5000), st.sampled_from([b"gzip", b"deflate"]))
def test_any_bytes_are_refused_or_inflate(body, encoding):
    try:
        assert isinstance(inflate(body, encoding), bytes)
    except Refusal as refusal:
        assert refusal.status in (400, 413)


def test_zlib_streams_may_not_follow_each_other():
    assert status(inflate, zlib.compress(b"a") + zlib.compress(b"b"), b"deflate") == 400


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, MIB - 1, MIB])
def test_the_bound_is_exact(size):
    limits = Limits(inflated_bytes=MIB)
    body = b"x" * size
    assert inflate(gzip.compress(body), b"gzip", limits) == body
    assert status(inflate, gzip.compress(b"x" * (MIB + 1)), b"gzip", limits) == 413


def test_the_bound_holds_over_all_members():
    members = gzip.compress(b"x" * (MIB // 2)) * 2
    assert len(inflate(members, b"gzip", Limits(inflated_bytes=MIB))) == MIB
    assert status(inflate, members + gzip.compress(b"x"), b"gzip", Limits(inflated_bytes=MIB)) == 413


def test_a_ratio_above_the_limit_is_refused_once_it_is_worth_it():
    zeros = gzip.compress(bytes(8 * MIB))
    assert status(inflate, zeros, b"gzip") == 413
    assert len(inflate(zeros, b"gzip", Limits(ratio=1100))) == 8 * MIB
    assert len(inflate(gzip.compress(bytes(MIB)), b"gzip")) == MIB


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_a_bomb_costs_little_more_than_the_bound_and_less_than_a_second(encoding):
    # 10 MB that hold 10 GB: the same stretch of zeros again and again within one stream.
    maker = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == b"gzip" else 15)
    head = maker.compress(bytes(32 * MIB)) + maker.flush(zlib.Z_FULL_FLUSH)
    more = maker.compress(bytes(32 * MIB)) + maker.flush(zlib.Z_FULL_FLUSH)
    body = head + more * (10 * 10**6 // len(more))
    assert len(body) // len(more) * 32 * MIB > 9 * 10**9 and len(body) <= DEFAULTS.body_bytes
    found, held, seconds = peak(lambda: status(inflate, body, encoding))
    assert found == 413
    assert held < 1.25 * DEFAULTS.inflated_bytes
    assert seconds < 1


@pytest.mark.parametrize("rest", [0, 1, 2, 17, 258, 259])
def test_a_stream_may_end_wherever_a_piece_ends(monkeypatch, rest):
    """zlib holds the rest of a repetition back when a piece is full; all that it was given is read by then."""
    monkeypatch.setattr("serving.limits.PIECE_BYTES", 512)
    for pieces in range(1, 40):
        body = bytes(512 * pieces + rest)
        for compress in (raw, zlib.compress, gzip.compress):
            encoding = b"gzip" if compress is gzip.compress else b"deflate"
            assert inflate(compress(body), encoding, Limits(ratio=1100)) == body


def test_no_piece_is_larger_than_what_is_allowed():
    body = zlib.compress(bytes(16 * MIB))
    found, held, _ = peak(lambda: status(inflate, body, b"deflate", Limits(inflated_bytes=MIB)))
    assert found == 413
    assert held < 4 * MIB


def test_what_is_just_allowed_costs_less_than_twice_its_size():
    body = gzip.compress(bytes(64 * MIB), 1)
    found, held, _ = peak(lambda: inflate(body, b"gzip", Limits(ratio=1100)))
    assert len(found) == 64 * MIB
    assert held < 2 * 64 * MIB


def test_half_a_million_empty_members_are_left_soon():
    found, _, seconds = peak(lambda: status(inflate, gzip.compress(b"") * 500_000, b"gzip"))
    assert found == 400
    assert seconds < 0.5


def depth_of(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (1 if isinstance(value, dict | list) else 0) + max(map(depth_of, inner), default=0)


NASTY = st.text(st.sampled_from(list('[]{}",\\ },{],[a\n')), max_size=20)
JSON = st.recursive(
    st.none() | st.integers(0, 9) | NASTY,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(NASTY, inner, max_size=5),
    max_leaves=40,
)


@given(JSON, st.integers(1, 8), st.sampled_from([None, 1]))
def test_exactly_what_is_nested_too_deep_is_refused(value, most, indent):
    for body in (orjson.dumps(value), json.dumps(value).encode(), json.dumps(value, indent=indent).encode()):
        if depth_of(value) > most:
            assert status(check_depth, body, most) == 400
        else:
            check_depth(body, most)


@pytest.mark.parametrize(
    "opens", [b"[", b'{"a":', b'["]]]]",', b'["},{},{",', b'["\\"]",', b'["\\\\",', b"[[],[],", b"[{},{},"]
)
def test_hiding_the_nesting_does_not_help(opens):
    check_depth(b"[" + opens * 60)
    assert status(check_depth, opens * 70) == 400
    assert status(check_depth, b"[1]," * 70_000 + opens * 70) == 400
    assert status(check_depth, opens * 40 + b'[1],"]",' * 50_000 + opens * 40) == 400


def test_what_is_closed_in_the_end_is_nested_all_the_same():
    assert status(check_depth, b'{"a":' * 70 + b"1" + b"}" * 70) == 400
    assert status(check_depth, b"[" * 70 + b"]" * 70) == 400
    check_depth(b'{"a":' * 64 + b"1" + b"}" * 64)


@example("[" * 65)
@given(st.text(st.sampled_from(list('[]{}",:\\a1 \x00é')), max_size=300))
def test_any_bytes_have_a_depth_and_json_that_passes_is_not_deeper(text):
    try:
        check_depth(text.encode(), 3)
    except Refusal as refusal:
        assert refusal.status == 400
        return
    with suppress(orjson.JSONDecodeError):
        assert depth_of(orjson.loads(text)) <= 3


@pytest.mark.parametrize(
    "body", [b"[]" * 5 * MIB, b"[" * 10 * MIB, b'"' * 10 * MIB, b'["\\\\",' * MIB, b'"[\\"' * 2 * MIB]
)
def test_a_large_body_of_nothing_but_brackets_is_looked_through_quickly(body):
    def look():
        with suppress(Refusal):
            check_depth(body)

    _, held, seconds = peak(look)
    assert held < 3 * len(body) + MIB
    assert seconds < 2


@pytest.mark.parametrize(("piece", "most"), [(b"[],", JSON_LISTS), (b"{},", JSON_LISTS), (b"0,", JSON_VALUES)])
def test_very_many_values_are_refused_and_one_less_is_not(piece, most):
    body = b"[" + piece * most
    assert status(check_values, body + piece) == 413
    check_values(body[len(piece) :])


def test_text_may_have_as_many_brackets_and_commas_as_it_likes():
    text = orjson.dumps([json.dumps(["a,b", {"c": "\\"}])] * 10 + ['[{,"' * 3 * MIB])
    assert len(text) > JSON_VALUES
    check_values(text)
    assert status(check_values, text[:-1] + b",[]" * JSON_LISTS + b"]") == 413


def test_flat_records_are_only_counted(monkeypatch):
    monkeypatch.setattr("serving.limits._depth", None)
    records = [{"a": 1, "b": "},{", "c": None}] * 1000
    check_depth(orjson.dumps({"records": records}))
    check_depth(json.dumps({"records": records}).encode())
    check_depth(orjson.dumps({"inputs": [{"name": "x", "data": [[1.5, 2.5]] * 1000}]}))


def test_a_small_body_is_looked_through_in_a_microsecond():
    body = orjson.dumps({"inputs": [{"name": "x", "shape": [1, 20], "datatype": "FP32", "data": [0.123456] * 26}]})
    assert 290 < len(body) < 310

    def seconds(count=5000):
        began = time.perf_counter()
        for _ in range(count):
            check_depth(body)
        return (time.perf_counter() - began) / count

    # A third of a microsecond where nothing else runs.
    assert min(seconds() for _ in range(5)) < 5e-6


def test_limits_come_from_variables():
    assert Limits.of({}) == DEFAULTS == Limits.of({"NORIA_HOME": "x"})
    found = Limits.of({"NORIA_LIMIT_BODY_BYTES": "1024", "NORIA_LIMIT_HEADER_SECONDS": "0.5"})
    assert (found.body_bytes, found.header_seconds, found.queue) == (1024, 0.5, DEFAULTS.queue)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("BODY", "1", "no limit NORIA_LIMIT_BODY;.*BODY_BYTES"),
        ("QUEUE", "many", "NORIA_LIMIT_QUEUE is 'many'"),
        ("QUEUE", "0", "above 0"),
        ("QUEUE", "1.5", "above 0"),
        ("BODY_SECONDS", "-1", "above 0"),
        ("BODY_SECONDS", "inf", "above 0"),
        ("BODY_SECONDS", "nan", "above 0"),
    ],
)
def test_a_wrong_limit_is_said(name, value, sentence):
    with pytest.raises(SettingsError, match=sentence):
        Limits.of({f"NORIA_LIMIT_{name}": value})


LOCAL = allowed_hosts("127.0.0.1")
NAMED = allowed_hosts("10.1.2.3", ["Noria.Example.org", " other.example.org. ", ""])
EVERYWHERE = allowed_hosts("0.0.0.0", ["noria.example.org"])
PORTS = allowed_hosts("127.0.0.1", ["models.example.com:8443", "10.0.0.7:80", "[2001:db8::1]:443", "2001:db8::2"])
HOSTS = [
    (LOCAL, "localhost", True), (LOCAL, "LocalHost:8080", True), (LOCAL, "127.0.0.1:1", True), (LOCAL, "[::1]", True),
    (LOCAL, "[::1]:8080", True), (LOCAL, "localhost.", True), (LOCAL, " localhost ", True),
    (LOCAL, "evil.example.org", False), (LOCAL, "localhost.evil.example.org", False), (LOCAL, "evil.localhost", False),
    (LOCAL, "127.0.0.1.evil.example.org", False), (LOCAL, "10.0.0.1", False), (LOCAL, "", False), (LOCAL, ":80", False),
    (LOCAL, "localhost:80:80", False), (LOCAL, "localhost:x", False), (LOCAL, "user@localhost", False),
    (LOCAL, "[::1", False), (LOCAL, "[::1]x", False), (LOCAL, "::1", False), (LOCAL, "localhost,evil", False),
    (LOCAL, "localhost\x00", False), (LOCAL, "any address", False), (LOCAL, "*", False), (LOCAL, "[localhost]", True),
    (NAMED, "noria.example.org:443", True), (NAMED, "OTHER.example.ORG", True), (NAMED, "10.1.2.3:80", True),
    (NAMED, "10.1.2.4", False), (NAMED, "example.org", False), (NAMED, "", False),
    (EVERYWHERE, "10.9.9.9:8080", True), (EVERYWHERE, "[2001:db8::1]:80", True), (EVERYWHERE, "0.0.0.0", True),
    (EVERYWHERE, "evil.example.org", False), (EVERYWHERE, "1.2.3.4.evil", False), (EVERYWHERE, "", False),
    (allowed_hosts("127.0.0.1", ["*"]), "anything.example.org", True),
    (PORTS, "models.example.com", True), (PORTS, "models.example.com:8443", True), (PORTS, "[2001:db8::1]", True),
    (PORTS, "10.0.0.7", True), (PORTS, "8443", False), (PORTS, "[2001:db8::2]:443", True),
    (allowed_hosts("::1"), "[::1]:80", True), (allowed_hosts("[::]"), "10.9.9.9", True),
]  # fmt: skip


@pytest.mark.parametrize(("allowed", "host", "expected"), HOSTS, ids=[repr(host) for _, host, _ in HOSTS])
def test_which_hosts_are_ours(allowed, host, expected):
    assert host_allowed(host.encode(), allowed) is expected


@pytest.mark.parametrize("name", ["https://models.example.com", "models.example.com/", "*.example.com", "a b", "a:x"])
def test_what_is_no_host_is_said_at_the_start(name):
    with pytest.raises(SettingsError, match="in NORIA_HOSTS is no host; give names"):
        allowed_hosts("127.0.0.1", ["models.example.com", name])


@given(st.binary(max_size=60))
def test_any_bytes_are_a_host_or_not(header):
    assert host_allowed(header, LOCAL) in (True, False)
    if host_allowed(header, LOCAL):
        name = header.decode().strip().lower()
        assert any(name.lstrip("[").startswith(one) for one in ("localhost", "127.0.0.1", "::1"))


def test_a_foreign_host_is_421_and_none_is_400():
    check_host(b"localhost:8080", LOCAL)
    with pytest.raises(Refusal, match=r"'evil\.example\.org'; add it to NORIA_HOSTS") as caught:
        check_host(b"evil.example.org", LOCAL)
    assert caught.value.status == 421
    assert status(check_host, None, LOCAL) == 400
    assert status(check_host, b"\xff" * 9999, LOCAL) == 421


def a_tensor(name):
    values = {"int64_contents": range(-50, 50), "fp64_contents": [0.5] * 50, "bytes_contents": [b"\xff"] * 50}
    return {"name": name, "datatype": "INT64", "shape": [100], "contents": values}


def test_honest_messages_pass_whatever_their_size():
    request = MESSAGES["ModelInferRequest"]
    tensors = [a_tensor(f"x{number}") for number in range(MOST_FIELDS // 8)]
    for message in (request(inputs=tensors), request(inputs=tensors[:1], raw_input_contents=[bytes(2**20)] * 3)):
        body = message.SerializeToString()
        assert len(body) > 2 * MOST_FIELDS
        assert bounded(body) is body
    assert bounded(b"") == b""


@pytest.mark.parametrize("field", [1, 4, 5, 6, 7, 15])
def test_a_message_of_very_many_fields_is_refused_before_it_is_read(field):
    empty = bytes([field << 3 | 2, 0])
    request = MESSAGES["ModelInferRequest"]
    within = request(raw_input_contents=[empty * MOST_FIELDS]).SerializeToString()
    assert bounded(within) is within
    tensor, output = within.replace(b"\x3a", b"\x2a", 1), within.replace(b"\x3a", b"\x32", 1)
    for body in (empty * (MOST_FIELDS + 1), tensor, output, b"\x08\xff\xff\x03" + tensor):
        assert status(bounded, body) == 413


@given(st.binary(max_size=40), st.sampled_from([0, 3 * MOST_FIELDS]))
def test_whatever_is_no_message_is_left_to_the_parser(start, more):
    for body in (start + b"\xff" * more, start + bytes([0x0B, 0xFD]) * (more // 2)):
        with suppress(Refusal):
            assert bounded(body) is body
