"""From a table of raw labelled rows to everything a version is made of: the one entry that flows call.

    trained = fit(workload, table, storage=folder)
    trained.model        # ONNX bytes, proven against the network
    trained.evaluations  # candidate, boosted, naive on the test part

Not here: which rows (`training.windows`, the flow), the registry, the gate.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from noria import runtime
from noria.errors import TrainingError
from noria.records import Evaluation
from noria.workload import Scorer, Workload
from training import evaluate, parity, preprocess, quantize
from training.data import Prepared, prepare
from training.export import export
from training.launch import train
from training.loop import History, Job, Part, Weights
from training.model import link_of
from training.preprocess import Preprocessing, read_inputs

Progress = Callable[[str], None]
STAGES = ("prepare", "train", "export", "parity", "evaluate")
"""With `TrainingOptions.quantize` also "quantize", after parity."""


@dataclass(frozen=True)
class Trained:
    """A candidate with its evidence."""

    model: bytes
    """One ONNX graph, raw columns to `score`."""
    weights: bytes
    """What a warm start begins with: weights and preprocessing, an .npz without pickles."""
    warm: bool
    """Whether it began with a champion's weights."""
    prepared: Prepared
    scores: Mapping[str, np.ndarray]
    """Of the exported graph, by part, float32 [n]."""
    history: History
    """By epoch: loss and error on each part."""
    evaluations: Mapping[str, Evaluation]
    """On the test part: candidate, boosted, naive."""
    boosted: Scorer
    naive: Scorer
    diagnosis: tuple[str, ...]
    parity: Mapping[str, Any]
    seconds: Mapping[str, float]
    """By stage."""
    unit: str = ""

    def reference(self) -> pa.Table:
        """Every row of the three parts with this model's `score` and the name of its `split`, in order of time."""
        return pa.concat_tables(
            rows.append_column("score", pa.array(self.scores[part].astype(np.float64))).append_column(
                "split", pa.array([part] * len(rows))
            )
            for part, rows in self.prepared.split
        )

    def figure(self) -> Figure:
        """The curves."""
        return evaluate.curves(self.history, self.unit)


def fit(
    workload: Workload,
    table: pa.Table,
    *,
    storage: Path,
    ray_address: str | None = None,
    warm: bytes | None = None,
    held_out: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Prepare, train on Ray, export, prove and evaluate.

    `storage` takes checkpoints while it runs. `warm` is the `weights` of a champion, used as far as it fits the schema.
    `held_out` limits validation and test to the newest rows (`TrainingOptions.held_out`). `progress` hears each stage.

    Raises:
        DataError: not enough usable rows. TrainingError: training did not finish. ParityError: the export is wrong.
    """
    clock = _Clock(progress)
    with clock("prepare"):
        prepared = prepare(table, workload, held_out=held_out)
        begun = _begin(workload, prepared, warm)
        parts = _parts(workload, prepared, begun.preprocessing)
        job = _job(workload, begun, parts["train"].labels)
    with ThreadPoolExecutor(1) as beside:
        # Ray spends seconds on starting processes: time enough for the baselines.
        baselines = beside.submit(_baselines, workload, prepared, begun.preprocessing, parts["train"])
        with clock("train"):
            weights, history = train(job, parts, name=workload.name, storage=storage, address=ray_address)
        boosted, naive = baselines.result()
    model, proven = _export(workload, prepared, begun.preprocessing, replace(job, weights=weights), clock)
    with clock("evaluate"):
        scores, evaluations = _evaluate(workload, prepared, model, {"boosted": boosted, "naive": naive})
    return Trained(
        model=model,
        weights=pack(weights, job, begun.preprocessing),
        warm=begun.weights is not None,
        prepared=prepared,
        scores=scores,
        history=history,
        evaluations=evaluations,
        boosted=boosted,
        naive=naive,
        diagnosis=evaluate.diagnose(history, evaluations),
        parity=proven,
        seconds=clock.seconds,
        unit=workload.unit,
    )


@dataclass(frozen=True)
class Begin:
    """What training begins with: a preprocessing, and a champion's weights and scale where there are some."""

    preprocessing: Preprocessing
    weights: Weights | None = None
    center: float = 0.0
    scale: float = 1.0


def pack(weights: Weights, job: Job, preprocessing: Preprocessing) -> bytes:
    """Everything a warm start needs, as one .npz; `unpack` reads it back."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        allow_pickle=False,
        **{f"weights/{name}": value for name, value in weights.items()},
        preprocessing=np.frombuffer(preprocessing.model, np.uint8),
        inputs=np.array(preprocessing.describe()),
        scale=np.array([job.center, job.scale]),
    )
    return buffer.getvalue()


def unpack(packed: bytes) -> Begin:
    """What `pack` wrote. Raises TrainingError when it is something else."""
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as data:
            weights = {name.removeprefix("weights/"): data[name] for name in data.files if name.startswith("weights/")}
            made = Preprocessing(data["preprocessing"].tobytes(), read_inputs(str(data["inputs"])))
            return Begin(made, weights, *(float(value) for value in data["scale"]))
    except (ValueError, KeyError, OSError) as error:
        raise TrainingError(f"The champion's weights cannot be read ({error}); train without warm start.") from None


def _begin(workload: Workload, prepared: Prepared, warm: bytes | None) -> Begin:
    """The champion's preprocessing and weights where they read the same columns; else fitted on the train part."""
    if warm is not None:
        begun = unpack(warm)
        if {entry.column for entry in begun.preprocessing.inputs} == {
            c.name for c in workload.schema.columns if c.feature
        }:
            return begun
    return Begin(preprocess.fit(workload.schema, prepared.split.train, workload.training))


def _parts(workload: Workload, prepared: Prepared, made: Preprocessing) -> dict[str, Part]:
    schema = workload.schema
    return {
        name: Part(made.run(schema.tensors(rows)), rows.column(schema.target).to_numpy())
        for name, rows in prepared.split
    }


def _job(workload: Workload, begun: Begin, labels: np.ndarray) -> Job:
    """The job, with the target's centre and scale learnt on the train part, or kept from the champion."""
    options = workload.training
    link = link_of(workload)
    if begun.weights is not None:
        options = replace(options, learning_rate=options.warm_learning_rate, epochs=options.warm_epochs)
        center, scale = begun.center, begun.scale
    elif link == "sigmoid":
        share = float(np.clip(labels.mean(), 1e-3, 1 - 1e-3))
        center, scale = float(np.log(share / (1 - share))), 1.0
    else:
        target = np.log(labels) if link == "exp" else labels
        center = float(target.mean() if workload.loss == "squared_error" else np.median(target))
        scale = float(target.std()) or 1.0
    return Job(begun.preprocessing.inputs, workload.network, options, workload.loss, link, center, scale, begun.weights)


def _baselines(workload: Workload, prepared: Prepared, made: Preprocessing, part: Part) -> tuple[Scorer, Scorer]:
    trees = evaluate.Boosted.fit(workload, made.inputs, dict(part.tensors), part.labels)
    return evaluate.BoostedScorer(trees, made, workload.schema), workload.naive(prepared.split.train)


def _export(
    workload: Workload, prepared: Prepared, made: Preprocessing, job: Job, clock: _Clock
) -> tuple[bytes, dict[str, Any]]:
    """The graph that ships, and the report: the float graph against the network, then int8 against the float graph."""
    with clock("export"):
        scored = job.build()
        model = export(scored, made)
    with clock("parity"):
        sample = workload.schema.tensors(prepared.split.test)
        proven = parity.check(model, scored, made, workload.schema, sample)
    if workload.training.quantize == "never":
        return model, proven
    with clock("quantize"):
        shipped, int8 = quantize.choose(workload, prepared, model)
    return shipped, {**proven, "int8": int8}


def _evaluate(
    workload: Workload, prepared: Prepared, model: bytes, baselines: Mapping[str, Scorer]
) -> tuple[dict[str, np.ndarray], dict[str, Evaluation]]:
    """The graph's scores on every part, and each subject's evaluation on test."""
    session, test = runtime.open_session(model), prepared.split.test
    scores = {part: runtime.score(session, workload.schema.tensors(rows)) for part, rows in prepared.split}
    found = {subject: baseline(test) for subject, baseline in baselines.items()}
    return scores, evaluate.judge(workload, test, {"candidate": scores["test"], **found})


class _Clock:
    """Tells each stage and measures it."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = progress or (lambda stage: None)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._tell(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)
