"""What a training step sends from rank to rank, by count.

A ring all-reduce of n bytes among S ranks sends 2 (S - 1) / S n from each of them, and it receives as many (Patarasuk
and Yuan 2009). A step has

    gradient        one all-reduce of the flat buffers's flat gradient (in parts with --overlap-all-reduce)        4
    bytes an element
    statistics      one of all running statistics, of the online and the target network          4 bytes an element
    normalisation   where several ranks share a part of the batch (more ranks than --bn-groups): among those, two
                    all-reduces of [views, C] forward and two backward, 4 bytes an element, for every batch
                    normalisation of every sampled subnet; forward alone for those of the target

and a few numbers more, the losses and whether a rank was asked to stop, which are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dspnet_fast.models import build, family
from dspnet_fast.subnets import Subnet

from ..config import PretrainConfig
from ..distributed.batch_split import split_batch
from ..pretraining.dspnet import VIEWS, build_model
from ..pretraining.flat_buffers import FlatBuffers
from .counting import sampled_steps

BYTES = 4  # of an element: everything that is exchanged is fp32
VECTORS = 2  # of a batch normalisation in each direction: mean and variance, and their gradients


@dataclass(frozen=True)
class Traffic:
    """Of one rank in one step after the warm-up: with subnets that are drawn at random, the expected numbers.

    Attributes:
        gradient, statistics, normalisation: bytes that it sends, and as many that it receives.
        collectives: all-reduces that it waits for.
    """

    gradient: float
    statistics: float
    normalisation: float
    collectives: float

    @property
    def sent(self) -> float:
        """Bytes in all."""
        return self.gradient + self.statistics + self.normalisation


def ring(elements: float, ranks: int) -> float:
    """Bytes that each rank sends to all-reduce so many elements."""
    return 2 * (ranks - 1) / ranks * BYTES * elements


def traffic(config: PretrainConfig, ranks: int) -> Traffic:
    """What a run of this configuration sends on so many ranks; nothing on one.

    Raises InputError if ranks and parts of the batch do not divide one another.
    """
    sharing = split_batch(config, ranks).ranks_per_group
    if ranks == 1:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    with torch.device("meta"):
        model = build_model(replace(config, bn_groups=1, grad_accum_steps=1))
    elements = FlatBuffers(model.online, model.target).grads.numel()
    statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    passes, channels = _normalised(config) if sharing > 1 else (0.0, 0.0)
    return Traffic(
        gradient=ring(elements, ranks),
        statistics=ring(statistics, ranks),
        normalisation=VECTORS * ring(VIEWS * channels, sharing),
        collectives=2 + VECTORS * passes,
    )


def _normalised(config: PretrainConfig) -> tuple[float, float]:
    """Layers of batch normalisation that a step passes through, forward or backward, and their channels together."""
    made = family(config.network, config.names())
    head = [config.hidden_features]  # projector and predictor have one layer each
    trained = sampled_steps(replace(config, epochs=1, warmup_epochs=0.0, full_only_epochs=0.0), 1)
    target = _widths(config, made.full) + head
    passes, channels = float(len(target)), float(sum(target))
    for name, share in trained.items():
        online = _widths(config, made.find(name)) + 2 * head
        passes += 2 * share * len(online)
        channels += 2 * share * sum(online)
    return passes, channels


def _widths(config: PretrainConfig, subnet: Subnet) -> list[int]:
    """Channels of every batch normalisation of a subnet's encoder."""
    with torch.device("meta"):
        encoder = build(config.network, subnet, config.stem)
    return [module.num_features for module in encoder.modules() if isinstance(module, _BatchNorm)]
