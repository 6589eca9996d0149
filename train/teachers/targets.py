"""Targets made of a teacher's features: centred by the batch, or whitened by statistics of the run's images.

    centred     t = f - mean of f over both views of all images of the step, on all ranks
    whitened    t = (f - m) (C + r I)^(-1/2)       m, C: mean and covariance over images of the run, measured once

Feature maps are centred by the mean over the step's views and their positions, with both kinds of targets.

The loss is a cosine, so without the mean all targets would be nearly parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.tensor_file import write_tensors

from ..config import PretrainConfig
from ..costs.flops import map_shape
from ..distributed.process_group import SINGLE_PROCESS, World
from ..pretraining.dspnet import Taught

WHITENING = "teacher_whitening.safetensors"
WHITENING_IMAGES = 4096  # images that the statistics are measured on, at most
RIDGE = 0.1  # r as a share of the mean variance: directions with less variance are mostly noise

# Features of the two views of a rank's images in a step, given the step and the batch.
FeatureSource = Callable[[int, Tensor], Taught]


class TeacherTargets:
    """The teacher's targets of a batch.

    Args:
        source: the features.
        world: ranks, over which the mean is taken.
        whitening: mean [T] and matrix [T, T] of whitened targets; None centres by the batch.
    """

    def __init__(
        self, source: FeatureSource, world: World = SINGLE_PROCESS, whitening: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._source = source
        self._world = world
        self._whitening = whitening

    def __call__(self, step: int, batch: Tensor) -> Taught:
        """Targets in float32; `batch` is a rank's share as in `Trainer.train_step`."""
        features, positions = self._source(step, batch)
        if self._whitening is None:
            features = self._centred(features)
        else:
            mean, matrix = self._whitening
            features = (features - mean) @ matrix
        return Taught(features, None if positions is None else self._centred(positions))

    def _centred(self, values: Tensor) -> Tensor:
        """Subtract the mean over everything but the last dimension, on all ranks."""
        mean = values.flatten(0, -2).mean(0)
        self._world.all_reduce_mean(mean)
        return values - mean


def random_targets(config: PretrainConfig, device: torch.device) -> TeacherTargets | None:
    """Random numbers instead of a teacher's features, for timing steps; None without a teacher."""
    features = config.teacher_features
    if features is None:
        return None
    _, height, width = map_shape(config) if config.local_weight else (0, 0, 0)

    def draw(step: int, batch: Tensor) -> Taught:
        local = (len(batch), height * width, config.teacher_map_channels or 0)
        positions = torch.randn(local, device=device) if config.local_weight else None
        return Taught(torch.randn(len(batch), features, device=device), positions)

    return TeacherTargets(draw)


def measure_whitening(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [T] and whitening matrix [T, T] of features, in float32; sums are in float64.

    Args:
        features: batches [n, T].

    Raises:
        InputError: all features are equal, so there is nothing to whiten, or some are not finite.

    Example:
        >>> mean, matrix = measure_whitening([torch.tensor([[1.0, 0.0], [3.0, 0.0]])])
        >>> mean
        tensor([2., 0.])
    """
    rows = torch.cat([batch.double().cpu() for batch in features])
    if not rows.isfinite().all():
        raise InputError("the teacher's features of some images are not finite: choose another --teacher")
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    ridge = RIDGE * values.mean()
    if not ridge > 0:
        raise InputError("the teacher has the same features for all images: choose another --teacher")
    matrix = vectors * (values.clamp_min(0) + ridge).rsqrt() @ vectors.T
    return mean.float(), matrix.float()


def write_whitening(out: Path, whitening: tuple[Tensor, Tensor]) -> None:
    """Keep the statistics of a run for its continuation."""
    mean, matrix = whitening
    write_tensors(out / WHITENING, {"mean": mean.contiguous(), "matrix": matrix.contiguous()}, {"format": "pt"})


def read_whitening(out: Path) -> tuple[Tensor, Tensor]:
    """Statistics of a run; InputError if they are missing or damaged."""
    try:
        tensors = load_file(out / WHITENING)
        return tensors["mean"], tensors["matrix"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{out / WHITENING} is missing or damaged, and the run cannot continue without it") from error
