"""Replicas of a cluster beside their rollout, without Ray: what they are told, and what becomes of it."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import onnx
import pytest

from serving import state
from serving.config import Config
from serving.replica import Replica
from serving.rollout import Rollout
from serving.state import Desired, State
from tests.conftest import identity_graph

LOAD_SECONDS = 2.0


@pytest.fixture
def rollout(tmp_path):
    """One whose MLflow does not answer, and that knows it."""
    lake = str(tmp_path / "lake")
    made = Rollout("http://127.0.0.1:9", str(tmp_path), lake, poll_seconds=3600, load_seconds=60)
    made.polled = True
    return made


@asynccontextmanager
async def running(rollout):
    """A replica that answers, by its lifespan."""
    names = ("join", "look", "leave", "files")
    handle = SimpleNamespace(**{name: SimpleNamespace(remote=getattr(rollout, name)) for name in names})
    home = rollout.folder.parent
    replica = Replica(handle, str(home), str(home / "lake"), Config().to_json(), "cpu", load_seconds=LOAD_SECONDS)
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


def put(rollout, version):
    path = rollout.folder.parent / "models" / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(identity_graph("FP32", (-1, 3)), path)
    return path


async def until(condition, seconds=30.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.05)


def served(replicas):
    return [replica.engine.models["same"].version for replica in replicas]


def test_a_version_that_hangs_costs_one_replica_and_later_ones_are_followed(rollout, tmp_path):
    for version in (1, 3):
        put(rollout, version)
    stuck = put(rollout, 2)
    content = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)  # whoever reads it waits until somebody writes

    async def live():
        promote(rollout, 1)
        async with AsyncExitStack() as stack:
            replicas = [await stack.enter_async_context(running(rollout)) for _ in range(2)]
            promote(rollout, 2, 1)
            await until(lambda: any(replica.stuck for replica in replicas))
            await until(lambda: state.read(rollout.folder / "failed", State))
            tried, other = sorted(replicas, key=lambda replica: not replica.stuck)
            assert served(replicas) == [1, 1]
            await other.check_health()
            reason = "Version 2 of same was not loaded after 2 s"
            assert reason in state.read(rollout.folder / "failed", State)["same"].reason
            promote(rollout, 3, 1)
            await until(lambda: served(replicas) == [3, 3])
            with pytest.raises(RuntimeError, match=reason):
                await tried.check_health()  # its thread still waits
            stuck.rename(tmp_path / "pipe")
            stuck.write_bytes(content)
            (tmp_path / "pipe").write_bytes(content)
        return replicas

    replicas = asyncio.run(live())  # returns when that thread has ended
    assert served(replicas) == [3, 3]
