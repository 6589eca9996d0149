"""conv_moments: reads x and writes y; its gradient reads x, y and dy and writes dx, with twice the arithmetic.

The eager alternative handles each view separately: batch norm of the input, activation, gate, and a convolution with a
copied prefix of the weight. If the input has no deferred normalisation, it is the convolution alone, without the
moments of y.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.device import DEVICE
from dspnet_fast.ops import conv_moments

from .layers import (
    ACTS,
    DIRECTIONS,
    IMAGES,
    MOBILENET,
    RESNET,
    VIEWS,
    affine,
    halves,
    nbytes,
    own_prefix,
    random,
    rows,
    runner,
    variants,
    weight,
)

CASES = MOBILENET | RESNET


def eager(layer):
    def conv(x, weight, gamma, beta, gate):
        dtype = x.dtype
        if layer.act is not None:
            x = ACTS[layer.act](F.batch_norm(x, None, None, gamma, beta, True))
        if gate is not None:
            x = x * gate[:, :, None, None].to(dtype)
        y = F.conv2d(x.to(weight.dtype), weight, None, layer.stride, layer.kernel // 2, 1, layer.groups)
        return y.to(dtype)

    def views(first, second, weight, gamma, beta, first_gate, second_gate):
        return conv(first, weight, gamma, beta, first_gate), conv(second, weight, gamma, beta, second_gate)

    return views


def ours(layer, main_grad):
    geometry = layer.out_channels, layer.stride, layer.kernel // 2, layer.groups, VIEWS

    def conv(x, weight, scale, shift, gate):
        return conv_moments(x, scale, shift, layer.act or "identity", gate, weight, main_grad, *geometry)

    return conv


@pytest.mark.parametrize("variant", variants(conv_moments))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_conv_moments(measure, case, direction, variant):
    layer = CASES[case]
    x = random(IMAGES, layer.channels, layer.size, layer.size)
    x.requires_grad_(layer.channels > 3)
    full = weight(*layer.full, layer.kernel, layer.kernel)
    gate = torch.rand(IMAGES, layer.channels, device=DEVICE).requires_grad_() if layer.gated else None
    dy = random(IMAGES, layer.out_channels, layer.out_size, layer.out_size).detach()
    deferred = layer.act is not None
    if variant in ("eager", "compile"):
        gates = (None, None) if gate is None else halves(gate)
        norm = affine(layer.channels) if deferred else (None, None)
        function, grads = eager(layer), dy.chunk(VIEWS)
        inputs = *halves(x), own_prefix(full, layer), *norm, *gates
    else:
        norm = rows(layer.channels) if deferred else (None, None)
        function, inputs = ours(layer, torch.zeros_like(full)), (x, full, *norm, gate)
        grads = dy, *torch.randn(2, VIEWS, layer.out_channels, device=DEVICE) / 1e3
    run = runner(variant, direction, function, inputs, grads)
    count = footprint = nbytes(x, dy) + layer.prefix
    flops = layer.flops
    if direction != DIRECTIONS[0]:
        dx = x if x.requires_grad else None
        count, footprint = count + nbytes(x, dy, dy, dx) + 3 * layer.prefix, footprint + nbytes(dy, dx) + layer.prefix
        flops += layer.flops * (1 if dx is None else 2)
    measure("conv_moments", f"{case}, {direction}", variant, footprint, count, run, flops)
