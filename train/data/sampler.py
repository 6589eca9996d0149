"""The order of the images: a function of the seed and the step."""

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from dspnet_fast.errors import InputError


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Yields batches of (epoch, index) from step `start_step` to the end of the last epoch.

    Each epoch is a new permutation of n images without its last n % batch_size elements. A run that resumes at
    `start_step` sees the batches of an uninterrupted run. The ranks split the batch that a single rank would see.

    Args:
        n: images of the dataset.
        batch_size: images of a step, over all ranks.
        seed: of the permutations.
        epochs: of the run.
        start_step: the first step to yield.
        rank: of this process.
        world_size: number of ranks.
        steps: of the run, in place of `epochs` epochs.

    Raises:
        InputError: the batch is larger than the dataset or not a multiple of the number of ranks.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        epochs: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        steps: int | None = None,
    ):
        if not 1 <= batch_size <= n:
            raise InputError(f"a batch of {batch_size} from a set of {n} images: give a --batch-size of at most {n}")
        if batch_size % world_size:
            raise InputError(f"a batch of {batch_size} images for {world_size} ranks: give a multiple of {world_size}")
        self.steps_per_epoch = n // batch_size
        self.seed = seed
        self._n = n
        self._batch_size = batch_size
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self._steps = range(start_step, epochs * self.steps_per_epoch if steps is None else steps)
        self._order: tuple[int, torch.Tensor] | None = None

    @property
    def images_per_step(self) -> int:
        """Images per step on this rank."""
        return self._share.stop - self._share.start

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            yield self.batch(step)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The batch of a step; the order of the last epoch that was asked for is kept."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._order = epoch, torch.randperm(self._n, generator=generator)
        batch = self._order[1][within * self._batch_size : (within + 1) * self._batch_size]
        return [(epoch, i) for i in batch[self._share].tolist()]


def mix(*numbers: int) -> int:
    """Hash integers to 64 bits, the same on every machine.

    torch's CPU generator uses only the lower 32 bits of a seed, so neighbouring epochs and indices must be hashed.
    """
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
