"""What a network costs, from its description alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.models import build
from dspnet_fast.slim import slim
from dspnet_fast.subnets import Subnet

from ..config import FamilyOptions


@dataclass(frozen=True)
class Cost:
    """Of one network: parameters, multiply-accumulates for one image, features, all without a classifier."""

    parameters: int
    macs: int
    features: int


def cost(options: FamilyOptions, subnet: Subnet, image_size: int) -> Cost:
    """What a network of a family costs, from its description alone."""
    with torch.device("meta"):
        network = slim(build(options.network, subnet, options.stem), None)
    return Cost(parameter_count(network), mac_count(network, image_size), subnet.channels[-1])
