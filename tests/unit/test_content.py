"""A version registered anew under the number of another one: the content tells, not the number."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from registry.bundle import write
from registry.manifest import digest_of
from serving import state
from serving.engine import Engine
from serving.fleet import Fleet
from serving.rollout import Rollout
from serving.state import Desired, State
from serving.supervise import Plan, listen


@pytest.fixture
def bundle(tmp_path, make_contents):
    """Writes a bundle of that note to one and the same folder; what is desired then."""
    folder = tmp_path / "bundles" / "trips" / "1"

    def made(note, asked):
        contents = make_contents()
        write(folder, replace(contents, facts=replace(contents.facts, notes=note)))
        return Desired("trips", 1, str(folder), asked, content=digest_of(folder))

    return made


def test_a_replica_loads_another_content_under_the_same_number(bundle):
    engine, loaded = Engine("cpu"), []
    for note, asked in (("one", "a"), ("one", "b"), ("two", "c")):
        desired = bundle(note, asked)
        assert engine.take(desired).asked == desired.asked
        engine.known["trips"] = desired
        loaded.append(engine.models["trips"])
    assert loaded[0] is loaded[1]
    assert loaded[2].bundle.facts.notes == "two"


def test_workers_load_another_content_under_the_same_number(bundle, tmp_path):
    folder = tmp_path / "serving"

    def serve(desired):
        state.write(folder / "desired", desired)
        end = time.monotonic() + 60
        while (reached := state.read(folder / "state", State).get("trips")) is None or reached.asked != desired.asked:
            assert time.monotonic() < end
            time.sleep(fleet.step())
        return fleet.current.number

    first = bundle("one", "a")
    state.write(folder / "desired", first)
    fleet = Fleet(Plan(listen("127.0.0.1", 0), folder, "cpu"))
    try:
        number = serve(first)
        assert serve(replace(first, asked="b")) == number, "it serves already"
        assert serve(bundle("two", "c")) > number
    finally:
        fleet.stop()


def test_a_look_at_the_rollout_reads_the_same_however_many_workloads_there_are(tmp_path, monkeypatch):
    (tmp_path / "lake").mkdir()
    rollout = Rollout("http://127.0.0.1:1", str(tmp_path), str(tmp_path / "lake"), poll_seconds=3600, load_seconds=60)
    reads, real, here = [], state.read, threading.current_thread()

    def read(folder, kind):
        if threading.current_thread() is here:
            reads.append(folder)
        return real(folder, kind)

    monkeypatch.setattr(state, "read", read)
    counts = []
    for count in (1, 10):
        wanted = [Desired(f"w{number}", 1, str(tmp_path), f"a{number}") for number in range(count)]
        for desired in wanted:
            state.write(rollout.folder / "desired", desired)
        said = tuple(State(one.workload, 1, "serving", "", "", one.asked) for one in wanted)
        reads.clear()
        found = asyncio.run(rollout.look("replica", said))
        assert [order.proven for order in found.orders] == [True] * count
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0
