"""Bytes that each rank sends in a training step, counted without running it.

A ring all-reduce of n bytes among S ranks sends 2 (S - 1) / S n bytes from each rank, and each rank receives as many
(Patarasuk and Yuan 2009). A step has these all-reduces, all of fp32 values:

    gradient        the flat gradient buffer, in several pieces with --overlap-all-reduce
    statistics      the running statistics of online and target network
    normalisation   only if several ranks share a batch norm group (more ranks than --bn-groups): for each batch norm
                    layer of each sampled subnet two all-reduces of [views, C] forward and two backward, among the
                    ranks of the group; forward only for the target

The losses and the stop request are a few values more, which are not counted.
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
from .flops import expected_steps

BYTES = 4  # of an fp32 element
VECTORS = 2  # per batch norm layer and direction: mean and variance, or their gradients


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one step after the warm-up; expected values for randomly drawn subnets.

    Attributes:
        gradient: bytes of the gradient all-reduce; each rank receives as many as it sends.
        statistics: bytes of running statistics.
        normalisation: bytes of batch statistics and their gradients.
        collectives: number of blocking all-reduces.
    """

    gradient: float
    statistics: float
    normalisation: float
    collectives: float

    @property
    def sent(self) -> float:
        """Sum of all bytes."""
        return self.gradient + self.statistics + self.normalisation


def ring(elements: float, ranks: int) -> float:
    """Bytes that each of `ranks` ranks sends in a ring all-reduce of `elements` fp32 elements."""
    return 2 * (ranks - 1) / ranks * BYTES * elements


def traffic(config: PretrainConfig, ranks: int) -> Traffic:
    """Bytes that each rank of a run sends in a step; 0 with one rank.

    Args:
        config: configuration of the run.
        ranks: number of ranks.

    Raises:
        InputError: if the batch cannot be split among so many ranks with `config.bn_groups`.
    """
    ranks_per_group = split_batch(config, ranks).ranks_per_group
    if ranks == 1:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    with torch.device("meta"):
        model = build_model(replace(config, bn_groups=1, grad_accum_steps=1))
    elements = FlatBuffers(model.online, model.target).grads.numel()
    statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    passes, channels = _batch_norm_passes(config) if ranks_per_group > 1 else (0.0, 0.0)
    return Traffic(
        gradient=ring(elements, ranks),
        statistics=ring(statistics, ranks),
        normalisation=VECTORS * ring(VIEWS * channels, ranks_per_group),
        collectives=2 + VECTORS * passes,
    )


def _batch_norm_passes(config: PretrainConfig) -> tuple[float, float]:
    """Forward and backward passes through batch norm layers in a step, and the sum of their channels."""
    subnets = family(config.network, config.names())
    head = [config.hidden_features]  # every head has one layer
    regresses = config.teacher_features is None or config.self_weight > 0
    heads = 2 * head if regresses else []
    if config.teacher_features is not None:
        heads = [*heads, config.teacher_features]
    if config.local_weight:
        heads = [*heads, config.teacher_map_channels or 0]
    trained = expected_steps(replace(config, epochs=1, warmup_epochs=0.0, full_only_epochs=0.0), 1)
    target = _batch_norm_channels(config, subnets.full) + head if regresses else []
    passes, channels = float(len(target)), float(sum(target))
    for name, share in trained.items():
        online = _batch_norm_channels(config, subnets.find(name)) + heads
        passes += 2 * share * len(online)
        channels += 2 * share * sum(online)
    return passes, channels


def _batch_norm_channels(config: PretrainConfig, subnet: Subnet) -> list[int]:
    with torch.device("meta"):
        encoder = build(config.network, subnet, config.stem)
    return [module.num_features for module in encoder.modules() if isinstance(module, _BatchNorm)]
