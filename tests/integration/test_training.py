"""Training on a real local Ray: the whole fit, seeds, several workers, a killed worker, batch scores."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from noria.errors import TrainingError
from noria.runtime import open_session, score
from noria.workload import Workload
from registry.bundle import Bundle, Contents, write
from training import fit as fitting
from training import launch, loop
from training.data import prepare
from training.fit import Trained, fit
from training.loop import Job, Part
from training.preprocess import fit as preprocess
from training.score import score as score_table

Rows = Callable[..., pa.Table]
Parts = dict[str, Part]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """With one thread here, as its workers have: several add up in another order, and on some processors the last bit
    of a sum tells."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    launch.connect()
    yield
    launch.disconnect()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def job(parcels: Workload, sent_parcels: Rows) -> tuple[Job, Parts]:
    prepared = prepare(sent_parcels(), parcels)
    made = preprocess(parcels.schema, prepared.split.train, parcels.training)
    parts = {
        name: Part(made.run(parcels.schema.tensors(rows)), rows.column("hours").to_numpy())
        for name, rows in prepared.split
    }
    return Job(made.inputs, parcels.network, parcels.training, parcels.loss, "exp", 1.5, 0.6), parts


@pytest.fixture(scope="module")
def trained(parcels: Workload, sent_parcels: Rows, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    stages: list[str] = []
    storage = tmp_path_factory.mktemp("storage")
    found = fit(parcels, sent_parcels(), storage=storage, progress=stages.append)
    assert stages == ["prepare", "train", "export", "parity", "evaluate"]
    assert not list(storage.iterdir())
    return found


def test_a_fit_gives_everything_a_version_is_made_of(trained: Trained, parcels: Workload) -> None:
    errors = {subject: found.metrics["mae"] for subject, found in trained.evaluations.items()}
    assert errors["candidate"] < 0.4 * errors["naive"]
    assert errors["candidate"] < 1.6 * errors["boosted"]
    assert trained.evaluations["candidate"].slices["express"]["rows"] > 10
    reference = trained.reference()
    assert len(reference) == 2000
    assert set(reference.column("split").to_pylist()) == {"train", "validation", "test"}
    assert {*parcels.schema.names, "hours", "score"} <= set(reference.column_names)
    again = score(open_session(trained.model), parcels.schema.tensors(reference))
    assert np.allclose(again, reference.column("score").to_numpy(), rtol=1e-6)
    assert trained.parity["rows"] >= 10_000
    assert set(trained.seconds) == {"prepare", "train", "export", "parity", "evaluate"}
    assert trained.diagnosis
    assert len(trained.figure().axes) == 2


def test_ray_gives_the_numbers_of_a_run_without_it(job: tuple[Job, Parts], tmp_path: Path) -> None:
    weights, history = loop.train(*job)
    on_ray, same = launch.train(*job, name="alone", storage=tmp_path)
    assert same == history
    assert all(np.array_equal(weights[name], on_ray[name]) for name in weights)
    assert not list(tmp_path.iterdir())


def test_two_workers_learn_together(job: tuple[Job, Parts], tmp_path: Path) -> None:
    fitted, parts = job
    _, alone = loop.train(fitted, parts)
    _, together = launch.train(
        replace(fitted, options=replace(fitted.options, workers=2)), parts, name="two", storage=tmp_path
    )
    assert len(together) == len(alone)
    # Masks differ between ranks, so only about the same number.
    assert together[-1]["test_error"] == pytest.approx(alone[-1]["test_error"], rel=0.15)


def test_a_killed_worker_costs_nothing_but_time(job: tuple[Job, Parts], tmp_path: Path) -> None:
    fitted, parts = job
    long = replace(fitted, options=replace(fitted.options, epochs=40, patience=40))
    weights, history = loop.train(long, parts)
    killed: list[int] = []

    def kill() -> None:
        """SIGKILL the training worker once its first checkpoint is there."""
        while not list(tmp_path.glob("*/checkpoint_*")):
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    resumed, curves = launch.train(long, parts, name="killed", storage=tmp_path)
    killer.join()
    assert killed
    assert curves == history
    assert all(np.array_equal(weights[name], resumed[name]) for name in weights)


def test_what_training_refuses_is_an_error_at_once(job: tuple[Job, Parts], tmp_path: Path) -> None:
    fitted, parts = job
    broken = {**parts, "validation": replace(parts["validation"], labels=np.full(len(parts["validation"]), np.inf))}
    with pytest.raises(TrainingError, match="not finite after epoch 0"):
        launch.train(fitted, broken, name="broken", storage=tmp_path)
    crowd = replace(fitted, options=replace(fitted.options, workers=99))
    with pytest.raises(TrainingError, match="99 workers need as many CPUs, Ray has 2"):
        launch.train(crowd, parts, name="crowd", storage=tmp_path)


def test_a_warm_start_goes_on_from_the_champion(
    trained: Trained, parcels: Workload, sent_parcels: Rows, tmp_path: Path
) -> None:
    newer = sent_parcels(600, seed=9, slower=1.5)
    warm = fit(parcels, newer, storage=tmp_path, warm=trained.weights, held_out=100)
    assert warm.warm
    assert not trained.warm
    assert [len(rows) for _, rows in warm.prepared.split] == [400, 100, 100]
    assert fitting.unpack(warm.weights).preprocessing.model == fitting.unpack(trained.weights).preprocessing.model
    test = warm.prepared.split.test
    labels = test.column("hours").to_numpy()
    champion = score(open_session(trained.model), parcels.schema.tensors(test))
    assert np.abs(warm.scores["test"] - labels).mean() < 0.5 * np.abs(champion - labels).mean()


def test_warm_weights_of_other_columns_are_not_used(trained: Trained, parcels: Workload, sent_parcels: Rows) -> None:
    class Fewer(type(parcels)):  # type: ignore[misc]
        schema = replace(parcels.schema, columns=parcels.schema.columns[1:])

    prepared = prepare(sent_parcels(), Fewer())
    assert fitting._begin(Fewer(), prepared, trained.weights).weights is None
    assert fitting._begin(parcels, prepared, trained.weights).weights is not None
    with pytest.raises(TrainingError, match="cannot be read"):
        fitting.unpack(b"something else")


def test_batch_scores_are_the_online_scores(
    make_contents: Callable[..., Contents], trips: pa.Table, tmp_path: Path
) -> None:
    write(tmp_path, make_contents())
    bundle = Bundle.open(tmp_path)
    many = pa.concat_tables([trips] * 30)
    on_ray = score_table(bundle, many, large=1000)
    assert len(on_ray) == 60_000
    assert np.array_equal(on_ray, score_table(bundle, many))
    assert np.allclose(
        on_ray[:50], score(open_session(bundle.model), bundle.schema.tensors(trips.slice(0, 50)), batch=1)
    )


def test_the_local_ray_listens_on_loopback_only() -> None:
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1"}


def test_sigterm_stays_whose_it_was() -> None:
    launch.disconnect()
    before = signal.signal(signal.SIGTERM, own := lambda *_: None)
    try:
        launch.connect()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_ray_at_an_address_is_said() -> None:
    launch.disconnect()
    try:
        with pytest.raises(TrainingError, match=r"No Ray answers at 127\.0\.0\.1:1"):
            launch.connect("127.0.0.1:1")
    finally:
        launch.connect()
