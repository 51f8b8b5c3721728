"""The files of a server: generations, what came of them, orders, and bundles that nobody needs."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from noria.errors import ServiceError
from serving import generation, orders, repository, state
from serving.engine import Engine
from serving.generation import Generation
from serving.ledger import Ledger
from serving.repository import START_SECONDS, Repository
from serving.state import Desired, State
from serving.sweep import sweep


def test_a_generation_comes_back_as_it_was_written(tmp_path):
    made = Generation(7, {"a": Desired("a", 2, "/bundles/a/2", "x", fallback_version=1, fallback_folder="/b")}, ("c",))
    path = generation.write(tmp_path, made)
    assert generation.read(path) == made
    generation.write(tmp_path, Generation(8))
    assert generation.numbers(tmp_path) == [7, 8]
    generation.prune(tmp_path, {8})
    assert generation.numbers(tmp_path) == [8]
    path.write_text("[]")
    with pytest.raises(ServiceError, match="not readable as a generation"):
        generation.read(path)


def test_what_cannot_be_loaded_falls_back_or_is_missing():
    entry = Desired("a", 2, "/two", "x", fallback_version=1, fallback_folder="/one")
    first = Generation(1, {"a": entry, "b": Desired("b", 5, "/five")})
    second = first.without(2, "a")
    assert (second.entries["a"].version, second.entries["a"].folder, second.missing) == (1, "/one", ())
    third = second.without(3, "a")
    assert (set(third.entries), third.missing) == ({"b"}, ("a",))
    assert third.changed(4, "a", entry).missing == ()


def test_a_server_is_ready_when_nothing_that_should_serve_is_missing():
    engine = Engine("cpu", models={"b": object()}, known={"a": Desired("a", 2), "b": Desired("b", 1)})
    assert engine.ready, "a version that is asked for while this process answers does not take it out of service"
    engine.missing = ("a",)
    assert not engine.ready
    engine.known["a"] = Desired("a", None)
    assert engine.ready


def test_the_ledger_says_since_when_and_what_was_replaced(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.settled({"a": Desired("a", 1, "/one", "x")})
    first = state.read(tmp_path / "state", State)["a"]
    ledger.settled({"a": Desired("a", 1, "/one", "y")})
    assert state.read(tmp_path / "state", State)["a"] == State("a", 1, "serving", "", first.since, "y")
    ledger.failed(Desired("a", 2, "/two", "z"), Generation(1, {"a": Desired("a", 1)}), "It hangs.")
    ledger.settled({"a": Desired("a", 1, "/one", "back")})
    refused = state.read(tmp_path / "failed", State)["a"]
    assert (refused.version, refused.reason, refused.replaced) == (2, "It hangs.", 1)
    ledger.settled({"a": Desired("a", 3, "/three", "w")})
    assert state.read(tmp_path / "failed", State) == {}
    assert state.read(tmp_path / "state", State)["a"].replaced == 1
    assert state.swaps(tmp_path) == {"a": {"serving": 2, "failed": 1}}


def test_an_order_waits_for_its_outcome(tmp_path):
    key = orders.order(tmp_path, "model", load=True)
    assert [(one.key, one.name, one.load) for one in orders.waiting(tmp_path)] == [(key, "model", True)]
    threading.Timer(0.2, orders.answer, (tmp_path, key, "It does not load.")).start()
    assert asyncio.run(orders.wait(tmp_path, key, 10)) == orders.Outcome(False, "It does not load.")
    assert list((tmp_path / "orders").iterdir()) == []
    late = asyncio.run(orders.wait(tmp_path, orders.order(tmp_path, "model", load=False), 0.1))
    assert "did not act within 0.1 s" in late.reason


def test_orders_that_wait_leave_the_threads_to_others(tmp_path):
    """They have the log to hand over and the numbers to write; there are a few more of them than cores."""

    async def ask():
        keys = [orders.order(tmp_path, "model", load=True) for _ in range(64)]
        waiting = [asyncio.create_task(orders.wait(tmp_path, key, 60)) for key in keys]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 20)
        assert not any(one.done() for one in waiting)
        for key in keys:
            orders.answer(tmp_path, key)
        return await asyncio.gather(*waiting)

    assert set(asyncio.run(ask())) == {orders.Outcome(True)}
    assert list((tmp_path / "orders").iterdir()) == []


def test_an_order_leaves_nothing_behind_when_nobody_waits(tmp_path):
    async def cancelled():
        waiting = asyncio.create_task(orders.wait(tmp_path, orders.order(tmp_path, "model", load=True), 60))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(cancelled())
    assert list((tmp_path / "orders").iterdir()) == []
    for _ in range(2):  # by workers that were killed
        key = orders.order(tmp_path, "model", load=True)
        orders.answer(tmp_path, key)
    young = orders.order(tmp_path, "model", load=False)
    for path in (tmp_path / "orders").iterdir():
        if path.stem != young:
            os.utime(path, (1, 1))
    assert [one.key for one in orders.waiting(tmp_path)] == [young]
    assert [path.stem for path in (tmp_path / "orders").iterdir()] == [young]


def test_bundles_that_are_named_new_or_young_stay(tmp_path):
    old = time.time() - 3600
    for number in range(1, 7):
        (tmp_path / "trips" / str(number)).mkdir(parents=True)
        if number != 3:
            os.utime(tmp_path / "trips" / str(number), (old, old))
    removed = sweep(tmp_path, {"trips": {2}}, young=600)
    assert sorted(path.name for path in removed) == ["1", "4"]
    assert sorted(path.name for path in (tmp_path / "trips").iterdir() if path.is_dir()) == ["2", "3", "5", "6"]


def test_what_was_removed_by_half_when_the_server_was_killed_goes(tmp_path):
    (tmp_path / "trips" / ".gone-1" / "noria").mkdir(parents=True)
    (tmp_path / "trips" / "2").mkdir()
    assert sweep(tmp_path, {"trips": {2}}) == []
    assert [path.name for path in (tmp_path / "trips").iterdir()] == ["2"]


class Growing(threading.Event):
    """Never set, and with each wait a file has grown."""

    def __init__(self, path, waits):
        super().__init__()
        self.path, self.left = path, waits

    def wait(self, timeout=None):
        if self.left:
            self.left -= 1
            self.path.write_bytes(b"m" * (self.path.stat().st_size + 1))
        return False


@pytest.mark.parametrize(("waits", "seconds"), [(3, START_SECONDS), (10**9, 0.1)], ids=["whole soon", "never whole"])
def test_the_start_waits_for_files_that_are_written_but_not_for_ever(tmp_path, monkeypatch, waits, seconds):
    monkeypatch.setattr(repository, "START_SECONDS", seconds)
    source, folder = tmp_path / "models", tmp_path / "serving"
    for name in ("copied", "growing"):
        (source / name / "1").mkdir(parents=True)
        (source / name / "1" / "model.onnx").write_bytes(b"m")
    Repository(source, folder).start(Growing(source / "growing" / "1" / "model.onnx", waits))
    asked = state.read(folder / "desired", Desired)
    assert sorted(asked) == (["copied", "growing"] if waits == 3 else ["copied"])
    if waits == 3:
        assert asked["growing"].asked.startswith("1-4-")


def test_a_start_on_a_full_disk_goes_on_and_the_next_look_tries_again(tmp_path, caplog):
    source, folder = tmp_path / "models", tmp_path / "serving"
    (source / "whole" / "1").mkdir(parents=True)
    (source / "whole" / "1" / "model.onnx").write_bytes(b"m")
    Repository(source, folder).start(threading.Event())
    aside = folder / f"repository.json.{os.getpid()}.aside"
    aside.mkdir()  # no file can be written there
    (source / "whole").rename(source / "renamed")
    started = Repository(source, folder)
    started.start(threading.Event())
    assert caplog.text.count("The model repository is looked at again soon") == 1
    aside.rmdir()
    started.step()
    assert repository.listed(folder) == ["renamed"]


def test_a_start_with_whole_files_or_none_does_not_wait_and_one_that_is_to_end_neither(tmp_path):
    source, stop = tmp_path / "models", threading.Event()
    stop.wait = lambda timeout=None: pytest.fail("it waits")  # type: ignore[method-assign]
    Repository(None, tmp_path / "none").start(stop)
    (source / "whole" / "1").mkdir(parents=True)
    (source / "whole" / "1" / "model.onnx").write_bytes(b"m")
    os.utime(source / "whole" / "1" / "model.onnx", (1, 1))
    Repository(source, tmp_path / "serving").start(stop)
    assert list(state.read(tmp_path / "serving" / "desired", Desired)) == ["whole"]
    os.utime(source / "whole" / "1" / "model.onnx")
    stop = threading.Event()
    stop.set()
    Repository(source, tmp_path / "other").start(stop)
    assert not state.read(tmp_path / "other" / "desired", Desired)
