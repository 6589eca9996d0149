"""A teacher's features of the views that the subnets see, computed in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.normalization import prepare
from ..pretraining.cuda_graphs import CapturedFunction
from ..pretraining.dspnet import Taught
from .teacher import Teacher

CPU_VIEWS = 32  # views per forward pass on a CPU: more take more memory and no less time


class LiveFeatures:
    """Computes the features of a batch of views in parts.

    Args:
        teacher: the teacher.
        device: device of the run.
        parts: number of parts, such as the micro-batches of a step; they bound the memory.
        graphs: replay the network as a CUDA graph.
    """

    def __init__(self, teacher: Teacher, device: torch.device, parts: int = 1, graphs: bool = False) -> None:
        self._outputs = CapturedFunction(teacher.outputs) if graphs else teacher.outputs
        self._device = device
        self._parts = parts

    def __call__(self, step: int, batch: Tensor) -> Taught:
        """Features of `batch`, [2B, C, S, S]; see `Trainer.train_step`."""
        parts = self._parts
        if self._device.type == "cpu":
            parts = max(parts, -(-len(batch) // CPU_VIEWS))
        outputs = [self._outputs(prepare(part, self._device)).each(Tensor.clone) for part in batch.chunk(parts)]
        features, positions = zip(*outputs, strict=True)
        return Taught(torch.cat(features), None if positions[0] is None else torch.cat(positions))
