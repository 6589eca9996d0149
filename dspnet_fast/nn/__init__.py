"""Slimmable replacements of torch.nn layers, with the same constructor arguments, state_dict names and shapes.

A layer computes with a prefix of its channels. `activate` sets the number of output channels; the number of input
channels is taken from the input.
"""

from .activate import ActiveSubnet, activate
from .batch_norm import (
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    SlimBatchNorm1d,
    SlimBatchNorm2d,
    configure_batch_norm,
)
from .conv import SlimConv2d
from .convert import slimmable
from .fused import fused
from .linear import SlimLinear
from .sequential import SlimSequential

__all__ = [
    "ActiveSubnet",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "SlimBatchNorm1d",
    "SlimBatchNorm2d",
    "SlimConv2d",
    "SlimLinear",
    "SlimSequential",
    "activate",
    "configure_batch_norm",
    "fused",
    "slimmable",
]
