"""Prediction ids: unique, sorted by time, and nobody else can make one."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from serving.ids import MOST_ROWS, Ids, expand, read_key

KEY = b"k" * 32


def test_ids_are_unique_and_sort_by_time():
    ids = Ids(KEY, 1)
    names = [name for _ in range(5000) for name in expand(ids.base("trips", 3), 3)]
    assert len(set(names)) == 15_000
    assert names == sorted(names)
    assert all(ids.genuine(name, "trips") for name in names)


def test_a_clock_that_stands_still_or_goes_back_repeats_nothing():
    times = iter([10.0] * 9000 + [5.0] * 9000)
    ids = Ids(KEY, 1, lambda: next(times))
    assert len({ids.base("trips", 1) for _ in range(18_000)}) == 18_000


def test_two_workers_never_make_the_same():
    one, two = (Ids(KEY, worker, lambda: 7.0) for worker in (1, 2))
    assert not {one.base("trips", 1) for _ in range(500)} & {two.base("trips", 1) for _ in range(500)}


def test_only_ids_that_were_given_are_genuine():
    ids = Ids(KEY, 1)
    (name,) = expand(ids.base("trips", 1), 1)
    assert ids.genuine(name, "trips")
    assert not ids.genuine(name, "buses")
    assert not Ids(b"x" * 32, 1).genuine(name, "trips")
    assert not ids.genuine(name.upper(), "trips") or name == name.upper()
    second = f"{name[:21]}0001{name[25:]}"
    assert not ids.genuine(second, "trips")  # the batch had one row
    arabic = "".join(chr(0x0660 + int(digit)) if digit.isdigit() else digit for digit in name)
    assert int(arabic, 16) == int(name, 16)
    for wrong in ("", "0" * 32, "no", name[:-1], name + "0", "z" * 32, "+" + name[1:], "ü" * 32, arabic):
        assert not ids.genuine(wrong, "trips")


@given(st.integers(0, 31), st.sampled_from("0123456789abcdef"))
def test_a_changed_digit_is_noticed(place, digit):
    ids = Ids(KEY, 1, lambda: 1_600_000_000.0)
    (name,) = expand(ids.base("trips", 1), 1)
    changed = name[:place] + digit + name[place + 1 :]
    assert ids.genuine(changed, "trips") == (changed == name)


def test_the_largest_batch():
    names = expand(Ids(KEY, 1).base("trips", MOST_ROWS), MOST_ROWS)
    assert len(set(names)) == MOST_ROWS
    assert list(names) == [names[row] for row in range(MOST_ROWS)]
    assert [*names[1022:1024], *names[1024:1027:2]] == [names[row] for row in (1022, 1023, 1024, 1026)]
    assert list(names[:9:4]) == [names[0], names[4], names[8]]
    assert Ids(KEY, 9).genuine(names[-1], "trips")


def test_the_key_is_made_once_and_is_its_owners(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: read_key(tmp_path / "home"), range(8)))
    assert len(keys) == 1
    assert stat.S_IMODE((tmp_path / "home" / "id.key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["id.key"]
