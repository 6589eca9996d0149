"""The gradient of a convolution's output, including that of its moments, for cuDNN's convolutions.

    e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt

Bound by memory: dy and y are read once, e is written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import load_moment_gradients, load_output_gradient, program_columns, row_tile
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
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    view = program // parts
    center, mean_term, variance_factor = load_moment_gradients(
        mean, dmean, dvariance, view, column, channels, inverse_count, MOMENTS=True
    )
    _, valid, offsets = row_tile(program % parts * BLOCK_M, size, view, column, inside, channels, BLOCK_M)
    gradient = load_output_gradient(dy, y, center, mean_term, variance_factor, offsets, valid, MOMENTS=True)
    tl.store(e + offsets, gradient.to(e.dtype.element_ty), mask=valid)


def output_gradient(grads: OutputGradient) -> Tensor:
    """e, like y; dy itself without moments."""
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
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    return e
