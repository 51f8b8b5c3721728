"""A tiny fit for `noria check`: the workload's network on a few hundred rows, with training's own parts, without Ray.

Not a model worth keeping: two epochs, no held-out rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from noria.contract import Trial
from noria.options import TrainingOptions
from noria.workload import Workload
from training import loop, preprocess
from training.export import export
from training.model import link_of

EPOCHS = 2
WORDS = 64


def trial(workload: Workload, table: pa.Table, seed: int) -> Trial:
    """Fit and export on clean labelled rows in order of time.

    Raises:
        WorkloadError: the network is not found.
        TrainingError: it does not train or cannot be exported.
    """
    few = min(workload.training.words, WORDS)
    options = replace(workload.training, epochs=EPOCHS, batch_size=64, minimum_steps=0, words=few, seed=seed)
    prepared = preprocess.fit(workload.schema, table, options)
    labels = table.column(workload.schema.target).to_numpy()
    part = loop.Part(prepared.run(workload.schema.tensors(table)), labels)
    job = _job(workload, prepared, labels, options)
    weights, history = loop.train(job, {"train": part, "validation": part})
    scored = replace(job, weights=weights).build()
    return Trial(export(scored, prepared), history[-1]["train_loss"])


def _job(
    workload: Workload, prepared: preprocess.Preprocessing, labels: np.ndarray, options: TrainingOptions
) -> loop.Job:
    """As in a real run, but scaled on all rows."""
    values = np.log(labels) if workload.log_target else labels
    center, scale = float(np.median(values)), float(values.std()) or 1.0
    if workload.task == "binary":
        center, scale = 0.0, 1.0
    return loop.Job(prepared.inputs, workload.network, options, workload.loss, link_of(workload), center, scale)
