"""Replicas of a cluster beside their rollout, without Ray: what they are told, and what becomes of it."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import onnx
import pytest

from registry.bundle import write
from registry.manifest import digest_of
from registry.proof import Proof
from serving import replica as module
from serving import state
from serving.attendance import attend
from serving.config import Config
from serving.copies import copy_of, found, put, sweep
from serving.metrics import Metrics
from serving.node_drain import NodeDrain
from serving.replica import Order, Replica
from serving.rollout import Rollout
from serving.state import Desired, State
from tests.conftest import identity_graph

LOAD_SECONDS, HANGING_SECONDS = 60.0, 2.0
"""What a load may take, and what one may that ends never."""


@pytest.fixture
def rollout(tmp_path):
    """One whose MLflow does not answer, and that knows it."""
    lake = str(tmp_path / "lake")
    made = Rollout("http://127.0.0.1:9", str(tmp_path), lake, poll_seconds=3600, load_seconds=60)
    made.polled = True
    return made


def made(rollout, load_seconds=LOAD_SECONDS):
    names = ("join", "look", "leave", "files")
    handle = SimpleNamespace(**{name: SimpleNamespace(remote=getattr(rollout, name)) for name in names})
    home = rollout.folder.parent
    return Replica(handle, str(home), str(home / "lake"), Config().to_json(), "cpu", load_seconds=load_seconds)


@asynccontextmanager
async def running(rollout):
    """A replica that answers, by its lifespan."""
    replica = made(rollout)
    orders, said = asyncio.Queue(), asyncio.Queue()
    life = asyncio.create_task(replica.live(orders.get, said.put))
    await orders.put({"type": "lifespan.startup"})
    assert await said.get() == {"type": "lifespan.startup.complete"}
    yield replica
    await orders.put({"type": "lifespan.shutdown"})
    await life


def promote(rollout, version, before=None):
    """What the reconciler writes when the alias moves."""
    models = rollout.folder.parent / "models"
    asked = Desired("same", version, str(models / str(version)), f"asked-{version}", plain=True)
    if before is not None:
        asked = Desired(**{**asked.__dict__, "fallback_version": before, "fallback_folder": str(models / str(before))})
    state.write(rollout.folder / "desired", asked)


def publish(rollout, version):
    path = rollout.folder.parent / "models" / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(identity_graph("FP32", (-1, 3)), path)
    return path


def block(path, aside):
    """Whoever reads the file waits, until what this returns is called."""
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)

    def release():
        path.rename(aside)
        path.write_bytes(content)
        aside.write_bytes(content)

    return release


async def until(condition, seconds=120.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.05)


def served(replicas):
    return [replica.engine.models["same"].version for replica in replicas]


def test_a_version_that_hangs_costs_one_replica_and_later_ones_are_followed(rollout, tmp_path):
    for version in (1, 3):
        publish(rollout, version)
    release = block(publish(rollout, 2), tmp_path / "pipe")

    async def live():
        promote(rollout, 1)
        async with AsyncExitStack() as stack:
            replicas = [await stack.enter_async_context(running(rollout)) for _ in range(2)]
            for replica in replicas:
                replica._load_seconds = HANGING_SECONDS
            promote(rollout, 2, 1)
            await until(lambda: any(replica.stuck for replica in replicas))
            await until(lambda: state.read(rollout.folder / "failed", State))
            tried, other = sorted(replicas, key=lambda replica: not replica.stuck)
            assert served(replicas) == [1, 1]
            await other.check_health()
            reason = "Version 2 of same was not loaded after 2 s"
            assert reason in state.read(rollout.folder / "failed", State)["same"].reason
            for replica in replicas:
                replica._load_seconds = LOAD_SECONDS
            promote(rollout, 3, 1)
            await until(lambda: served(replicas) == [3, 3])
            with pytest.raises(RuntimeError, match=reason):
                await tried.check_health()  # its thread still waits
            release()
        return replicas

    replicas = asyncio.run(live())  # returns when that thread has ended
    assert served(replicas) == [3, 3]


def test_a_replica_that_cannot_start_says_so_at_once(rollout, tmp_path):
    release = block(publish(rollout, 1), tmp_path / "pipe")
    promote(rollout, 1)

    async def live():
        orders, said = asyncio.Queue(), asyncio.Queue()
        await orders.put({"type": "lifespan.startup"})
        try:
            await asyncio.wait_for(made(rollout, HANGING_SECONDS).live(orders.get, said.put), 120)
        finally:
            release()
        return await said.get()

    told = asyncio.run(live())
    assert told["type"] == "lifespan.startup.failed"
    assert "Version 1 of same was not loaded" in told["message"]


def test_copies_that_nobody_names_go_and_those_in_use_stay(rollout, tmp_path, make_contents, monkeypatch):
    monkeypatch.setattr(module, "TIDY_SECONDS", 0.05)
    fetched = rollout.bundles / "trips" / "3"
    write(fetched, make_contents())
    state.write(rollout.folder / "desired", Desired("trips", 3, str(fetched), "asked"))

    async def live():
        async with running(rollout) as replica:
            copies = replica.node / "bundles"
            wanted = copy_of(copies, "trips", 3, digest_of(fetched))
            old, left = wanted.with_name("2-0123"), wanted.with_name(f".3-4567-{uuid.uuid4().hex}")
            young = wanted.with_name("1-89ab")
            for folder in (wanted, old, left, young):
                put(folder, {"model.onnx": b"a graph"})
                os.utime(folder, (1, 1))
            assert not found(young, "another digest")  # looked for just now, by another replica
            await until(lambda: not old.exists() and not left.exists())
            assert sorted(path.name for path in wanted.parent.iterdir()) == sorted([wanted.name, young.name])
            sweep(copies, {wanted}, 0)
            assert [path.name for path in wanted.parent.iterdir()] == [wanted.name]

    asyncio.run(live())


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_that_another_replica_has_put_there_stays_and_another_version_s_goes(tmp_path, make_contents):
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, make_contents())
    write(second, make_contents(thresholds={"rows": 200}))
    copy = tmp_path / "copies" / "trips" / "1-0123"
    put(copy, files_of(first))
    made = copy.stat().st_ino
    put(copy, files_of(first))
    assert copy.stat().st_ino == made
    put(copy, files_of(second))
    assert digest_of(copy) == digest_of(second)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_whole_copy_of_a_version_that_does_not_load_stays(rollout, tmp_path, make_contents):
    """Another replica of the node may be loading it; a damaged one is fetched anew with the next try."""
    contents, bundle = make_contents(), tmp_path / "bundle"
    wrong = Proof(contents.proof.records, [value + 1 for value in contents.proof.scores])
    write(bundle, make_contents(proof=wrong))
    replica, digest = made(rollout), digest_of(bundle)
    copy = copy_of(replica.node / "bundles", "trips", 1, digest)
    put(copy, files_of(bundle))
    order = Order(Desired("trips", 1, "/on/another/node", "asked"), digest)
    try:
        assert asyncio.run(replica._take(order)).status == "failed"
        assert files_of(copy) == files_of(bundle)
        (copy / "model.onnx").write_bytes(b"damaged")
        assert asyncio.run(replica._take(order)).status == "failed"
        assert not copy.exists()
    finally:
        replica.drain.finish(0)


def shown(metrics):
    """How many requests a scrape shows, over all replicas of the node."""
    lines = metrics.page()[0].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("noria_requests_total{"))


def test_the_numbers_of_replicas_that_ended_become_one_file(tmp_path):
    folder, counted, locks = tmp_path / "metrics", [], []
    for source in ("a", "b", "c"):
        locks.append(attend(folder, source))
        counted.append(Metrics(folder, source))
        counted[-1].answered("infer", "trips", 1, 200, 0.001, 1)
        counted[-1].dump()
    (folder / "c.aside").write_bytes(b"half a fi")
    node = NodeDrain(tmp_path, str(tmp_path / "lake"))
    try:
        assert node.step()
        assert (
            sorted(path.suffix for path in folder.iterdir()) == [".alive", ".alive", ".alive", ".aside"] + [".json"] * 3
        )
        for lock in locks[1:]:  # as when a process is killed
            lock.close()
        for _ in range(3):
            assert node.step()
            assert sorted(path.name for path in folder.iterdir()) == ["a.alive", "a.json", "retired.json"]
            assert shown(counted[0]) == 3
        with attend(folder, "d"):
            assert node.step()
            assert (folder / "d.alive").exists()
    finally:
        node.finish(0)
        locks[0].close()


def test_a_silent_rollout_is_named_once_while_it_lasts(rollout, caplog):
    async def silent(*_):
        raise ConnectionResetError("gone")

    replica = made(rollout)
    answers, replica.rollout.look.remote = replica.rollout.look.remote, silent

    async def ask():
        for _ in range(2):
            await replica._ask((), "loading")
            await replica._look()

    def said():
        return [one.getMessage() for one in caplog.records if one.name == "serving.replica"]

    asyncio.run(ask())
    assert said() == ["The rollout does not answer (ConnectionResetError); loading goes on."]
    replica.rollout.look.remote = answers
    asyncio.run(replica._ask((), "loading"))
    replica.rollout.look.remote = silent
    asyncio.run(ask())
    assert len(said()) == 2
    replica.drain.finish(0)
