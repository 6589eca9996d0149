"""Batches of bytes from a set of images, in an order and with views that depend on nothing but the seed.

Epoch e's order is a function of (seed, e), and the views of image i in it are a function of (seed, e, i). So the number
of workers, the batch an image falls into and an interruption change no bit of what a network sees.
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

from ..config import MAX_WORKERS, SMALL_SET, Workers
from .bad_images import BadImages, Refusal, load_or_next
from .datasets.images import ImageSet
from .sampler import EpochSampler
from .views.augmentation import ViewSpec, draw, numbers
from .views.torchvision_backend import View, augment, evaluation_view


def two_view_batches(
    images: ImageSet,
    views: tuple[ViewSpec, ViewSpec],
    order: EpochSampler,
    workers: Workers = "auto",
    bad: BadImages | None = None,
) -> DataLoader:
    """A loader over all of `order`: uint8 [2B, C, S, S], first view of all B images, then second view of all.

    C is 1 in a batch of greyscale images and 3 otherwise. The memory is pinned if there is a CUDA device. An image
    that cannot be read is replaced and counted in `bad`, by default none is allowed; one too many raises InputError
    here, whichever process met it. `workers` as in `worker_count`.
    """
    bad = BadImages() if bad is None else bad
    return make_loader(_Views(images, views, order.seed, bad.limit), order, worker_count(workers, len(images)), bad)


def one_view_batches(images: ImageSet, view: ViewSpec, order: EpochSampler, workers: Workers = "auto") -> DataLoader:
    """A loader over all of `order`: uint8 [B, C, S, S], one view of each image.

    No image may be unreadable, because labels follow the order. C, memory, errors and `workers` as in
    `two_view_batches`.
    """
    bad = BadImages()
    return make_loader(_Views(images, (view,), order.seed, bad.limit), order, worker_count(workers, len(images)), bad)


def evaluation_batches(
    images: ImageSet, indices: Sequence[int], image_size: int, batch_size: int, workers: Workers = "auto"
) -> Iterable[torch.Tensor]:
    """uint8 [<= batch_size, C, S, S]: the evaluation view of the images at `indices`, in their order, none dropped.

    C, memory, errors and `workers` as in `two_view_batches`.
    """
    if batch_size < 1:
        raise InputError(f"evaluation batches of {batch_size} images: give at least 1")
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    dataset = _Evaluation(images, evaluation_view(image_size))
    return make_loader(dataset, batches, worker_count(workers, len(indices)), BadImages())


def readable_views(images: ImageSet, image_size: int, bad: BadImages) -> tuple[torch.Tensor, list[int]]:
    """Evaluation views uint8 [n, C, S, S] of those images that can be read, the others counted in `bad`; their indices.

    InputError if there are none, or one bad image too many.
    """
    view, pixels, kept = evaluation_view(image_size), [], []
    for i in range(len(images)):
        try:
            pixels.append(view(images.load(i)))
            kept.append(i)
        except InputError as error:
            bad.note([(images.file(i), str(error))])
    if not kept:
        raise InputError(f"of {len(images)} images of {images.name} none can be read")
    return _stack(pixels), kept


def worker_count(workers: Workers, n: int) -> int:
    """The processes that load n images: as many as given, 0 being this one; "auto" as WORKERS_HELP says."""
    if workers != "auto":
        if workers < 0:
            raise InputError(f"{workers} workers: give 0, a larger number or auto")
        return workers
    return 0 if n <= SMALL_SET else min(os.cpu_count() or 1, MAX_WORKERS)


class _Refused:
    """An InputError on its way out of a worker: raised there, its message would arrive wrapped into a traceback."""

    def __init__(self, message: str):
        self.message = message


class Batches(Dataset[Any]):
    """Makes a whole batch from a sampler's list, which DataLoader asks for under the name __getitems__."""

    def __getitems__(self, items: Sequence[Any]) -> tuple[Any, list[Refusal]]:
        refusals: list[Refusal] = []
        try:
            return self.batch(items, refusals), refusals
        except InputError as error:
            return _Refused(str(error)), refusals

    @abstractmethod
    def batch(self, items: Sequence[Any], refusals: list[Refusal]) -> Any: ...


class _Views(Batches):
    def __init__(self, images: ImageSet, views: tuple[ViewSpec, ...], seed: int, limit: int):
        self._images = images
        self._views = views
        self._seed = seed
        self._limit = limit

    def batch(self, items: Sequence[tuple[int, int]], refusals: list[Refusal]) -> torch.Tensor:
        samples = []
        for epoch, i in items:
            image = load_or_next(self._images, i, self._limit, self._images.load, refusals)
            drawn = numbers(self._seed, epoch, i, len(self._views))
            samples.append(
                [
                    augment(view, draw(view, uniform, image.height, image.width), image)
                    for view, uniform in zip(self._views, drawn, strict=True)
                ]
            )
        return _stack([pixels for view in zip(*samples, strict=True) for pixels in view])


class _Evaluation(Batches):
    def __init__(self, images: ImageSet, view: View):
        self._images = images
        self._view = view

    def batch(self, items: Sequence[int], refusals: list[Refusal]) -> torch.Tensor:
        return _stack([self._view(self._images.load(int(i))) for i in items])


class _Loader(DataLoader):
    """Counts what its workers left out, and raises what they refused.

    Workers live as long as one iteration. Only this generator's stack refers to them, so that they end with it: those
    kept by a loader may be left to the garbage collector, which closes their queues first and then waits 5 s for each.
    """

    bad: BadImages

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        for batch, refusals in super().__iter__():
            self.bad.note(refusals)
            if isinstance(batch, _Refused):
                raise InputError(batch.message)
            yield batch


def _context(workers: int) -> str | None:
    """Fork, but not where DALI is in use: a worker that collects one of its pipelines as garbage waits for threads that
    only this process has."""
    if not workers or "nvidia.dali" not in sys.modules:
        return None
    multiprocessing.set_forkserver_preload([__name__])  # else each worker takes seconds to import torch for itself
    return "forkserver"


def make_loader(dataset: Batches, batches: Iterable[Any], workers: int, bad: BadImages) -> DataLoader:
    """A loader of what the dataset makes of each list of items; memory and errors as in `two_view_batches`."""
    loader = _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context=_context(workers),
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_run,
        generator=torch.Generator(),  # else starting to iterate would draw from the global one
    )
    loader.bad = bad
    return loader


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and torchrun and Slurm signal whole process groups and jobs. But only
    the run knows when to stop: a worker that was gone before would keep it from finishing its step and saving."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _stack(samples: list[torch.Tensor]) -> torch.Tensor:
    channels = max(pixels.shape[0] for pixels in samples)
    return torch.stack([pixels.expand(channels, -1, -1) for pixels in samples])
