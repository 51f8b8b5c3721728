"""Training without Ray: learning, early stopping, seeds, resuming, warm starts, masking."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from noria.errors import TrainingError
from noria.workload import Workload
from training import loop, preprocess
from training.data import prepare
from training.loop import Job, Part, Place

Parts = dict[str, Part]
GOLDEN = 0.1895


@pytest.fixture(scope="module")
def job(parcels: Workload, sent_parcels: Callable[..., pa.Table]) -> tuple[Job, Parts]:
    torch.set_num_threads(1)
    prepared = prepare(sent_parcels(), parcels)
    made = preprocess.fit(parcels.schema, prepared.split.train, parcels.training)
    parts = {
        name: Part(made.run(parcels.schema.tensors(rows)), rows.column("hours").to_numpy())
        for name, rows in prepared.split
    }
    target = np.log(parts["train"].labels)
    fitted = Job(
        made.inputs,
        parcels.network,
        parcels.training,
        parcels.loss,
        "exp",
        float(np.median(target)),
        float(target.std()),
    )
    return fitted, parts


def test_it_learns_and_repeats_itself_under_a_seed(job: tuple[Job, Parts]) -> None:
    weights, history = loop.train(*job)
    again, same = loop.train(*job)
    assert history == same
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    assert history[-1]["test_error"] < 0.35 * np.abs(job[1]["test"].labels - np.median(job[1]["train"].labels)).mean()
    other, _ = loop.train(replace(job[0], options=replace(job[0].options, seed=1)), job[1])
    assert not np.array_equal(weights["layers.0.weight"], other["layers.0.weight"])


def test_the_golden_loss(job: tuple[Job, Parts]) -> None:
    """The same seed gives the same number: what proves that a refactoring changed nothing."""
    _, history = loop.train(*job)
    assert history[-1]["validation_loss"] == pytest.approx(GOLDEN, rel=2e-3)


def test_a_run_resumed_from_any_checkpoint_ends_like_the_whole_one(job: tuple[Job, Parts]) -> None:
    saved: list[bytes] = []
    weights, history = loop.train(*job, Place(report=lambda metrics, checkpoint: saved.append(checkpoint)))
    assert len(saved) == len(history)
    resumed, continued = loop.train(*job, Place(restore=saved[1]))
    assert continued == history
    assert all(np.array_equal(weights[name], resumed[name]) for name in weights)
    best, curves = loop.best_of(saved[-1])
    assert curves == history
    assert all(np.array_equal(weights[name], best[name]) for name in weights)


def test_training_stops_when_validation_gets_no_better(job: tuple[Job, Parts]) -> None:
    fitted, parts = job
    noise = {
        name: replace(part, labels=np.random.default_rng(0).permutation(part.labels)) for name, part in parts.items()
    }
    _, history = loop.train(replace(fitted, options=replace(fitted.options, epochs=40, patience=1)), noise)
    losses = [entry["validation_loss"] for entry in history]
    assert len(history) < 40
    assert int(np.argmin(losses)) == len(losses) - 3


def test_a_warm_start_never_ends_worse_than_it_began(job: tuple[Job, Parts]) -> None:
    fitted, parts = job
    weights, history = loop.train(fitted, parts)
    wild = replace(fitted, weights=weights, options=replace(fitted.options, learning_rate=5.0, epochs=1, patience=0))
    kept, _ = loop.train(wild, parts)
    assert all(np.array_equal(weights[name], kept[name]) for name in weights)
    gentle = replace(fitted, weights=weights, options=replace(fitted.options, learning_rate=1e-3, epochs=2))
    assert loop.train(gentle, parts)[1][-1]["validation_loss"] < history[0]["validation_loss"]


def test_weights_of_another_network_are_refused(job: tuple[Job, Parts]) -> None:
    with pytest.raises(TrainingError, match="do not fit the network"):
        replace(job[0], weights={"layers.0.weight": np.zeros((3, 3), np.float32)}).build()


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do(job: tuple[Job, Parts]) -> None:
    fitted, parts = job
    broken = {**parts, "validation": replace(parts["validation"], labels=np.full(len(parts["validation"]), np.inf))}
    with pytest.raises(TrainingError, match="not finite after epoch 0; lower"):
        loop.train(fitted, broken)


def test_masking_writes_missing_as_preprocessing_does() -> None:
    torch.manual_seed(0)
    numbers = loop._masked("number", torch.tensor([[1.0, 2.0, 0.0]] * 1000), 0.3)
    gone = numbers[:, 2] == 1
    assert 0.2 < gone.float().mean() < 0.4
    assert (numbers[gone] == torch.tensor([0.0, 0.0, 1.0])).all()
    assert (numbers[~gone] == torch.tensor([1.0, 2.0, 0.0])).all()
    levels = loop._masked("level", torch.full((1000,), 5), 0.3)
    assert set(levels.tolist()) == {0, 5}
    words = loop._masked("words", torch.full((100, 8), 5), 0.3)
    assert 0.2 < (words == 0).float().mean() < 0.4


def test_small_windows_get_smaller_batches(job: tuple[Job, Parts]) -> None:
    options = replace(job[0].options, epochs=10, batch_size=512, minimum_steps=400)
    assert [loop._batch(options, rows, 1) for rows in (50_000, 10_000, 450, 60)] == [512, 128, 128, 60]
    assert loop._batch(options, 50_001, 3) % 3 == 0
