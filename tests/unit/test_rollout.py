"""The rollout as replicas ask it, over the files that the reconciler writes. Its MLflow does not answer."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from serving import rollout as module
from serving import state
from serving.rollout import SILENT_SECONDS, Rollout
from serving.state import Desired, State

AWAY = "http://127.0.0.1:9"
"""Nothing listens there."""


@pytest.fixture
def clock(clock_of):
    return clock_of(module)


@pytest.fixture
def rollout(tmp_path, clock):
    """One that has polled; version 1 answers, and the alias names version 2 by now."""
    state.write(tmp_path / "rollout" / "desired", desired(1))
    made = started(tmp_path)
    assert orders(made, "first") == [1]
    hear(made, "first", 1, "serving")
    state.write(made.folder / "desired", desired(2, 1))
    return made


def started(home, lake=None, load_seconds=60.0):
    made = Rollout(AWAY, str(home), lake or str(home / "lake"), poll_seconds=3600, load_seconds=load_seconds)
    made.polled = True
    return made


def desired(version, before=None):
    return Desired("trips", version, f"bundles/trips/{version}", f"asked-{version}", before, f"bundles/trips/{before}")


def orders(made, replica, *said):
    """The versions that a replica is told to serve."""
    return [order.desired.version for order in asyncio.run(made.look(replica, said)).orders]


def hear(made, replica, version, status, reason=""):
    return orders(made, replica, State("trips", version, status, reason, state.now(), f"asked-{version}"))


def refused(made):
    return {one.version: one.reason for one in state.read(made.folder / "failed", State).values()}


def test_a_version_is_refused_when_the_second_replica_that_tries_it_falls_silent(rollout, clock):
    assert orders(rollout, "one") == [2]
    assert orders(rollout, "two") == [1]  # while the first one tries
    clock.seconds += SILENT_SECONDS
    assert orders(rollout, "two") == [2]  # it may have been bad luck
    assert orders(rollout, "three") == [1]
    assert not refused(rollout)
    clock.seconds += SILENT_SECONDS
    for name in ("three", "four", "one", "two"):
        assert orders(rollout, name) == [1]
    assert refused(rollout) == {2: "Two replicas ended or fell silent while they loaded version 2."}


def test_a_replica_that_was_told_to_end_says_nothing_about_the_version_that_it_tries(rollout):
    for name in ("one", "two", "three"):
        assert orders(rollout, name) == [2]
        asyncio.run(rollout.leave(name))
    assert orders(rollout, "four") == [2]
    assert not refused(rollout)
    assert hear(rollout, "four", 2, "serving") == [2]
    assert orders(rollout, "five") == [2]


def test_what_all_serve_is_no_new_version_when_it_is_asked_for_once_more(rollout):
    """As when version 1 was gone back to, and 3 is refused: version 1 is asked for, with 2 to fall back to."""
    assert hear(rollout, "one", 2, "serving") == orders(rollout, "two") == [2]
    back = replace(desired(1, 2), content="of 1")
    state.write(rollout.folder / "desired", back)
    assert hear(rollout, "one", 1, "serving") == orders(rollout, "two") == [1]
    state.write(rollout.folder / "desired", desired(3, 1))
    assert orders(rollout, "one") == [3]
    assert hear(rollout, "one", 3, "failed", "Its scores are off.") == orders(rollout, "two") == [1]
    state.write(rollout.folder / "desired", replace(back, asked="once more"))
    assert (orders(rollout, "one"), orders(rollout, "two")) == ([1], [1])
    state.write(rollout.folder / "desired", replace(back, asked="registered anew", content="another"))
    assert (orders(rollout, "one"), orders(rollout, "two")) == ([1], [2])


def test_looks_read_nothing_while_nothing_changes(rollout, monkeypatch):
    assert orders(rollout, "one") == [2]
    reads, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), read(path))[1])
    for _ in range(3):
        assert (orders(rollout, "one"), orders(rollout, "two")) == ([2], [1])
    assert hear(rollout, "one", 2, "serving") == orders(rollout, "two") == [2]
    assert not reads
    state.write(rollout.folder / "desired", desired(3, 2))
    assert (orders(rollout, "one"), orders(rollout, "two")) == ([3], [2])
    assert reads


def test_what_was_refused_stays_so_when_the_rollout_starts_anew(rollout, tmp_path):
    assert orders(rollout, "one") == [2]
    assert hear(rollout, "one", 2, "failed", "Its scores are off.") == [1]
    again = started(tmp_path)
    assert orders(again, "one") == orders(again, "two") == [1]
    assert refused(again) == {2: "Its scores are off."}


def test_replicas_wait_for_the_aliases_only_where_nothing_is_known_yet(tmp_path):
    empty, restored = tmp_path / "empty", tmp_path / "restored"
    state.write(restored / "rollout" / "desired", desired(1))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an MLflow that takes its time
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for home, waits in ((empty, True), (restored, False)):
            made = Rollout(address, str(home), str(home / "lake"), poll_seconds=3600, load_seconds=60)
            assert asyncio.run(made.look("one", ())).wait == waits
