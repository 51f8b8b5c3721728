"""Rate limits: what one key may ask, what the refusal tells, and that memory is bounded."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.access import ANYBODY, Principal
from serving.buckets import Buckets, source_of
from serving.rates import Rates
from serving.wire import Refusal


def key(rate=None, name="shop"):
    return Principal(name, frozenset({"predict"}), rate)


def passes(rates, principal, now, client=""):
    try:
        rates.take(principal, now, client)
    except Refusal as refusal:
        assert refusal.status == 429
        return False
    return True


@given(
    rate=st.floats(0.1, 1000),
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=200),
    workers=st.integers(1, 8),
)
def test_never_more_than_the_rate_and_a_second_of_it_and_never_less(rate, gaps, workers):
    rates, now, times = Rates(rate, workers), 100.0, []
    share = rate / workers
    for gap in gaps:
        now += gap
        if passes(rates, key(), now):
            times.append(now)
        else:
            # Refused: the second before it was used up.
            assert sum(now - 1 - 1 / share < time for time in times) >= max(1, int(share))
    for first in range(0, len(times), 7):
        for last in range(first, len(times), 5):
            most = share * (times[last] - times[first]) + max(1.0, share) + 1e-3
            assert last - first + 1 <= most + 1e-6


def test_the_wait_that_is_told_is_enough_and_no_more():
    buckets = Buckets()
    assert [buckets.take("a", 4, 0.0) for _ in range(4)] == [0, 0, 0, 0]
    wait = buckets.take("a", 4, 0.0)
    assert wait == pytest.approx(0.25)
    assert buckets.take("a", 4, wait - 0.01) > 0
    assert buckets.take("a", 4, wait) == 0


def test_time_without_requests_saves_up_no_more_than_a_second():
    rates = Rates(3)
    assert passes(rates, key(), 0.0)
    assert [passes(rates, key(), 1000.0) for _ in range(4)] == [True, True, True, False]


def test_a_keys_own_rate_wins_and_keys_do_not_share():
    rates = Rates(1)
    assert [passes(rates, key(3), 0.0) for _ in range(4)] == [True, True, True, False]
    assert [passes(rates, key(name="other"), 0.0) for _ in range(2)] == [True, False]
    assert passes(Rates(0), key(), 0.0)
    assert passes(Rates(0), ANYBODY, 0.0, "10.0.0.1")


def test_each_worker_gives_its_share():
    rates = Rates(100, workers=4)
    assert sum(passes(rates, key(), 0.0) for _ in range(100)) == 25


@pytest.mark.parametrize(("rate", "workers", "quota", "window"), [(20, 4, 5, 1), (1, 8, 1, 8), (20, 1, 20, 1)])
def test_a_client_on_one_connection_is_told_what_it_gets(rate, workers, quota, window):
    rates = Rates(rate, workers)
    with pytest.raises(Refusal) as caught:
        for _ in range(quota + 1):
            rates.take(key(), 0.0)
    headers = dict(caught.value.headers)
    assert headers[b"ratelimit-policy"] == f'"key";q={quota};w={window}'.encode()
    share = f"and {quota / window:g} times over one connection;"
    assert f"may ask {rate} times a second" in caught.value.message
    assert (share in caught.value.message) is (workers > 1)
    for step in range(3 * quota + 1):  # who keeps to the headers is never refused again
        assert passes(rates, key(), 100.0 + step * window / quota)


def test_slow_rates_let_one_through_at_a_time():
    rates = Rates(0.1)
    assert [passes(rates, key(), now) for now in (0.0, 1.0, 9.9, 10.0, 10.1)] == [True, False, False, True, False]


@pytest.mark.parametrize(("rate", "quota", "window"), [(5.0, 5, 1), (0.1, 1, 10), (2.5, 2, 1)])
def test_a_refusal_tells_when_to_come_again(rate, quota, window):
    rates = Rates(rate)
    with pytest.raises(Refusal) as caught:
        for _ in range(9):
            rates.take(key(), 0.0)
    headers = {name.decode(): value.decode() for name, value in caught.value.headers}
    assert headers["ratelimit-policy"] == f'"key";q={quota};w={window}'
    seconds = int(headers["retry-after"])
    assert headers["ratelimit"] == f'"key";r=0;t={seconds}'
    assert (headers["ratelimit-limit"], headers["ratelimit-remaining"]) == (str(quota), "0")
    assert headers["ratelimit-reset"] == str(seconds)
    rates.take(key(), float(seconds))
    assert re.search("The key 'shop' may ask .* times a second", str(caught.value))


def test_memory_is_bounded_and_forgetting_gives_nothing_away():
    rates = Rates(0.001, most=100)
    assert passes(rates, ANYBODY, 0.0, "10.9.9.9")
    for number in range(5000):
        passes(rates, ANYBODY, 1.0 + number / 1000, f"10.0.{number >> 8}.{number & 255}")
    assert len(rates.addresses) <= 101
    assert not passes(rates, ANYBODY, 6.5, "10.9.9.9")
    # All of them are full again after their time, and newcomers get buckets of their own.
    assert passes(rates, ANYBODY, 9000.0, "10.1.1.1")
    assert passes(rates, ANYBODY, 9000.0, "10.1.1.2")
    assert len(rates.addresses) == 2


def test_a_flood_of_names_does_not_look_through_all_of_them_each_time():
    buckets, scans = Buckets(most=100), []
    forget = buckets._forget
    buckets._forget = lambda now: scans.append(now >= buckets._forget_at) or forget(now)
    for number in range(2000):
        buckets.take(str(number), 0.001, 5.0)
    assert sum(scans) == 1


@pytest.mark.parametrize(
    ("client", "source"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "unknown"),
        ("a:b", "unknown"),
    ],
)
def test_an_ipv6_site_is_one_client(client, source):
    assert source_of(client) == source
