"""Online and target networks whose parameters the update operators are timed on."""

from __future__ import annotations

import functools

from benchmarks.device import DEVICE
from dspnet_fast.models import family
from train.pretraining.dspnet import DSPNet

CASES = {"MobileNetV3-Large": ("mobilenet_v3_large", "w1.00"), "ResNet-18": ("resnet", "c64-d2222")}


@functools.cache
def networks(case: str) -> DSPNet:
    """A model with one network and the paper's heads."""
    network, dn = CASES[case]
    return DSPNet(network, family(network, [dn])).to(DEVICE)
