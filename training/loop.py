"""One training run of a network on preprocessed tensors: plain PyTorch, on one process or as one of several (DDP).

Everything random is a function of seed, epoch and rank, so a run that is resumed from its last checkpoint ends with the
same numbers as one that was never interrupted. Not here: Ray (`training.launch`) and where tensors come from.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noria.errors import TrainingError
from noria.metrics import Loss, row_losses
from noria.options import TrainingOptions
from noria.workload import load_object
from training.model import Link, Scored
from training.preprocess import Input

Weights = dict[str, np.ndarray]
History = list[dict[str, float]]
SHOWN_ROWS = 8192
"""Rows on which a part's curve is measured each epoch; more would cost more than the epoch itself."""
WARM_UP = 0.15
"""Share of the steps in which the learning rate rises (one cycle, Smith & Topin 2019)."""


@dataclass(frozen=True)
class Job:
    """What is trained, as plain data that travels to workers."""

    inputs: tuple[Input, ...]
    network: str
    options: TrainingOptions
    loss: Loss
    link: Link
    center: float
    scale: float
    """The network fits (link^-1(target) - center) / scale; learnt on the train part."""
    weights: Weights | None = None
    """Where to begin: a champion's weights."""

    def build(self) -> Scored:
        """The network with its last step, seeded; with `weights` where there are some.

        Raises:
            TrainingError: the weights do not fit the network.
        """
        torch.manual_seed(self.options.seed)
        network = load_object(self.network)(self.inputs, self.options)
        if self.weights is not None:
            try:
                network.load_state_dict(
                    {name: torch.from_numpy(np.array(value)) for name, value in self.weights.items()}
                )
            except RuntimeError as error:
                raise TrainingError(
                    f"The champion's weights do not fit the network ({error}); train without warm start."
                ) from None
        return Scored(network, center=self.center, scale=self.scale, link=self.link)


@dataclass(frozen=True)
class Part:
    """Preprocessed tensors, by input name, and labels float64 [n] in the target's unit."""

    tensors: Mapping[str, np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Place:
    """Where a process of a run stands; the defaults are a run of one process without checkpoints."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network
    """Makes the network distributed."""
    report: Callable[[dict[str, float], bytes], None] = lambda metrics, checkpoint: None
    """Called after each epoch, by every process."""
    restore: bytes | None = None
    """The checkpoint to go on from."""


@dataclass
class State:
    """All that changes while training; what a checkpoint holds besides network, optimiser and schedule."""

    epoch: int = 0
    """Epochs done."""
    best: float = math.inf
    stale: int = 0
    """Epochs since the best."""
    history: History = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Of the best epoch."""


def train(job: Job, parts: Mapping[str, Part], place: Place | None = None) -> tuple[Weights, History]:
    """Train until validation stops getting better; the weights of the best epoch and the curves.

    A history entry has `epoch`, and for each part `<part>_loss` (what is optimised) and `<part>_error` (the workload's
    row loss, in the target's unit). Early stopping follows `validation_loss`; test is only watched.

    Raises:
        TrainingError: the loss is not finite.
    """
    here = place or Place()
    run = _Run(job, parts, here)
    state = run.restore(here.restore) if here.restore else run.begin()
    while state.epoch < run.options.epochs and state.stale <= run.options.patience:
        run.epoch(state.epoch)
        entry = {"epoch": float(state.epoch), **run.measure()}
        if not math.isfinite(entry["validation_loss"]):
            raise TrainingError(
                f"The loss is not finite after epoch {state.epoch}; lower TrainingOptions.learning_rate "
                f"({run.options.learning_rate:g}) or reject wild rows with a rule."
            )
        run.judge(state, entry)
        here.report(entry, run.save(state) if here.rank == 0 else b"")
    return {name: value.cpu().numpy() for name, value in state.weights.items()}, state.history


class _Run:
    """The moving parts of `train`."""

    def __init__(self, job: Job, parts: Mapping[str, Part], place: Place) -> None:
        self.options, self.batch = job.options, _batch(job.options, len(parts["train"]), place.world)
        self.job, self.place, self.parts = job, place, parts
        self.scored = job.build().to(place.device)
        self.network = place.wrap(self.scored.network)
        self.tensors = {name: _load(job, part, place.device) for name, part in parts.items()}
        self.batches = len(parts["train"]) // self.batch
        self.optimizer = torch.optim.AdamW(
            self.scored.network.parameters(),
            lr=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            self.options.learning_rate,
            total_steps=self.options.epochs * self.batches,
            pct_start=WARM_UP,
        )

    def epoch(self, number: int) -> None:
        """One pass over the train part in an order that depends on seed and epoch only."""
        seed = self.options.seed * 1_000_003 + number
        order = torch.randperm(len(self.parts["train"]), generator=torch.Generator().manual_seed(seed)).to(
            self.place.device
        )
        torch.manual_seed(seed * 64 + self.place.rank)
        features, target = self.tensors["train"]
        self.network.train()
        for start in range(0, self.batches * self.batch, self.batch):
            rows = order[start + self.place.rank : start + self.batch : self.place.world]
            chosen = [_masked(entry.kind, tensor[rows], self.options.mask)
                      for entry, tensor in zip(self.job.inputs, features, strict=True)]  # fmt: skip
            loss = _loss(self.job, self.network(*chosen), target[rows])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Loss and error of each part, on rows spread over it."""
        self.scored.eval()
        found = {}
        for name, (features, target) in self.tensors.items():
            rows = torch.linspace(0, len(target) - 1, min(len(target), SHOWN_ROWS)).long().to(self.place.device)
            output = self.scored.network(*[tensor[rows] for tensor in features])
            found[f"{name}_loss"] = float(_loss(self.job, output, target[rows]))
            scores = self.scored.finish(output).cpu().numpy()
            found[f"{name}_error"] = float(
                row_losses(self.job.loss, self.parts[name].labels[rows.cpu().numpy()], scores).mean()
            )
        return found

    def judge(self, state: State, entry: dict[str, float]) -> None:
        """Take the epoch into account. Rank 0 decides for all: devices may differ in the last bits."""
        better = entry["validation_loss"] < state.best - 1e-5
        if self.place.world > 1:
            flag = torch.tensor([float(better)], device=self.place.device)
            torch.distributed.broadcast(flag, 0)
            better = bool(flag.item())
        state.epoch, state.history = state.epoch + 1, [*state.history, entry]
        state.stale = 0 if better else state.stale + 1
        if better:
            state.best, state.weights = entry["validation_loss"], self._copy()

    def begin(self) -> State:
        """A fresh state. A warm start is a candidate itself: training never ends worse than it began on validation."""
        if self.job.weights is None:
            return State()
        return State(best=self.measure()["validation_loss"], weights=self._copy())

    def save(self, state: State) -> bytes:
        """Everything needed to go on after the last epoch."""
        buffer = io.BytesIO()
        moving: dict[str, Any] = {
            "network": self.scored.network,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }
        torch.save({name: part.state_dict() for name, part in moving.items()} | vars(state), buffer)
        return buffer.getvalue()

    def restore(self, checkpoint: bytes) -> State:
        """Go on where `save` was called."""
        saved: dict[str, Any] = torch.load(io.BytesIO(checkpoint), map_location=self.place.device, weights_only=True)
        self.scored.network.load_state_dict(saved.pop("network"))
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        self.schedule.load_state_dict(saved.pop("schedule"))
        return State(**saved)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.scored.network.state_dict().items()}


def best_of(checkpoint: bytes) -> tuple[Weights, History]:
    """The best epoch's weights and the curves of a checkpoint that `train` reported."""
    saved = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in saved["weights"].items()}, saved["history"]


def _batch(options: TrainingOptions, rows: int, world: int) -> int:
    """Rows of a step, over all processes: smaller batches for few rows, so that there are enough steps."""
    batch = max(world, min(options.batch_size, rows) // world * world)
    while batch > 128 and options.epochs * (rows // batch) < options.minimum_steps:
        batch = max(128, batch // 2) // world * world
    return batch


def _load(job: Job, part: Part, device: str) -> tuple[list[Tensor], Tensor]:
    """Tensors in the inputs' order, and the standardised target (the label itself for a probability)."""
    labels = np.log(part.labels) if job.link == "exp" else part.labels
    target = labels if job.link == "sigmoid" else (labels - job.center) / job.scale
    features = [torch.from_numpy(np.ascontiguousarray(part.tensors[entry.name])).to(device) for entry in job.inputs]
    return features, torch.from_numpy(target.astype(np.float32)).to(device)


def _loss(job: Job, output: Tensor, target: Tensor) -> Tensor:
    if job.link == "sigmoid":
        return nn.functional.binary_cross_entropy_with_logits(output * job.scale + job.center, target)
    if job.loss == "squared_error":
        return nn.functional.mse_loss(output, target)
    return nn.functional.l1_loss(output, target)


def _masked(kind: str, values: Tensor, share: float) -> Tensor:
    """A share of the values replaced by 'missing', as the preprocessing graph writes it."""
    if not share:
        return values
    gone = torch.rand(values.shape if kind == "words" else values.shape[:1], device=values.device) < share
    if kind != "number":
        return values.masked_fill(gone, 0)
    kept = values.masked_fill(gone[:, None], 0.0)
    return torch.cat([kept[:, :-1], torch.where(gone[:, None], 1.0, kept[:, -1:])], 1)
