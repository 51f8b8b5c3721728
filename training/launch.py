"""Runs a training job on Ray: starts or joins Ray, places the workers, restarts a run whose worker died.

Not here: what a worker computes (`training.loop`).
"""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from noria.errors import NoriaError, TrainingError
from noria.variables import child_environment, export
from training.loop import History, Job, Part, Place, Weights, best_of
from training.loop import train as train_here

FAILURES = 2
"""How often a run goes on from its last checkpoint after a worker was lost."""
STATE = "state.pt"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report waits for the next check: 2 s by default, every epoch
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's own future default; silences its warning
}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, every listener of Ray binds 127.0.0.1; without it Linux gets the machine's outer address."""


def connect(address: str | None = None, cpus: int = 2) -> None:
    """Join the Ray at `address`, or start one for this process: loopback only, token, no dashboard. Once a process.

    Raises:
        TrainingError: there is no Ray at the address, or none can be started.
    """
    if ray.is_initialized():
        return
    _prepare_environment(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            _knock(address)
            with _signals_kept():
                ray.init(address=address, **quiet)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"No Ray answers at {address} ({error}); start it or correct NORIA_RAY_ADDRESS."
            ) from None
        return
    try:
        with _signals_kept():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises bare ones here, for example after 30 s on a machine that is busy
        ray.shutdown()
        raise TrainingError(f"Ray did not start on this machine ({error}); try again when it is less busy.") from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """SIGTERM stays whose it was: once Ray has it, a flow run that is cancelled is called crashed by Prefect."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _knock(address: str) -> None:
    """Ray itself waits for minutes for an address where nothing listens. Raises OSError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _prepare_environment(address: str | None) -> None:
    """What Ray reads from the environment, where nobody has said otherwise."""
    known, wanted = child_environment(), dict(ENVIRONMENT)
    if not address or address.startswith(("127.", "localhost")):
        wanted[LOOPBACK] = "0"
    if not address:
        wanted["RAY_AUTH_MODE"] = "token"
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(known):
            wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # without one Ray would write a file into the home folder
    export(**{name: value for name, value in wanted.items() if name not in known})
    # Both were read when ray was imported, which was before the environment was complete.
    ray_constants.ENABLE_RAY_CLUSTER = child_environment().get(LOOPBACK) != "0"
    Config.initialize("")


def disconnect() -> None:
    """Leave Ray; ends the one that `connect` started for this process."""
    ray.shutdown()


def train(
    job: Job, parts: Mapping[str, Part], *, name: str, storage: Path, address: str | None = None
) -> tuple[Weights, History]:
    """Train with `job.options.workers` processes; the weights of the best epoch and the curves.

    Every epoch is checkpointed below `storage` (a folder that all nodes see), and a run whose worker dies goes on from
    there. What it wrote is removed when it is done.

    Raises:
        TrainingError: there is no room for the workers, training refused, or workers died too often.
    """
    connect(address)
    workers, resources = job.options.workers, ray.cluster_resources()
    gpu = resources.get("GPU", 0) >= workers
    if resources.get("CPU", 0) < workers:
        raise TrainingError(
            f"{workers} workers need as many CPUs, Ray has {resources.get('CPU', 0):g}; lower TrainingOptions.workers."
        )
    run = f"{name}-{secrets.token_hex(4)}"
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "parts": ray.put(dict(parts)), "path": [str(Path.cwd())]},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(
            name=run,
            storage_path=str(storage.absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=FAILURES),
        ),
    )
    try:
        result = trainer.fit()
        if result.return_value:
            raise TrainingError(str(result.return_value))
        with result.checkpoint.as_directory() as folder:
            return best_of((Path(folder) / STATE).read_bytes())
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"Training of '{name}' failed on Ray after {FAILURES} new attempts: {error}") from error
    finally:
        shutil.rmtree(storage / run, ignore_errors=True)


def _work(config: dict[str, Any]) -> str:
    """What each Ray worker runs; a sentence where training refuses, which trying again would not change."""
    sys.path += [entry for entry in config["path"] if entry not in sys.path]  # where the user's own network may lie
    torch.set_num_threads(1)
    context = ray.train.get_context()
    world = context.get_world_size()
    place = Place(
        rank=context.get_world_rank(),
        world=world,
        device=str(ray.train.torch.get_device()),
        wrap=ray.train.torch.prepare_model if world > 1 else Place.wrap,
        report=_report,
        restore=_restored(),
    )
    try:
        train_here(config["job"], ray.get(config["parts"]), place)
    except NoriaError as error:
        return str(error)
    return ""


def _report(metrics: dict[str, float], checkpoint: bytes) -> None:
    if not checkpoint:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / STATE).write_bytes(checkpoint)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _restored() -> bytes | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return (Path(folder) / STATE).read_bytes()
