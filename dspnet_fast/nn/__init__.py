"""Slimmable drop-ins for torch.nn layers: same constructor arguments, same state_dict names and shapes.

A layer computes with a prefix of its channels. How long the prefix of the *outputs* is, `activate` sets;
how long the prefix of the *inputs* is, the input itself says.
"""

from .activate import ActiveSubnet, activate
from .batch_norm import MomentumBatchNorm1d, MomentumBatchNorm2d, SlimBatchNorm1d, SlimBatchNorm2d
from .conv import SlimConv2d
from .convert import slimmable
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
    "slimmable",
]
