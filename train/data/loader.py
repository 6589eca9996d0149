"""Loaders of batches, deterministic in the seed: uint8, or normalised float32 of images that are not 8-bit.

The order of epoch e is a function of (seed, e), and the views of image i in it are a function of (seed, e, i). So
neither the number of workers, nor the batch that contains an image, nor an interruption changes a bit of the views.
"""

import multiprocessing
import os
import signal
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dspnet_fast.errors import InputError

from ..run.interruption import SIGNALS, ctrl_c_waits
from ..run.options import MAX_WORKERS, SMALL_SET, Workers
from .bad_images import BadImages, Unreadable, load_or_next
from .datasets.decoders import gather_warnings, new_warnings
from .datasets.images import ImageDataset, Loaded
from .datasets.pixels import RescaledImage
from .sampler import EpochSampler
from .views.augmentation import ViewParameters, ViewSpec, check_image_size, sample_view, uniform_numbers
from .views.rescaled_views import augment_rescaled, evaluate_rescaled
from .views.torchvision_backend import augment, evaluation_view


def two_view_batches(
    images: ImageDataset,
    views: tuple[ViewSpec, ViewSpec],
    sampler: EpochSampler,
    workers: Workers = "auto",
    bad: BadImages | None = None,
) -> DataLoader:
    """Return a loader of two views of each image.

    Args:
        images: the dataset.
        views: the distributions of the two views.
        sampler: yields the (epoch, index) pairs of each batch.
        workers: as in `worker_count`.
        bad: counts images that cannot be read; each is replaced by the next readable one. By default none is allowed.

    Returns:
        A loader of uint8 [2B, C, S, S]: the first view of all B images, then the second view of all. C is 1 in a batch
        of greyscale images and 3 otherwise. Images read as another format (`pixel_options.read_as`) give normalised
        float32 batches with its channels. The memory is pinned if there is a CUDA device.

    Raises:
        InputError: while iterating, if more images are unreadable than `bad` allows, in any worker.
    """
    bad = BadImages() if bad is None else bad
    return make_loader(_Views(images, views, sampler.seed, bad.limit), sampler, worker_count(workers, len(images)), bad)


def one_view_batches(
    images: ImageDataset, view: ViewSpec, sampler: EpochSampler, workers: Workers = "auto"
) -> DataLoader:
    """Return a loader of one view of each image, [B, C, S, S].

    Every image must be readable, because labels are looked up by the sampler's indices. C, dtype, memory, errors and
    `workers` as in `two_view_batches`.
    """
    return make_loader(_Views(images, (view,), sampler.seed, limit=0), sampler, worker_count(workers, len(images)))


def evaluation_batches(
    images: ImageDataset,
    indices: Sequence[int],
    image_size: int,
    batch_size: int,
    workers: Workers = "auto",
    bad: BadImages | None = None,
) -> Iterable[torch.Tensor]:
    """Return a loader of the evaluation views of the images at `indices`, in this order, none dropped.

    A batch is [<= batch_size, C, S, S]. C, dtype, memory, errors, `workers` and `bad` as in `two_view_batches`.
    """
    bad = BadImages(report=print) if bad is None else bad
    if batch_size < 1:
        raise InputError(f"evaluation batches of {batch_size} images: give at least 1")
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    dataset = _Evaluation(images, image_size, bad.limit)
    return make_loader(dataset, batches, worker_count(workers, len(indices)), bad)


def readable_views(images: ImageDataset, image_size: int, bad: BadImages) -> tuple[torch.Tensor, list[int]]:
    """Load the evaluation views of all readable images.

    Args:
        images: the dataset.
        image_size: height and width of the views in pixels.
        bad: counts the images that cannot be read.

    Returns:
        The views [n, C, S, S], dtype as in `two_view_batches`, and the indices of their images.

    Raises:
        InputError: no image is readable, or more are unreadable than `bad` allows.
    """
    pixels, kept = [], []
    for i in range(len(images)):
        try:
            pixels.append(_evaluation(image_size, images.load(i)))
            kept.append(i)
        except InputError as error:
            bad.add([(images.file(i), str(error))])
    bad.add_warnings(new_warnings())
    if not kept:
        raise InputError(f"none of the {len(images)} images of {images.name} can be read: give another dataset")
    return _stack(pixels), kept


def worker_count(workers: Workers, n: int) -> int:
    """Return how many worker processes load n images; 0 stands for this process, "auto" is resolved as in --help."""
    if workers != "auto":
        if workers < 0:
            raise InputError(f"{workers} workers: give 0, a larger number or auto")
        return workers
    return 0 if n <= SMALL_SET else min(os.cpu_count() or 1, MAX_WORKERS)


class _WorkerError:
    """An InputError of a worker, returned as data: raising it would wrap the message into a traceback."""

    def __init__(self, message: str):
        self.message = message


class BatchDataset(Dataset[Any]):
    """A dataset that returns a whole batch for a list of items; DataLoader calls `__getitems__` if it exists."""

    def __getitems__(self, items: Sequence[Any]) -> tuple[Any, list[Unreadable], list[Unreadable]]:
        unreadable: list[Unreadable] = []
        try:
            return self.batch(items, unreadable), unreadable, new_warnings()
        except InputError as error:
            return _WorkerError(str(error)), unreadable, new_warnings()

    @abstractmethod
    def batch(self, items: Sequence[Any], unreadable: list[Unreadable]) -> Any:
        """Return the batch of these items; append unreadable images that were replaced to `unreadable`."""


class _Views(BatchDataset):
    def __init__(self, images: ImageDataset, views: tuple[ViewSpec, ...], seed: int, limit: int):
        self._images = images
        self._views = views
        self._seed = seed
        self._limit = limit

    def batch(self, items: Sequence[tuple[int, int]], unreadable: list[Unreadable]) -> torch.Tensor:
        samples = []
        for epoch, i in items:
            image = load_or_next(self._images, i, self._limit, self._images.load, unreadable)
            numbers = uniform_numbers(self._seed, epoch, i, len(self._views))
            samples.append(
                [
                    _augment(view, sample_view(view, uniform, image.height, image.width), image)
                    for view, uniform in zip(self._views, numbers, strict=True)
                ]
            )
        return _stack([pixels for view in zip(*samples, strict=True) for pixels in view])


class _Evaluation(BatchDataset):
    def __init__(self, images: ImageDataset, image_size: int, limit: int):
        check_image_size(image_size)
        self._images = images
        self._image_size = image_size
        self._limit = limit

    def batch(self, items: Sequence[int], unreadable: list[Unreadable]) -> torch.Tensor:
        load = self._images.load
        loaded = (load_or_next(self._images, int(i), self._limit, load, unreadable) for i in items)
        return _stack([_evaluation(self._image_size, image) for image in loaded])


def _augment(view: ViewSpec, parameters: ViewParameters, image: Loaded) -> torch.Tensor:
    if isinstance(image, RescaledImage):
        return augment_rescaled(view, parameters, image)
    return augment(view, parameters, image)


def _evaluation(image_size: int, image: Loaded) -> torch.Tensor:
    if isinstance(image, RescaledImage):
        return evaluate_rescaled(image_size, image)
    return evaluation_view(image_size)(image)


class _Loader(DataLoader):
    """Counts unreadable images and raises the errors of the workers.

    Workers live for one iteration, and only this generator's frame refers to them, so they end with it. Workers that
    the loader kept alive could be garbage-collected after their queues, which blocks for 5 s per worker.
    """

    bad: BadImages

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        for batch, unreadable, warned in self._start():
            self.bad.add_warnings(warned)
            self.bad.add(unreadable)
            if isinstance(batch, _WorkerError):
                raise InputError(batch.message)
            yield batch

    def _start(self) -> Iterator[Any]:
        with ctrl_c_waits():  # a worker ignores it, but only once it has started
            return super().__iter__()


def _context(workers: int) -> str | None:
    """Fork, unless DALI is loaded: a forked worker that garbage-collects a pipeline waits for threads that only the
    parent has."""
    if not workers or "nvidia.dali" not in sys.modules:
        return None
    multiprocessing.set_forkserver_preload([__name__])  # otherwise each worker imports torch, for seconds
    return "forkserver"


def make_loader(
    dataset: BatchDataset, batches: Iterable[Any], workers: int, bad: BadImages | None = None
) -> DataLoader:
    """Return a loader with a batch for each list of items; memory and errors as in `two_view_batches`.

    By default no image may be unreadable, and warnings of decoders are printed.
    """
    loader = _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context=_context(workers),
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # iterating would advance the global one
    )
    loader.bad = BadImages(report=print) if bad is None else bad
    return loader


def _identity(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    """Gather decoders' warnings, and ignore signals that terminals, torchrun and Slurm send to whole process groups.

    The run needs its workers to finish the current step before it saves.
    """
    gather_warnings()
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


def _stack(samples: list[torch.Tensor]) -> torch.Tensor:
    channels = max(pixels.shape[0] for pixels in samples)
    return torch.stack([pixels.expand(channels, -1, -1) for pixels in samples])
