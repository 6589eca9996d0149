"""What reaches a convolution's output through itself and through its moments, for the library's convolution."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import columns_of, load_moment_gradients, load_output_gradient
from .launch import SIZES, OutputGradient, launch, power_of_two

BLOCK_M = 64


@triton.jit(do_not_specialize=SIZES)
def output_gradient_kernel(
    dy,  # [rows, C]
    dmean,  # [views, C]
    dvariance,
    y,
    mean,
    e,
    inverse_count,
    channels,
    size,
    parts,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, _ = columns_of(channels, WIDE, BLOCK_C)
    view = program // parts
    in_view = program % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    there = in_view < size
    row = view.to(tl.int64) * size + in_view
    centre, to_mean, to_square = load_moment_gradients(
        mean, dmean, dvariance, view, column, channels, inverse_count, MOMENTS=True
    )
    valid = there[:, None] & (column < channels)[None, :]
    offsets = row[:, None] * channels + column[None, :]
    values = load_output_gradient(dy, y, centre, to_mean, to_square, offsets, valid, MOMENTS=True)
    tl.store(e + offsets, values.to(e.dtype.element_ty), mask=valid)


def output_gradient(grads: OutputGradient) -> Tensor:
    """e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt, like y; dy itself without moments."""
    views, channels = grads.mean.shape
    if not views:
        return grads.dy
    e = torch.empty_like(grads.y)
    size = grads.y.numel() // (channels * views)
    block = power_of_two(channels, 16, 128)
    parts = triton.cdiv(size, BLOCK_M)
    launch(
        output_gradient_kernel,
        views * parts * triton.cdiv(channels, block),
        *grads.pointers,
        e,
        grads.inverse_count,
        channels,
        size,
        parts,
        WIDE=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    return e
