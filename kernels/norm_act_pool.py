"""norm_act_pool: the means over positions of act(z), act'(z) and act'(z) x, z = scale x + shift.

Bound by memory: x is read once, by a program per image and block of channels. From these means, the gradients of scale
and shift are sums over images. The gradient of x is norm_act's, of a gradient that is the same for all positions of an
image; it reads x again and writes dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import activation_gradient, apply_activation, load_row, normalized, program_columns, row_tile
from .launch import SIZES, Input, accepts_dtype, channels_last, contiguous, launch, power_of_two
from .norm_act import materialize_backward
from .sums import blocks


@triton.jit(do_not_specialize=SIZES)
def norm_act_pool_kernel(
    x,  # [N, positions, C]
    scale,  # [scale_rows, C]
    shift,
    mean,  # [N, C]
    gradient_mean,
    gradient_x_mean,
    channels,
    positions,
    images,
    scale_rows,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GRADIENT_MEANS: tl.constexpr,
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, image, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    factor, offset = load_row(scale, shift, image * scale_rows // images, column, inside, channels, DEFERRED)
    total = tl.zeros((BLOCK_C,), tl.float32)
    gradient_total = tl.zeros((BLOCK_C,), tl.float32)
    gradient_x_total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, positions, BLOCK_M):
        _, valid, offsets = row_tile(first, positions, image, column, inside, channels, BLOCK_M)
        values = tl.load(x + offsets, mask=valid, other=0.0)
        z = normalized(values, factor, offset, DEFERRED)
        total += tl.sum(tl.where(valid, apply_activation(z, ACT), 0.0), 0)
        if GRADIENT_MEANS:
            gradient = tl.where(valid, activation_gradient(z, ACT), 0.0)
            gradient_total += tl.sum(gradient, 0)
            gradient_x_total += tl.sum(gradient * values.to(tl.float32), 0)
    to = image * channels + column
    tl.store(mean + to, total / positions, mask=inside)
    if GRADIENT_MEANS:
        tl.store(gradient_mean + to, gradient_total / positions, mask=inside)
        tl.store(gradient_x_mean + to, gradient_x_total / positions, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def norm_act_pool_sums_kernel(
    grad,  # [N, C]
    gradient_mean,
    gradient_x_mean,
    dscale,  # [scale_rows, C]
    dshift,
    channels,
    images,  # of a row of scale and shift
    VECTORIZED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, row, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    scale_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    shift_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, images, BLOCK_P):
        image = first + tl.arange(0, BLOCK_P)
        valid = (image < images)[:, None] & inside[None, :]
        offsets = (row * images + image).to(tl.int64)[:, None] * channels + column[None, :]
        of_mean = tl.load(grad + offsets, mask=valid, other=0.0)
        scale_sum += of_mean * tl.load(gradient_x_mean + offsets, mask=valid, other=0.0)
        shift_sum += of_mean * tl.load(gradient_mean + offsets, mask=valid, other=0.0)
    tl.store(dscale + row * channels + column, tl.sum(scale_sum, 0), mask=inside)
    tl.store(dshift + row * channels + column, tl.sum(shift_sum, 0), mask=inside)


def norm_act_pool(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, gradient_means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.norm_act_pool, for valid arguments that `accepts` supports."""
    x = channels_last(x)
    scale, shift = contiguous(scale, shift)
    images, channels = x.shape[:2]
    mean = x.new_empty(images, channels, dtype=torch.float32)
    sizes = (images, channels) if gradient_means else (0,)
    gradient_mean, gradient_x_mean = (x.new_empty(sizes, dtype=torch.float32) for _ in range(2))
    positions, block = x.shape[2] * x.shape[3], power_of_two(channels, 16, 64)
    launch(
        norm_act_pool_kernel,
        images * triton.cdiv(channels, block),
        x,
        x if scale is None else scale,
        x if shift is None else shift,
        mean,
        gradient_mean,
        gradient_x_mean,
        channels,
        positions,
        images,
        1 if scale is None else len(scale),
        ACT=act,
        DEFERRED=scale is not None,
        GRADIENT_MEANS=gradient_means,
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=power_of_two(positions, 16, 64),
        BLOCK_C=block,
    )
    return mean, gradient_mean, gradient_x_mean


def norm_act_pool_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gradient_mean: Tensor,
    gradient_x_mean: Tensor,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.norm_act_pool_backward, for valid arguments that `accepts` supports."""
    grad, dx = grad.contiguous(), x.new_empty(0)
    if input_gradient:
        dx, _, _ = materialize_backward(grad, Input.of(x, scale, shift, act, None))
    if scale is None:
        return dx, grad.new_empty(0), grad.new_empty(0)
    rows, channels = scale.shape
    dscale, dshift = (grad.new_empty(rows, channels) for _ in range(2))
    block_p, block_c = blocks(len(x) // rows)
    launch(
        norm_act_pool_sums_kernel,
        rows * triton.cdiv(channels, block_c),
        grad,
        gradient_mean.contiguous(),
        gradient_x_mean.contiguous(),
        dscale,
        dshift,
        channels,
        len(x) // rows,
        VECTORIZED=channels % 8 == 0,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )
    return dx, dscale, dshift


def accepts(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels support x: (True, "") or (False, reason)."""
    return accepts_dtype(x)
