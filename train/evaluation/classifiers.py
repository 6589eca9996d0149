"""Linear classifiers on frozen features, one for each network of a family, trained on the same batches.

As in the paper's appendix A.2: a linear layer followed by batch normalisation, SGD with momentum, cosine learning rate.
The classifiers are independent: their losses are summed only to compute all gradients in one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspnet_fast.weight_file import load_state

from ..data.sampler import EpochSampler
from ..run.schedules import learning_rate
from .accuracy import Accuracy, accuracies

Batch = tuple[Mapping[str, Tensor], Tensor]  # features [B, F] by network, labels [B] or of pixels [B, S, S]
EVALUATION_ROWS = 4096  # per batch


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of a classifier; the peak learning rate is lr * batch_size / 256."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    seed: int


class Classifiers(nn.Module):
    """Linear classifiers of several networks: features [B, F] by network to logits [B, C] by network.

    Args:
        features: number of features F of each network.
        classes: number of classes C.
        seed: seed of the weights.
    """

    def __init__(self, features: Mapping[str, int], classes: int, seed: int) -> None:
        super().__init__()
        self.names = list(features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # no bias: batch norm's shift has the same effect
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(size, classes, bias=False), nn.BatchNorm1d(classes))
                for size in features.values()
            )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the logits of every network."""
        return {name: layer(features[name]) for name, layer in zip(self.names, self.layers, strict=True)}


class ClassifierTraining:
    """Training of classifiers; implements `train.run.loop.Training`."""

    def __init__(self, classifiers: nn.Module, hparams: Hyperparameters, epoch_steps: int) -> None:
        self.classifiers = classifiers
        self.step, self.steps = 0, hparams.epochs * epoch_steps
        self._peak = hparams.lr * hparams.batch_size / 256
        self._optimizer = torch.optim.SGD(classifiers.parameters(), self._peak, hparams.momentum)

    def train_step(self, batch: Batch) -> Tensor:
        """Train one step; returns the mean loss of the networks."""
        features, labels = batch
        self.classifiers.train()
        losses = [F.cross_entropy(logits, labels) for logits in self.classifiers(features).values()]
        loss = torch.stack(losses).sum()
        self._optimizer.zero_grad()
        loss.backward()
        self.update()
        return loss.detach() / len(losses)

    def update(self) -> None:
        """Update the weights by their gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, 0, self._peak)
        self._optimizer.step()
        self.step += 1

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint."""
        return {"classifiers": self.classifiers.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        load_state(self.classifiers, state["classifiers"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def feature_batches(
    features: Mapping[str, Tensor], labels: Tensor, order: EpochSampler, device: torch.device
) -> Iterator[Batch]:
    """Batches of features [B, F] by network and labels [B, ...], from features [N, F] in memory or memory-mapped."""
    for items in order:
        rows = torch.tensor([i for _, i in items])
        yield {name: table[rows].to(device) for name, table in features.items()}, labels[rows].to(device)


@torch.no_grad()
def evaluate(
    classifiers: Classifiers, features: Mapping[str, Tensor], labels: Tensor, device: torch.device
) -> dict[str, Accuracy]:
    """Accuracy of every network's classifier on features [N, F] by network."""
    classifiers.eval()

    def batches() -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        for start in range(0, len(labels), EVALUATION_ROWS):
            rows = slice(start, start + EVALUATION_ROWS)
            yield (
                classifiers({name: table[rows].to(device) for name, table in features.items()}),
                labels[rows].to(device),
            )

    return accuracies(batches())
