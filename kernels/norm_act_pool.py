"""norm_act_pool: the mean over positions of act(scale x + shift).

Bound by memory: x is read once, by a program per image and block of channels. The backward is norm_act's, with a
gradient that is the same for all positions of an image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import apply_activation, load_row, normalized, program_columns, row_tile
from .launch import SIZES, Input, accepts_dtype, channels_last, contiguous, launch, power_of_two
from .norm_act import materialize_backward
from .sums import sums


@triton.jit(do_not_specialize=SIZES)
def norm_act_pool_kernel(
    x,  # [N, positions, C]
    scale,  # [scale_rows, C]
    shift,
    out,  # [N, C]
    channels,
    positions,
    images,
    scale_rows,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, image, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    factor, offset = load_row(scale, shift, image * scale_rows // images, column, inside, channels, DEFERRED)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, positions, BLOCK_M):
        _, valid, offsets = row_tile(first, positions, image, column, inside, channels, BLOCK_M)
        values = tl.load(x + offsets, mask=valid, other=0.0)
        total += tl.sum(tl.where(valid, apply_activation(normalized(values, factor, offset, DEFERRED), ACT), 0.0), 0)
    tl.store(out + image * channels + column, total / positions, mask=inside)


def norm_act_pool(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    """dspnet_fast.ops.norm_act_pool, for valid arguments that `accepts` supports."""
    x = channels_last(x)
    scale, shift = contiguous(scale, shift)
    images, channels = x.shape[:2]
    out = x.new_empty(images, channels, dtype=torch.float32)
    positions, block = x.shape[2] * x.shape[3], power_of_two(channels, 16, 64)
    launch(
        norm_act_pool_kernel,
        images * triton.cdiv(channels, block),
        x,
        x if scale is None else scale,
        x if shift is None else shift,
        out,
        channels,
        positions,
        images,
        1 if scale is None else len(scale),
        ACT=act,
        DEFERRED=scale is not None,
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=power_of_two(positions, 16, 64),
        BLOCK_C=block,
    )
    return out


def norm_act_pool_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.norm_act_pool_backward, for valid arguments that `accepts` supports."""
    dx, _, partial = materialize_backward(grad.contiguous(), Input.of(x, scale, shift, act, None))
    if scale is None:
        return dx, grad.new_empty(0), grad.new_empty(0)
    return dx, *sums(partial[0], partial[1], len(scale))


def accepts(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels support x: (True, "") or (False, reason)."""
    return accepts_dtype(x)
