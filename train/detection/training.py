"""Training and evaluation of a detector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from ..data.coco_loader import evaluation_images
from ..data.datasets.coco import CocoDataset, Instances
from ..data.sampler import mix
from ..run.loop import SingleModelTraining
from ..run.options import Workers
from ..run.progress import Monitor
from ..run.schedules import stepped_learning_rate
from ..run.update_guard import UpdateGuard
from .average_precision import average_precision


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of a detector's training.

    Attributes:
        steps: number of training steps.
        drops: steps at which the learning rate is divided by 10.
        batch_size: images per step.
        lr: learning rate per 16 images: the peak is lr * batch_size / 16.
        momentum: SGD momentum.
        weight_decay: weight decay of tensors with two or more dimensions.
        warmup_steps: steps of linear warm-up.
        seed: seed of new weights, order, flips and sampling.
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
    """Training of a detector by the sum of its five losses; implements `train.run.loop.Training`."""

    model: FasterRCNN

    def __init__(self, model: FasterRCNN, hparams: Hyperparameters, device: torch.device) -> None:
        self.model, self.hparams, self.device = model, hparams, device
        self.step, self.steps = 0, hparams.steps
        self.guard = UpdateGuard(model)
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": hparams.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=hparams.momentum)

    def train_step(self, batch: list[Instances]) -> Tensor:
        """Train one step; returns the sum of the losses. A step whose numbers are not finite changes nothing."""
        hparams, device = self.hparams, self.device
        self.guard.begin()
        self.model.train()
        images = [one.image.to(device, non_blocking=True) / 255 for one in batch]
        targets = [
            {
                name: value.to(device, non_blocking=True)
                for name, value in one._asdict().items()
                if name != "image" and value is not None
            }
            for one in batch
        ]
        # torchvision draws sizes and regions from the global generator: seed it per step, so that a resumed training
        # draws the same
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(mix(hparams.seed, -1, self.step))
            loss = torch.stack(list(self.model(images, targets).values())).sum()
        self._optimizer.zero_grad()
        loss.backward()
        peak = hparams.lr * hparams.batch_size / 16
        for group in self._optimizer.param_groups:
            group["lr"] = stepped_learning_rate(self.step, hparams.warmup_steps, peak, hparams.drops)
        self.step += 1
        if self.guard.allows(self.step, loss.detach()):
            self._optimizer.step()
        return loss.detach()


@torch.no_grad()
def detections(
    model: FasterRCNN, images: CocoDataset, workers: Workers, device: torch.device
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Id and detections of each image, the input of `average_precision`."""
    model.eval()
    with Monitor("detect", len(images)) as monitor:
        for record, (one,) in zip(images.images, evaluation_images(images, workers), strict=True):
            (found,) = model([one.image.to(device, non_blocking=True) / 255])
            yield record["id"], found
            monitor.advance()
            monitor.status(f"{monitor.done / monitor.steps:.0%}")


def evaluate(model: FasterRCNN, images: CocoDataset, workers: Workers, device: torch.device) -> dict[str, Any]:
    """Average precision of boxes and masks: see `average_precision`."""
    return average_precision(images, detections(model, images, workers, device))
