"""A teacher's features of all images of a run, computed once and kept on disk.

DIR/view-DIGEST.npy, mirror-DIGEST.npy   features [N, T] of the evaluation views and of their mirror images, float32

The digest is one of the teacher's weights, its image size and precision, and the names of the images. In training, a
view gets the feature of the whole image, or of its mirror image if the augmentation mirrors the view. With
--flip-probability 0 the features of mirror images are not computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dspnet_fast import atomic
from dspnet_fast.errors import InputError

from ..config import PretrainConfig
from ..data.bad_images import BadImages
from ..data.datasets.images import ImageDataset, dataset_digest
from ..data.loader import evaluation_batches
from ..data.normalization import prepare
from ..data.sampler import EpochSampler
from ..data.views.augmentation import ViewSpec, is_mirrored, uniform_numbers
from ..distributed.process_group import World
from ..evaluation.features import load_or_compute
from ..pretraining.dspnet import Taught
from ..run import fingerprint
from ..run.lock import lock
from ..run.progress import Monitor
from ..run.run_directory import LOCK
from .teacher import Teacher, TeacherFacts, cached_views

BATCH = 64  # images per forward pass, each twice
VIEW, MIRROR = "view", "mirror"


def _files(config: PretrainConfig, facts: TeacherFacts, images: ImageDataset) -> dict[str, Path]:
    """The files of a run's features by kind."""
    assert config.teacher_cache is not None
    key = fingerprint.digest(facts.sha256, facts.image_size, config.precision, dataset_digest(images))
    return {name: Path(config.teacher_cache) / f"{name}-{key}.npy" for name in (VIEW, MIRROR)[: cached_views(config)]}


def check_cache(config: PretrainConfig, facts: TeacherFacts, images: ImageDataset) -> None:
    """Raise InputError if features have to be written to --teacher-cache and cannot be."""
    if config.teacher_cache is None or all(path.exists() for path in _files(config, facts, images).values()):
        return
    try:
        atomic.check_writable(Path(config.teacher_cache))
    except InputError as error:
        raise InputError(f"--teacher-cache: {error}") from error


def cached_features(
    config: PretrainConfig, teacher: Teacher, images: ImageDataset, bad: BadImages, device: torch.device, world: World
) -> list[Tensor]:
    """Load the features of all images and of their mirror images, [N, T] each, and compute them first if necessary.

    The features of mirror images are omitted if no view is mirrored. An interrupted computation continues. An
    unreadable image has the features of the next readable one, as in training.

    Raises:
        InputError: the disk is too small, several ranks would have to compute, or another process computes.
    """
    assert config.teacher_cache is not None
    folder, facts = Path(config.teacher_cache), teacher.facts
    files = _files(config, facts, images)
    if not all(path.exists() for path in files.values()):
        if world.size > 1:
            raise InputError(
                f"{folder} lacks features of these images: start the run with one process once, which computes them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder.resolve() / LOCK, "the features in", "--teacher-cache")

    def compute(names: list[str], start: int) -> Iterator[dict[str, Tensor]]:
        loader: Iterable[Tensor] = evaluation_batches(
            images, range(start, len(images)), facts.image_size, BATCH, config.workers, bad
        )
        with Monitor("teacher", -(-len(images) // BATCH), start // BATCH) as monitor:
            for batch in loader:
                views = prepare(batch, device)
                found = {name: teacher.features(views if name == VIEW else views.flip(3)) for name in names}
                if not all(features.isfinite().all() for features in found.values()):
                    first = BATCH * monitor.done
                    raise InputError(
                        f"--teacher {facts.source} has features that are not finite, among the {BATCH} images from "
                        f"{images.file(first)} on"
                    )
                yield found
                monitor.advance()
                monitor.status(f"{monitor.done / monitor.steps:.0%}")

    shapes = dict.fromkeys(files, (len(images), facts.features))
    found = load_or_compute(files, shapes, BATCH, compute)
    return list(found.values())


class CachedFeatures:
    """Looks up the features of the views of a step.

    Args:
        rows: features [N, T] of the images and, if views are mirrored, of their mirror images.
        views: the distributions of the two views.
        sampler: this rank's (epoch, index) pairs from the run's first step on.
        device: device of the run.
    """

    def __init__(
        self, rows: Sequence[Tensor], views: tuple[ViewSpec, ViewSpec], sampler: EpochSampler, device: torch.device
    ) -> None:
        self._rows = rows
        self._views = views
        self._sampler = sampler
        self._device = device

    def __call__(self, step: int, batch: Tensor) -> Taught:
        """Features of the views of a step; `batch` is not read."""
        view, mirror = self._rows[0], self._rows[-1]
        pairs = self._sampler.batch(step)
        indices = torch.tensor([index for _, index in pairs])
        numbers = [uniform_numbers(self._sampler.seed, epoch, index) for epoch, index in pairs]
        rows = []
        for k, spec in enumerate(self._views):
            mirrored = torch.tensor([is_mirrored(spec, uniform[k]) for uniform in numbers])
            rows.append(torch.where(mirrored[:, None], mirror[indices], view[indices]))
        features = torch.cat(rows)
        if self._device.type == "cuda":
            features = features.pin_memory()  # copying from pageable memory would block
        return Taught(features.to(self._device, non_blocking=True))
