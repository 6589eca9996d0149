"""slim_conv2d: a convolution with a prefix of the weight, on both views as one batch. The training step does not use
it; weights have the dtype of activations."""

import pytest
import torch
import torch.nn.functional as F

from dspnet_fast.ops import slim_conv2d

from .layers import DIRECTIONS, IMAGES, MOBILENET, RESNET, nbytes, own_prefix, random, runner, variants

NAMES = [name for name in MOBILENET if name.startswith(("stem", "1.1", "4.1 depthwise"))]
CASES = {name: MOBILENET[name] for name in NAMES} | RESNET


def eager(layer):
    def conv(x, weight):
        y = F.conv2d(x.to(weight.dtype), weight, None, layer.stride, layer.kernel // 2, 1, layer.groups)
        return y.to(x.dtype)

    return conv


def ours(layer, main_grad):
    stride, padding = 2 * [layer.stride], 2 * [layer.kernel // 2]

    def conv(x, weight):
        return slim_conv2d(x, weight, None, main_grad, layer.out_channels, stride, padding, [1, 1], layer.groups)

    return conv


@pytest.mark.parametrize("variant", variants(slim_conv2d))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_slim_conv2d(measure, case, direction, variant):
    layer = CASES[case]
    x = random(IMAGES, layer.channels, layer.size, layer.size)
    x.requires_grad_(layer.channels > 3)
    full = random(*layer.full, layer.kernel, layer.kernel)
    dy = random(IMAGES, layer.out_channels, layer.out_size, layer.out_size).detach()
    if variant in ("eager", "compile"):
        function, inputs = eager(layer), (x, own_prefix(full, layer))
    else:
        function, inputs = ours(layer, torch.zeros_like(full)), (x, full)
    run = runner(variant, direction, function, inputs, (dy,))
    count = footprint = nbytes(x, dy) + layer.prefix
    flops = layer.flops
    if direction != DIRECTIONS[0]:
        dx = x if x.requires_grad else None
        count, footprint = count + nbytes(x, dy, dx) + 3 * layer.prefix, footprint + nbytes(dy, dx) + layer.prefix
        flops += layer.flops * (1 if dx is None else 2)
    measure("slim_conv2d", f"{case}, {direction}", variant, footprint, count, run, flops)
