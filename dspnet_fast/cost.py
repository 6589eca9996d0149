"""What a network costs: parameters and multiply-accumulates."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def mac_count(model: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image [3, image_size, image_size]."""
    ghost = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        ghost(torch.zeros(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2
