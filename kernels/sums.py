"""What programs have left as partial sums, added up: in a fixed order, so that the same input gives the same bits."""

import triton
import triton.language as tl
from torch import Tensor

from .deferred import columns_of
from .launch import SIZES, launch, power_of_two

BLOCK = 4096  # partial sums that a program reads at a time


@triton.jit
def add_up(partial, parts, columns, column, BLOCK_P: tl.constexpr):
    """[parts, columns], one after another, added up to [columns]."""
    inside = column < columns
    total = tl.zeros((BLOCK_P, column.shape[0]), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        offsets = part.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial + offsets, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    first,  # [rows * parts, C]
    second,
    of_first,  # [rows, C]
    of_second,
    channels,
    parts,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, row, column, _ = columns_of(channels, WIDE, BLOCK_C)
    before = row.to(tl.int64) * parts * channels
    to = row * channels + column
    tl.store(of_first + to, add_up(first + before, parts, channels, column, BLOCK_P), mask=column < channels)
    tl.store(of_second + to, add_up(second + before, parts, channels, column, BLOCK_P), mask=column < channels)


def sums(first: Tensor, second: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Two of [programs, C], in the order of their segments, to [rows, C]: the sums over each row's programs."""
    programs, channels = first.shape
    of_first, of_second = (first.new_empty(rows, channels) for _ in range(2))
    block_p, block_c = blocks(programs // rows)
    launch(
        sums_kernel,
        rows * triton.cdiv(channels, block_c),
        first,
        second,
        of_first,
        of_second,
        channels,
        programs // rows,
        WIDE=channels % 8 == 0,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )
    return of_first, of_second


def sums_per_image(partial: Tensor, images: int) -> Tensor:
    """One of [programs, C], each of which has worked within one image, to [images, C]."""
    if not len(partial):
        return partial.new_zeros(images, partial.shape[1])
    return partial.unflatten(0, (images, -1)).sum(1)


def blocks(parts: int) -> tuple[int, int]:
    """Parts and columns that a program of `add_up` reads at a time: few columns where there are many parts."""
    block = power_of_two(parts, 16, 512)
    return block, BLOCK // block
