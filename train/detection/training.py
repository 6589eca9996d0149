"""Training a detector and what it then finds: a `train.run.loop.Training`, and its detections image by image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from dspnet_fast.errors import InputError

from ..config import Workers
from ..data.coco_loader import evaluation_images
from ..data.datasets.coco import CocoDataset, Instances
from ..data.sampler import mix
from ..run.loop import SingleModelTraining
from ..run.progress import Monitor
from ..run.schedules import stepped_learning_rate
from .average_precision import average_precision


@dataclass(frozen=True)
class Hyperparameters:
    """Of a detector's training.

    Attributes:
        steps: of SGD.
        drops: steps at which the learning rate is divided by 10.
        lr: for 16 images; the peak is lr * batch_size / 16.
        weight_decay: of tensors with more than one dimension.
    """

    steps: int
    drops: tuple[int, ...]
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    warmup_steps: int
    seed: int


class DetectionTraining(SingleModelTraining):
    """Trains all of a detector by the sum of its five losses, in one process; a `train.run.loop.Training`."""

    model: MaskRCNN

    def __init__(self, model: MaskRCNN, recipe: Hyperparameters, device: torch.device) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.step, self.steps = 0, recipe.steps
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum)

    def train_step(self, batch: list[Instances]) -> Tensor:
        """One step; returns the sum of the losses. InputError if it is no number."""
        recipe, device = self.recipe, self.device
        self.model.train()
        images = [one.image.to(device, non_blocking=True) / 255 for one in batch]
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in one._asdict().items() if name != "image"}
            for one in batch
        ]
        # torchvision draws sizes and regions from the global generator: from a seed of the step, so that a training
        # that was interrupted draws what it would have drawn
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(mix(recipe.seed, -1, self.step))
            loss = torch.stack(list(self.model(images, targets).values())).sum()
        if not loss.isfinite():
            raise InputError(f"the loss is {loss.item()} in step {self.step + 1}: begin again with a smaller --lr")
        self._optimizer.zero_grad()
        loss.backward()
        peak = recipe.lr * recipe.batch_size / 16
        for group in self._optimizer.param_groups:
            group["lr"] = stepped_learning_rate(self.step, recipe.warmup_steps, peak, recipe.drops)
        self._optimizer.step()
        self.step += 1
        return loss.detach()


@torch.no_grad()
def detections(
    model: MaskRCNN, images: CocoDataset, workers: Workers, device: torch.device
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each image's id and what the model finds in it, as `average_precision` takes it."""
    model.eval()
    with Monitor("detect", len(images)) as monitor:
        for record, (one,) in zip(images.images, evaluation_images(images, workers), strict=True):
            (found,) = model([one.image.to(device, non_blocking=True) / 255])
            yield record["id"], found
            monitor.advance()
            monitor.status(f"{monitor.done / monitor.steps:.0%}")


def evaluate(model: MaskRCNN, images: CocoDataset, workers: Workers, device: torch.device) -> dict[str, Any]:
    """AP of boxes and masks on a set: see `average_precision`."""
    return average_precision(images, detections(model, images, workers, device))
