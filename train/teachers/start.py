"""The teacher's targets of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..config import PretrainConfig
from ..data.bad_images import BadImages
from ..data.datasets.images import ImageDataset, Subset
from ..data.loader import evaluation_batches
from ..data.normalization import prepare
from ..data.sampler import EpochSampler
from ..data.views import augmentation
from ..distributed.batch_split import split_batch
from ..distributed.process_group import World
from .cache import BATCH, CachedFeatures, cached_features
from .live import LiveFeatures
from .targets import (
    WHITENING,
    WHITENING_IMAGES,
    FeatureSource,
    TeacherTargets,
    measure_whitening,
    read_whitening,
    write_whitening,
)
from .teacher import Teacher


def teacher_targets(
    config: PretrainConfig,
    teacher: Teacher,
    images: ImageDataset,
    sampler: EpochSampler,
    bad: BadImages,
    device: torch.device,
    world: World,
) -> TeacherTargets:
    """Targets of the teacher of a run; computes the cache of features and the whitening if they do not exist yet.

    Args:
        config: the run's configuration; the run directory exists.
        teacher: its teacher.
        images: its images.
        sampler: this rank's batches from the first step on.
        bad: counts unreadable images.
        device: its device.
        world: its ranks.
    """
    source: FeatureSource
    cached = None
    if config.teacher_cache is None:
        graphs = device.type == "cuda" and not config.no_cuda_graphs
        source = LiveFeatures(teacher, device, split_batch(config, world.size).micro_batches, graphs)
    else:
        cached = cached_features(config, teacher, images, bad, device, world)
        views = augmentation.byol(config.image_size, config.min_scale, config)
        source = CachedFeatures(cached, views, sampler, device)
    if config.teacher_target == "centred":
        return TeacherTargets(source, world)
    out = Path(config.out)
    if world.is_main and not (out / WHITENING).exists():
        features = cached or _evaluation_features(config, teacher, images, bad, device)
        write_whitening(out, measure_whitening(features))
    world.barrier()
    mean, matrix = (tensor.to(device) for tensor in read_whitening(out))
    return TeacherTargets(source, world, (mean, matrix))


def _evaluation_features(
    config: PretrainConfig, teacher: Teacher, images: ImageDataset, bad: BadImages, device: torch.device
) -> Iterable[Tensor]:
    """Features of the evaluation views of some images of the run, drawn with a fixed seed."""
    drawn = Subset.up_to(WHITENING_IMAGES, images)
    loader = evaluation_batches(drawn, range(len(drawn)), config.image_size, BATCH, config.workers, bad)
    return (teacher.features(prepare(batch, device)) for batch in loader)
