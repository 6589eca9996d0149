"""Batches of bytes from a set of images, in an order and with views that depend on nothing but the seed.

Epoch e's order is a function of (seed, e), and the views of image i in it are a function of (seed, e, i). So the number
of workers, the batch an image falls into and an interruption change no bit of what a network sees.
"""

import functools
import hashlib
import os
import signal
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dspnet_fast.errors import InputError

from .augment import View, ViewSpec, build, evaluation_view
from .images import ImageSet

# ImageNet's, of RGB values from 0 to 1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

FEW_IMAGES = 256  # up to here starting workers costs more than they save

Workers = int | Literal["auto"]


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) from step `start_step` to the end of the last epoch.

    Each epoch is a new permutation of n images, less the last n % batch_size of it. Starting in the middle costs one
    permutation and gives what an uninterrupted run would have seen from there. InputError if a batch exceeds the set.
    """

    def __init__(self, n: int, batch_size: int, seed: int, epochs: int, start_step: int = 0):
        if not 1 <= batch_size <= n:
            raise InputError(f"a batch of {batch_size} from a set of {n} images: give a batch size from 1 to {n}")
        self.steps_per_epoch = n // batch_size
        self.seed = seed
        self._n = n
        self._batch_size = batch_size
        self._steps = range(start_step, epochs * self.steps_per_epoch)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = None
        for step in self._steps:
            epoch, within = divmod(step, self.steps_per_epoch)
            if order is None or within == 0:
                order = torch.randperm(self._n, generator=torch.Generator().manual_seed(_mix(self.seed, epoch)))
            batch = order[within * self._batch_size : (within + 1) * self._batch_size]
            yield [(epoch, i) for i in batch.tolist()]


def two_view_batches(
    images: ImageSet, views: tuple[ViewSpec, ViewSpec], order: EpochOrder, workers: Workers = "auto"
) -> DataLoader:
    """A loader over all of `order`: uint8 [2B, C, S, S], first view of all B images, then second view of all.

    C is 1 in a batch of greyscale images and 3 otherwise. The memory is pinned if there is a CUDA device. An image
    that cannot be read raises InputError here, whichever process met it. `workers` as in `worker_count`.
    """
    dataset = _TwoViews(images, tuple(build(view) for view in views), order.seed)
    return _loader(dataset, order, worker_count(workers, len(images)))


def evaluation_batches(
    images: ImageSet, indices: Sequence[int], image_size: int, batch_size: int, workers: Workers = "auto"
) -> Iterable[torch.Tensor]:
    """uint8 [<= batch_size, C, S, S]: the evaluation view of the images at `indices`, in their order, none dropped.

    C, memory, errors and `workers` as in `two_view_batches`.
    """
    if batch_size < 1:
        raise InputError(f"evaluation batches of {batch_size} images: give at least 1")
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return _loader(_Evaluation(images, evaluation_view(image_size)), batches, worker_count(workers, len(indices)))


def worker_count(workers: Workers, n: int) -> int:
    """The processes that load n images: as many as given, 0 being this one; "auto" is one per CPU, 8 at most."""
    if workers != "auto":
        if workers < 0:
            raise InputError(f"{workers} workers: give 0, a larger number or auto")
        return workers
    return 0 if n <= FEW_IMAGES else min(os.cpu_count() or 1, 8)


def normalize(
    batch: torch.Tensor,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """uint8 [N, 1 or 3, H, W] to `dtype` [N, 3, H, W] on the same device: (value / 255 - mean) / std, in float32."""
    if batch.dtype != torch.uint8:
        raise TypeError(f"normalize expects bytes (uint8), not {batch.dtype}")
    scale, shift = _scale_and_shift(mean, std, batch.device)
    # bytes are the cheapest form to reorder in; one channel becomes three by broadcasting
    values = batch.contiguous(memory_format=memory_format).float()
    return torch.addcmul(shift, values, scale).to(dtype=dtype, memory_format=memory_format)


@functools.lru_cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept, because bringing them to a GPU makes the host wait for it."""
    centre = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    return (1 / (255 * spread)).float().to(device), (-centre / spread).float().to(device)


class _Refused:
    """An InputError on its way out of a worker: raised there, its message would arrive wrapped into a traceback."""

    def __init__(self, message: str):
        self.message = message


class _Batches(Dataset[Any]):
    """Makes a whole batch from a sampler's list, which DataLoader asks for under the name __getitems__."""

    def __getitems__(self, items: Sequence[Any]) -> torch.Tensor | _Refused:
        try:
            return self.batch(items)
        except InputError as error:
            return _Refused(str(error))

    @abstractmethod
    def batch(self, items: Sequence[Any]) -> torch.Tensor: ...


class _TwoViews(_Batches):
    def __init__(self, images: ImageSet, views: tuple[View, ...], seed: int):
        self._images = images
        self._views = views
        self._seed = seed

    def batch(self, items: Sequence[tuple[int, int]]) -> torch.Tensor:
        generator = torch.default_generator  # torch.manual_seed would reseed the GPU's as well
        state = generator.get_state()
        samples = []
        try:
            for epoch, i in items:
                image = self._images.load(i)
                generator.manual_seed(_mix(self._seed, epoch, i))
                samples.append([view(image) for view in self._views])
        finally:
            generator.set_state(state)
        return _stack([pixels for view in zip(*samples, strict=True) for pixels in view])


class _Evaluation(_Batches):
    def __init__(self, images: ImageSet, view: View):
        self._images = images
        self._view = view

    def batch(self, items: Sequence[int]) -> torch.Tensor:
        return _stack([self._view(self._images.load(int(i))) for i in items])


class _Loader(DataLoader):
    """Raises what its workers refused.

    Workers live as long as one iteration. Only this generator's stack refers to them, so that they end with it: those
    kept by a loader may be left to the garbage collector, which closes their queues first and then waits 5 s for each.
    """

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, _Refused):
                raise InputError(batch.message)
            yield batch


def _loader(dataset: _Batches, batches: Iterable[Any], workers: int) -> DataLoader:
    return _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # else starting to iterate would draw from the global one
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one ends its workers, and only it should speak."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stack(samples: list[torch.Tensor]) -> torch.Tensor:
    channels = max(pixels.shape[0] for pixels in samples)
    return torch.stack([pixels.expand(channels, -1, -1) for pixels in samples])


def _mix(*numbers: int) -> int:
    """64 bits that look random, the same on every machine. torch's CPU generator uses the lower 32 of a seed only, so
    neighbouring epochs and indices must be spread over them."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
