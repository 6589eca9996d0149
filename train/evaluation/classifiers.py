"""Linear classifiers on frozen features, one for each network of a family, all trained on the same batches.

The paper's appendix A.2: a linear layer and batch normalisation after it, SGD with momentum, a cosine to 0. Nothing
passes between the networks: their losses are summed only to be differentiated in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sampler import EpochSampler
from ..run.schedules import learning_rate
from .accuracy import Accuracy, accuracies

Batch = tuple[Mapping[str, Tensor], Tensor]  # features [B, F] by network, labels [B]
EVALUATED = 4096  # rows at once


@dataclass(frozen=True)
class Hyperparameters:
    """Of a classifier's training; `lr` is for 256 images and the peak is lr * batch_size / 256."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    seed: int


class Classifiers(nn.Module):
    """Features [B, F] by network to logits [B, C] by network.

    Args:
        features: F of each network.
        classes: C.
        seed: of the weights.
    """

    def __init__(self, features: Mapping[str, int], classes: int, seed: int) -> None:
        super().__init__()
        self.names = list(features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # the batch norm's shift is the bias
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(size, classes, bias=False), nn.BatchNorm1d(classes))
                for size in features.values()
            )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits of every network."""
        return {name: layer(features[name]) for name, layer in zip(self.names, self.layers, strict=True)}


class ClassifierTraining:
    """Trains classifiers; a `train.run.loop.Training`."""

    def __init__(self, classifiers: Classifiers, recipe: Hyperparameters, epoch_steps: int) -> None:
        self.classifiers = classifiers
        self.step, self.steps = 0, recipe.epochs * epoch_steps
        self._peak = recipe.lr * recipe.batch_size / 256
        self._optimizer = torch.optim.SGD(classifiers.parameters(), self._peak, recipe.momentum)

    def train_step(self, batch: Batch) -> Tensor:
        """One step; returns the mean of the networks' losses."""
        features, labels = batch
        self.classifiers.train()
        losses = [F.cross_entropy(logits, labels) for logits in self.classifiers(features).values()]
        loss = torch.stack(losses).sum()
        self._optimizer.zero_grad()
        loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, 0, self._peak)
        self._optimizer.step()
        self.step += 1
        return loss.detach() / len(losses)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"classifiers": self.classifiers.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.classifiers.load_state_dict(state["classifiers"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def kept_batches(
    features: Mapping[str, Tensor], labels: Tensor, order: EpochSampler, device: torch.device
) -> Iterator[Batch]:
    """Batches of all of `order` from features [N, F] in memory or in a file."""
    for items in order:
        rows = torch.tensor([i for _, i in items])
        yield {name: of[rows].to(device) for name, of in features.items()}, labels[rows].to(device)


@torch.no_grad()
def evaluate(
    classifiers: Classifiers, features: Mapping[str, Tensor], labels: Tensor, device: torch.device
) -> dict[str, Accuracy]:
    """The accuracy of every network on features [N, F]."""
    classifiers.eval()

    def batches() -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        for start in range(0, len(labels), EVALUATED):
            rows = slice(start, start + EVALUATED)
            yield classifiers({name: of[rows].to(device) for name, of in features.items()}), labels[rows].to(device)

    return accuracies(batches())
