"""How a batch is divided: among ranks, into turns that a rank takes, into parts that are normalised by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dspnet_fast.errors import InputError

from ..config import PretrainConfig
from ..pretraining.dspnet import VIEWS
from .process_group import World


@dataclass(frozen=True)
class BatchSplit:
    """turns: into which a rank divides its share of the batch, one after the other. parts: of what it sees in a turn,
    each normalised by itself. ranks_per_part: more than 1 where ranks share a part and synchronise its moments."""

    turns: int
    parts: int
    ranks_per_part: int

    def of(self, batch: Tensor) -> Iterator[Tensor]:
        """The turns of two views [2B, ...], view 1 of all images and then view 2: each two views of B / turns images.

        Raises InputError if B is no multiple of the turns.
        """
        if self.turns == 1:
            yield batch
            return
        images, rest = divmod(len(batch), VIEWS * self.turns)
        if rest:
            raise InputError(
                f"{len(batch) // VIEWS} images for --grad-accum-steps {self.turns}: give a divisor of them"
            )
        views = batch.unflatten(0, (VIEWS, self.turns, images))
        for turn in range(self.turns):
            yield views[:, turn].flatten(0, 1)


def divide(config: PretrainConfig, ranks: World) -> BatchSplit:
    """How a run's batches are divided on these ranks. By default each turn of each rank is a part.

    InputError if --bn-groups cannot be had on so many ranks and turns.
    """
    turns, shares = config.grad_accum_steps, config.grad_accum_steps * ranks.size
    groups = config.bn_groups or shares
    if groups % shares == 0:
        return BatchSplit(turns, groups // shares, 1)
    if turns == 1 and ranks.size % groups == 0:
        return BatchSplit(turns, 1, ranks.size // groups)
    raise InputError(
        f"the batch is normalised in {groups} parts, which {ranks.size} ranks"
        + (f" in {turns} turns (--grad-accum-steps)" if turns > 1 else "")
        + " cannot share: start as many ranks as divide it, or are a multiple of it"
    )
