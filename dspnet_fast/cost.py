"""Parameters and multiply-accumulates of a network."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .models import image_channels


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def mac_count(model: nn.Module, image_size: int) -> int:
    """Count the multiply-accumulates of convolutions and matrix products for one image.

    Args:
        model: a network of images; not changed.
        image_size: height and width of the image [1, C, image_size, image_size]; C is 3 for others than our networks.

    Returns:
        The number of multiply-accumulates.

    Example:
        >>> mac_count(nn.Conv2d(3, 8, 1), image_size=10)
        2400
    """
    meta_copy = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        meta_copy(torch.zeros(1, image_channels(model), image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2


def largest_activation(model: nn.Module, image_size: int) -> int:
    """Number of elements of the largest output of a layer for one image; arguments as of `mac_count`.

    Example:
        >>> largest_activation(nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(2)), image_size=10)
        800
    """
    meta_copy = copy.deepcopy(model).to("meta").eval()
    sizes = [0]
    for module in meta_copy.modules():
        module.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    with torch.no_grad():
        meta_copy(torch.zeros(1, image_channels(model), image_size, image_size, device="meta"))
    return max(sizes)
