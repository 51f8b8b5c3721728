"""The default network over preprocessed tensors, and the last step from its output to a score.

A workload may name its own network: a module class called with the inputs' descriptions and the training options, whose
forward takes the tensors in the inputs' order and returns float32 [n], the standardised target or a logit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from noria.options import TrainingOptions
from noria.workload import Workload
from training.preprocess import Input

Link = Literal["identity", "exp", "sigmoid"]
REACH = 10.0
"""Standardised outputs are cut here before the exponential, so that no input can give an infinite score."""


class WordMean(nn.Module):
    """Mean embedding of a text's words (fastText, Joulin et al. 2016): int64 [n, words] to float32 [n, width]."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(size, width, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        """A text without words gives zeros."""
        total: Tensor = self.words(ids).sum(1)
        return total / (ids > 0).sum(1, keepdim=True).clamp(min=1).to(total.dtype)


class TabularNet(nn.Module):
    """Embeddings of levels, clocks and words beside the numbers, then a small multilayer perceptron."""

    def __init__(self, inputs: tuple[Input, ...], options: TrainingOptions) -> None:
        super().__init__()
        self.kinds = [entry.kind for entry in inputs]
        self.embeddings = nn.ModuleList()
        features = 0
        for entry in inputs:
            width = entry.size if entry.kind == "number" else embedding_width(entry.size, options.embedding)
            features += width
            if entry.kind == "words":
                self.embeddings.append(WordMean(entry.size, width))
            elif entry.kind == "number":
                self.embeddings.append(nn.Identity())
            else:
                self.embeddings.append(nn.Embedding(entry.size, width))
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                # Small: an embedding that training hardly touches must say next to nothing.
                nn.init.normal_(module.weight, std=0.05)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx : module.padding_idx + 1])
        layers: list[nn.Module] = []
        for width in options.hidden:
            layers += [nn.Linear(features, width), nn.ReLU()]
            features = width
        self.layers = nn.Sequential(*layers, nn.Linear(features, 1))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors in the inputs' order, [n] or [n, k], to float32 [n]."""
        parts = [embed(tensor) for embed, tensor in zip(self.embeddings, tensors, strict=True)]
        output: Tensor = self.layers(torch.cat(parts, 1))
        return output.squeeze(1)


class Scored(nn.Module):
    """A network with its last step: an output [n] to a score in the target's unit or a probability."""

    def __init__(self, network: nn.Module, *, center: float, scale: float, link: Link) -> None:
        super().__init__()
        self.network, self.center, self.scale, self.link = network, center, scale, link

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors in the inputs' order to scores float32 [n]."""
        return self.finish(self.network(*tensors))

    def finish(self, output: Tensor) -> Tensor:
        """The last step alone."""
        if self.link == "sigmoid":
            return torch.sigmoid(output * self.scale + self.center)
        if self.link == "exp":
            return torch.exp(output.clamp(-REACH, REACH) * self.scale + self.center)
        return output * self.scale + self.center


def link_of(workload: Workload) -> Link:
    """How a network's output becomes a score of this workload."""
    if workload.task == "binary":
        return "sigmoid"
    return "exp" if workload.log_target else "identity"


def embedding_width(size: int, most: int) -> int:
    """Width of an embedding of `size` indices: grows slowly with the vocabulary, from 2 to `most`."""
    return max(2, min(most, int(1.6 * math.pow(size, 0.45) + 0.5)))
