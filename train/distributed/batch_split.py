"""How a batch is split: over ranks, into micro-batches, and into ghost-batch-norm groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.subnets import Subnet

from ..config import PretrainConfig
from ..pretraining.dspnet import VIEWS, Taught

# Adds the gradients of the subnets' losses on a batch of views [2B, ...] and, if there is a teacher, its targets;
# returns the losses.
Accumulate = Callable[[Tensor, Sequence[Subnet], Taught | None], dict[str, Tensor]]


@dataclass(frozen=True)
class BatchSplit:
    """The split of a batch on one rank.

    Attributes:
        micro_batches: consecutive pieces of the rank's share of the batch (gradient accumulation).
        bn_groups: ghost-batch-norm groups of a micro-batch, each normalised with its own statistics.
        ranks_per_group: ranks that share one group and synchronise its statistics (synchronised batch norm).
    """

    micro_batches: int
    bn_groups: int
    ranks_per_group: int

    def split(self, batch: Tensor) -> Iterator[Tensor]:
        """Micro-batches of two views [2B, ...] (view 1 of all images, then view 2), each [2B / micro_batches, ...].

        Raises InputError if B is not a multiple of the number of micro-batches.
        """
        if self.micro_batches == 1:
            yield batch
            return
        images, remainder = divmod(len(batch), VIEWS * self.micro_batches)
        if remainder:
            raise InputError(
                f"{len(batch) // VIEWS} images per rank for --grad-accum-steps {self.micro_batches}: give a divisor"
            )
        views = batch.unflatten(0, (VIEWS, self.micro_batches, images))
        for index in range(self.micro_batches):
            yield views[:, index].flatten(0, 1)

    def split_taught(self, taught: Taught | None) -> Iterator[Taught | None]:
        """A teacher's targets of the micro-batches; None for each without a teacher."""
        if taught is None:
            yield from repeat(None, self.micro_batches)
            return
        parts = (repeat(None) if tensor is None else self.split(tensor) for tensor in taught)
        for features, positions in zip(*parts, strict=False):
            yield Taught(features, positions)

    def over_micro_batches(self, accumulate: Accumulate, statistics: Tensor) -> Accumulate:
        """`accumulate` over the micro-batches of a batch, treated as ranks are.

        Gradients add up. Losses are the mean over micro-batches. Each micro-batch starts from the same running
        statistics (flat, updated in place), of whose results the mean is kept.
        """
        if self.micro_batches == 1:
            return accumulate

        def accumulate_all(batch: Tensor, subnets: Sequence[Subnet], taught: Taught | None) -> dict[str, Tensor]:
            before, total = statistics.clone(), torch.zeros_like(statistics)
            mean: dict[str, Tensor] = {}
            for micro_batch, part in zip(self.split(batch), self.split_taught(taught), strict=True):
                statistics.copy_(before)
                losses = accumulate(micro_batch, subnets, part)
                mean = {name: mean.get(name, 0) + loss / self.micro_batches for name, loss in losses.items()}
                total.add_(statistics, alpha=1 / self.micro_batches)
            statistics.copy_(total)
            return mean

        return accumulate_all


def split_batch(config: PretrainConfig, world_size: int) -> BatchSplit:
    """The split of a run's batches on `world_size` ranks. By default every micro-batch of every rank is a group.

    Raises InputError if --bn-groups is incompatible with the number of ranks and micro-batches, or if a group has a
    single image on a rank.
    """
    micro_batches, shares = config.grad_accum_steps, config.grad_accum_steps * world_size
    groups = config.bn_groups or shares
    if config.batch_size // max(shares, groups) < 2:
        raise InputError(
            f"--batch-size {config.batch_size} in {max(shares, groups)} parts: batch normalisation needs at least two "
            f"images in each; give at least {2 * max(shares, groups)}, or fewer --bn-groups or --grad-accum-steps"
        )
    if groups % shares == 0:
        return BatchSplit(micro_batches, groups // shares, 1)
    if micro_batches == 1 and world_size % groups == 0:
        return BatchSplit(micro_batches, 1, world_size // groups)
    raise InputError(
        f"--bn-groups {groups} does not fit {world_size} ranks"
        + (f" with --grad-accum-steps {micro_batches}" if micro_batches > 1 else "")
        + f": give a multiple of {shares}"
        + (", or a divisor of the number of ranks" if micro_batches == 1 else "")
    )
