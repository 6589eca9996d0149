"""Supervised training of a slimmable classifier: a family whose subnets share weights, or one network alone.

One step (Yu & Huang 2019; the paper's appendix B):

    1. full network: cross entropy with the labels, backward pass
    2. smallest and random other subnets (sandwich rule): cross entropy with the full network's predictions, backward
    3. SGD with momentum on the sum of the gradients
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspnet_fast.models import Classifier, Network
from dspnet_fast.nn import activate
from dspnet_fast.statistics import post_statistics
from dspnet_fast.subnets import Family, Subnet, sandwich

from ..data.datasets.images import ImageDataset, require_labels
from ..data.loader import one_view_batches
from ..data.normalization import prepare
from ..data.sampler import EpochSampler
from ..data.views.augmentation import ViewSpec
from ..run.loop import SingleModelTraining
from ..run.options import Workers
from ..run.schedules import learning_rate
from ..run.update_guard import UpdateGuard
from .accuracy import Accuracy, accuracies
from .pretrained import evaluation_views, statistics_images

Batch = tuple[Tensor, Tensor]  # images [B, C, S, S], labels [B]


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of supervised training.

    Attributes:
        epochs: passes over the images.
        batch_size: images per step.
        lr: learning rate of the encoder per 256 images: the peak is lr * batch_size / 256.
        head_lr: learning rate of the classifier, likewise.
        momentum: SGD momentum.
        weight_decay: weight decay of tensors with two or more dimensions.
        warmup_epochs: epochs of linear warm-up.
        label_smoothing: label smoothing of subnets that learn from the labels.
        subnets_per_step: the smallest, the full one, and random others.
        distill: whether the other subnets learn from the full network instead of the labels.
        seed: seed of classifier weights, image order, augmentation and subnet sampling.
    """

    epochs: int
    batch_size: int
    lr: float
    head_lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    subnets_per_step: int = 4
    distill: bool = True
    seed: int = 0


def new_classifier(encoder: Network, classes: int, seed: int) -> Classifier:
    """A classifier on top of an encoder, with weights of std 0.01 that depend on the seed only."""
    model = Classifier(encoder, classes)
    nn.init.normal_(model.head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(model.head.bias)
    return model.to(memory_format=torch.channels_last)


class SupervisedTraining(SingleModelTraining):
    """Training of a slimmable classifier; implements `train.run.loop.Training`."""

    model: Classifier

    def __init__(self, model: Classifier, family: Family, hparams: Hyperparameters, epoch_steps: int) -> None:
        self.model, self.family, self.hparams = model, family, hparams
        self.step, self.steps = 0, hparams.epochs * epoch_steps
        self._warmup = round(hparams.warmup_epochs * epoch_steps)
        groups = []
        for part, lr in ((model.encoder, hparams.lr), (model.head, hparams.head_lr)):
            parameters = list(part.parameters())
            for decay, chosen in (
                (hparams.weight_decay, [p for p in parameters if p.ndim > 1]),
                (0.0, [p for p in parameters if p.ndim <= 1]),
            ):
                groups.append({"params": chosen, "peak": lr * hparams.batch_size / 256, "weight_decay": decay})
        self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=hparams.momentum)
        self.guard = UpdateGuard(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.main_grad = parameter.grad  # type: ignore[attr-defined]  # operators accumulate into its prefix

    def train_step(self, batch: Batch) -> Tensor:
        """Train one step; returns the full network's loss. A step whose numbers are not finite changes nothing."""
        images, labels = batch
        hparams = self.hparams
        self.guard.begin()
        self.model.train()
        subnets = sandwich(self.family, hparams.subnets_per_step, hparams.seed, self.step)
        teacher: Tensor | None = None
        losses = []
        for subnet in reversed(subnets):  # the full network first: the others learn from its predictions
            with activate(self.model, subnet):
                logits = self.model(images)
            goal = labels if teacher is None else teacher
            smoothing = hparams.label_smoothing if teacher is None else 0.0
            loss = F.cross_entropy(logits, goal, label_smoothing=smoothing)
            loss.backward()
            losses.append(loss.detach())
            if teacher is None and hparams.distill:
                teacher = logits.detach().softmax(dim=1)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self._warmup, group["peak"])
        self.step += 1
        if self.guard.allows(self.step, losses[0]):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        return losses[0]


class TrainingGroup:
    """Independent trainings on the same batches; implements `train.run.loop.Training`."""

    def __init__(self, trainings: Mapping[str, SupervisedTraining]) -> None:
        self.trainings = trainings
        first = next(iter(trainings.values()))
        self.step, self.steps = first.step, first.steps

    def train_step(self, batch: Batch) -> Tensor:
        """Train one step of each; returns the mean loss."""
        loss = torch.stack([training.train_step(batch) for training in self.trainings.values()]).mean()
        self.step += 1
        return loss

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint."""
        return {"trainings": {name: training.state() for name, training in self.trainings.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name, training in self.trainings.items():
            training.load_state({**state["trainings"][name], "step": state["step"]})
        self.step = state["step"]


def labelled_batches(
    images: ImageDataset, view: ViewSpec, order: EpochSampler, workers: Workers, device: torch.device
) -> Iterator[Batch]:
    """Batches of augmented, normalised images and their labels on the device, in the given order."""
    labels = require_labels(images)
    for pixels, items in zip(one_view_batches(images, view, order, workers), order, strict=True):
        yield prepare(pixels, device), labels[[i for _, i in items]].to(device)


def evaluate(
    models: Mapping[str, tuple[Classifier, Iterable[Subnet]]],
    train: ImageDataset,
    test: ImageDataset,
    image_size: int,
    workers: Workers,
    device: torch.device,
) -> dict[str, Accuracy]:
    """Measure post-statistics on `train` and accuracies on `test`.

    Args:
        models: classifiers and their subnets; names of subnets must be unique.
        train: training set.
        test: test set.
        image_size: height and width of images, in pixels.
        workers: number of loader processes.
        device: device of the models.

    Returns:
        Accuracies by subnet.
    """
    for name, (model, switches) in models.items():
        views = evaluation_views(statistics_images(train), image_size, device, f"statistics {name}", workers)
        post_statistics(model, switches, views)
    labels = require_labels(test)

    def batches() -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        done = 0
        for images in evaluation_views(test, image_size, device, "test", workers):
            logits = {}
            for model, switches in models.values():
                for switch in switches:
                    with activate(model, switch):
                        logits[switch.name] = model(images)
            yield logits, labels[done : done + len(images)].to(device)
            done += len(images)

    return accuracies(batches())
