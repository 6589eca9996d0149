"""slim_batch_norm: y = (x - mean) r weight + bias with the moments of each view, r = rsqrt(variance + eps).

    dx = weight r dy + (dmean - weight r dbias) / cnt + 2 (x - mean) (dvariance - weight r^2 dweight / 2) / cnt

Bound by memory: forward reads x twice and writes y; backward reads x and dy twice and writes dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import program_columns, row_tile, store_sums
from .launch import SIZES, Rows, accepts_dtype, contiguous, launch, partial_sums, power_of_two
from .moments import Norm, merge_moments, moments_of_rows
from .norm_act import norm_act
from .sums import sums

BLOCK_M = 64


@triton.jit(do_not_specialize=SIZES)
def slim_batch_norm_sums_kernel(
    grad,  # [rows, C]
    x,
    mean,  # [views, C]
    partial,  # [2, programs, C]: sums of dy (x - mean) and of dy
    channels,
    size,
    parts,
    tiles,
    programs,
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    view = program // parts
    center = tl.load(mean + view * channels + column, mask=inside, other=0.0)[None, :]
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        _, valid, offsets = row_tile(first, size, view, column, inside, channels, BLOCK_M)
        dy = tl.load(grad + offsets, mask=valid, other=0.0).to(tl.float32)
        dweight += tl.sum(dy * (tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32) - center), 0)
        dbias += tl.sum(dy, 0)
    store_sums(partial, program, programs, channels, column, dweight, dbias)


@triton.jit(do_not_specialize=SIZES)
def slim_batch_norm_input_gradient_kernel(
    grad,  # [rows, C]
    x,
    mean,  # [views, C]
    scale,
    mean_term,
    variance_factor,
    dx,
    channels,
    size,
    parts,
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    view = program // parts
    view_offsets = view * channels + column
    _, valid, offsets = row_tile(program % parts * BLOCK_M, size, view, column, inside, channels, BLOCK_M)
    dy = tl.load(grad + offsets, mask=valid, other=0.0).to(tl.float32)
    centered = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    centered -= tl.load(mean + view_offsets, mask=inside, other=0.0)[None, :]
    result = dy * tl.load(scale + view_offsets, mask=inside, other=0.0)[None, :]
    result += tl.load(mean_term + view_offsets, mask=inside, other=0.0)[None, :]
    result += centered * tl.load(variance_factor + view_offsets, mask=inside, other=0.0)[None, :]
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=valid)


def slim_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.slim_batch_norm, for valid arguments that `accepts` supports."""
    norm = Norm(*contiguous(weight, bias), eps)
    scale, shift, mean, variance = merge_moments(moments_of_rows(_rows(x), views), norm)
    y = norm_act(x if x.ndim == 4 else x[:, :, None, None], scale, shift, "identity", None, None, None, None)
    return y if x.ndim == 4 else y[:, :, 0, 0], mean, variance


def slim_batch_norm_backward(
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.slim_batch_norm_backward, for valid arguments that `accepts` supports."""
    grad_y = grad_y.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
    rows_of_x, mean, views, channels = _rows(x), mean.contiguous(), len(mean), x.shape[1]
    block = power_of_two(channels, 16, 64)
    blocks = triton.cdiv(channels, block)
    rows = Rows.split(len(rows_of_x), views, BLOCK_M, blocks, x.device)
    partial = partial_sums(2, rows, channels, x)
    launch(
        slim_batch_norm_sums_kernel,
        rows.programs * blocks,
        grad_y,
        x,
        mean,
        partial,
        channels,
        rows.size,
        rows.parts,
        rows.tiles,
        rows.programs,
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    rsqrt = (variance + eps).rsqrt()
    scale = rsqrt if weight is None else rsqrt * weight
    dweight, dbias = sums(partial[0], partial[1], views)
    dweight *= rsqrt
    mean_term = (grad_mean - scale * dbias) / rows.size
    variance_factor = (2 * grad_variance - scale * rsqrt * dweight) / rows.size
    dx = torch.empty_like(x)
    parts = triton.cdiv(rows.size, BLOCK_M)
    launch(
        slim_batch_norm_input_gradient_kernel,
        views * parts * blocks,
        grad_y,
        x,
        mean,
        scale,
        mean_term,
        variance_factor,
        dx,
        channels,
        rows.size,
        parts,
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    return dx, dweight.sum(0), dbias.sum(0)


def accepts(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels support x: (True, "") or (False, reason)."""
    dense = x.is_contiguous() if x.ndim == 2 else x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not dense:
        return False, "it only supports [N, C], contiguous, and [N, C, H, W], channels-last"
    return accepts_dtype(x)


def _rows(x: Tensor) -> Tensor:
    """[N, C] or [N, C, H, W], channels-last, as [rows, C], without a copy."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
