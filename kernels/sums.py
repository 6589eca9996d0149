"""Adds up the partial sums of programs, in a fixed order, so that results are reproducible bit by bit."""

import triton
import triton.language as tl
from torch import Tensor

from .deferred import program_columns
from .launch import SIZES, launch, power_of_two

BLOCK = 4096  # partial sums that a program reads at a time


@triton.jit
def sum_parts(partial, parts, columns, column, BLOCK_P: tl.constexpr):
    """The sum of partial [parts, columns] over parts, in order: [columns]."""
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
    first_sums,  # [rows, C]
    second_sums,
    channels,
    parts,
    VECTORIZED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, row, column, _ = program_columns(channels, VECTORIZED, BLOCK_C)
    row_offset = row.to(tl.int64) * parts * channels
    to = row * channels + column
    tl.store(first_sums + to, sum_parts(first + row_offset, parts, channels, column, BLOCK_P), mask=column < channels)
    tl.store(second_sums + to, sum_parts(second + row_offset, parts, channels, column, BLOCK_P), mask=column < channels)


def sums(first: Tensor, second: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The sums of two tensors [programs, C] over each row's programs: [rows, C]. Programs are in the order of rows."""
    programs, channels = first.shape
    first_sums, second_sums = (first.new_empty(rows, channels) for _ in range(2))
    block_p, block_c = blocks(programs // rows)
    launch(
        sums_kernel,
        rows * triton.cdiv(channels, block_c),
        first,
        second,
        first_sums,
        second_sums,
        channels,
        programs // rows,
        VECTORIZED=channels % 8 == 0,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )
    return first_sums, second_sums


def sums_per_image(partial: Tensor, images: int) -> Tensor:
    """The sums of partial [programs, C] over each image's programs: [images, C]."""
    if not len(partial):
        return partial.new_zeros(images, partial.shape[1])
    return partial.unflatten(0, (images, -1)).sum(1)


def blocks(parts: int) -> tuple[int, int]:
    """Parts and columns that a program of `sum_parts` reads at a time: the more parts, the fewer columns."""
    block = power_of_two(parts, 16, 512)
    return block, BLOCK // block
