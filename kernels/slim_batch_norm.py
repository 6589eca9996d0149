"""slim_batch_norm: forward reads x twice and writes once; backward reads x and the gradient twice and writes once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import columns_of
from .launch import SIZES, Rows, launch, partial_sums, power_of_two, takes
from .moments import moments
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
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = columns_of(channels, WIDE, BLOCK_C)
    view = program // parts
    centre = tl.load(mean + view * channels + column, mask=inside, other=0.0)[None, :]
    of_weight = tl.zeros((BLOCK_C,), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        in_view = first + tl.arange(0, BLOCK_M)
        valid = (in_view < size)[:, None] & inside[None, :]
        offsets = (view.to(tl.int64) * size + in_view)[:, None] * channels + column[None, :]
        dy = tl.load(grad + offsets, mask=valid, other=0.0).to(tl.float32)
        of_weight += tl.sum(dy * (tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32) - centre), 0)
        of_bias += tl.sum(dy, 0)
    to = partial + program * channels + column
    tl.store(to, of_weight, mask=inside)
    tl.store(to + programs * channels, of_bias, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def slim_batch_norm_input_gradient_kernel(
    grad,  # [rows, C]
    x,
    mean,  # [views, C]
    scale,
    to_mean,
    to_variance,
    dx,
    channels,
    size,
    parts,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = columns_of(channels, WIDE, BLOCK_C)
    view = program // parts
    of_view = view * channels + column
    in_view = program % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = (in_view < size)[:, None] & inside[None, :]
    offsets = (view.to(tl.int64) * size + in_view)[:, None] * channels + column[None, :]
    dy = tl.load(grad + offsets, mask=valid, other=0.0).to(tl.float32)
    centred = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    centred -= tl.load(mean + of_view, mask=inside, other=0.0)[None, :]
    result = dy * tl.load(scale + of_view, mask=inside, other=0.0)[None, :]
    result += tl.load(to_mean + of_view, mask=inside, other=0.0)[None, :]
    result += centred * tl.load(to_variance + of_view, mask=inside, other=0.0)[None, :]
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=valid)


def slim_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As dspnet_fast.ops.slim_batch_norm, for arguments that are valid and that `accepts` takes."""
    mean, variance = moments(_rows(x), views)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
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
    """As dspnet_fast.ops.slim_batch_norm_backward, for arguments that are valid and that `accepts` takes."""
    grad_y = grad_y.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
    rows_of_x, mean, views, channels = _rows(x), mean.contiguous(), len(mean), x.shape[1]
    block = power_of_two(channels, 16, 64)
    blocks = triton.cdiv(channels, block)
    rows = Rows.share(len(rows_of_x), views, BLOCK_M, blocks, x.device)
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
        WIDE=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    rsqrt = (variance + eps).rsqrt()
    scale = rsqrt if weight is None else rsqrt * weight
    of_weight, of_bias = sums(partial[0], partial[1], views)
    of_weight *= rsqrt
    to_mean = (grad_mean - scale * of_bias) / rows.size
    to_variance = (2 * grad_variance - scale * rsqrt * of_weight) / rows.size
    dx = torch.empty_like(x)
    parts = triton.cdiv(rows.size, BLOCK_M)
    launch(
        slim_batch_norm_input_gradient_kernel,
        views * parts * blocks,
        grad_y,
        x,
        mean,
        scale,
        to_mean,
        to_variance,
        dx,
        channels,
        rows.size,
        parts,
        WIDE=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    return dx, of_weight.sum(0), of_bias.sum(0)


def accepts(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels take this. Returns (True, "") or (False, why not)."""
    dense = x.is_contiguous() if x.ndim == 2 else x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not dense:
        return False, "it serves [N, C], contiguous, and [N, C, H, W], channels-last"
    return takes(x)


def _rows(x: Tensor) -> Tensor:
    """[N, C] or [N, C, H, W], channels-last, as [rows, C], without a copy."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
