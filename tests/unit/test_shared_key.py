"""The ids' key of a cluster whose lake has an address."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from noria.lake import Lake
from serving.ids import Ids, read_key
from serving.rollout import Rollout
from serving.shared_key import EVER, KEY, PLACE, shared_key


def key_of(home, lake):
    """The key that a new replica gets from a rollout whose node has that home."""
    made = Rollout("http://127.0.0.1:9", str(home), lake, poll_seconds=3600, load_seconds=60)
    return asyncio.run(made.join())[0]


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_rollout_on_another_node_gives_the_key_that_replicas_have(tmp_path, address):
    lake = address.format(tmp_path / "lake")
    one, two = (key_of(tmp_path / node, lake) for node in ("first", "second"))
    name = f"{Ids(one, 1).base('trips', 1):032x}"
    assert Ids(two, 2).genuine(name, "trips")


def test_two_who_make_it_at_once_agree(tmp_path):
    lake = f"file://{tmp_path / 'lake'}"
    with ThreadPoolExecutor(6) as threads:
        keys = set(threads.map(lambda node: shared_key(lake, tmp_path / str(node)), range(6)))
    assert len(keys) == len(Lake(lake, PLACE, KEY).records(EVER)) == 1


def test_what_the_first_node_had_goes_on(tmp_path):
    before = read_key(tmp_path / "first" / "rollout")
    lake = f"file://{tmp_path / 'lake'}"
    assert [key_of(tmp_path / node, lake) for node in ("first", "second")] == [before, before]
