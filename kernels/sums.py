"""Adds up the partial sums of programs, in a fixed order, so that results are reproducible bit by bit.

A backward has partial sums for scale and shift, and for the weight, which are added to the prefix of its gradient. One
launch does both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import assume_multiple_of, program_columns
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
    partial,  # [programs, O, C]
    prefix,  # [O, C]
    channels,
    parts,
    sum_programs,  # programs of this launch that compute first_sums and second_sums; those after them add to prefix
    size,  # O C
    programs,
    stride_o,
    stride_i,
    VECTORIZED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PREFIX_P: tl.constexpr,
    PREFIX_C: tl.constexpr,
):
    channels, row, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    if tl.program_id(0) < sum_programs:
        of_row = row.to(tl.int64) * parts * channels
        in_sums = row * channels + column
        tl.store(first_sums + in_sums, sum_parts(first + of_row, parts, channels, column, BLOCK_P), mask=inside)
        tl.store(second_sums + in_sums, sum_parts(second + of_row, parts, channels, column, BLOCK_P), mask=inside)
    else:
        elements = assume_multiple_of(size, VECTORIZED)
        element = (tl.program_id(0) - sum_programs) * PREFIX_C + tl.arange(0, PREFIX_C)
        to = prefix + element // channels * stride_o + element % channels * stride_i
        total = tl.load(to, mask=element < elements, other=0.0).to(tl.float32)
        total += sum_parts(partial, programs, elements, element, PREFIX_P)
        tl.store(to, total.to(prefix.dtype.element_ty), mask=element < elements)


def sums(
    first: Tensor, second: Tensor, rows: int, prefix: Tensor | None = None, partial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sums of two tensors [programs, C] over each row's programs: [rows, C]. Programs are in the order of rows.

    With partial [programs, O, C] the same launch adds its sum over programs to prefix, [O, C] or [O, C, 1, 1].
    """
    channels = first.shape[1]
    first_sums, second_sums = (first.new_empty(rows, channels) for _ in range(2))
    parts = len(first) // max(rows, 1)
    block_p, block_c = blocks(parts)
    sum_programs = rows * triton.cdiv(channels, block_c)
    if prefix is None or partial is None:
        prefix = partial = first.new_empty(0, 0, 1)
    elif torch._debug_has_internal_overlap(prefix) == 1:  # programs would race
        raise RuntimeError("main_grad: several of its elements are a single memory location; clone it first")
    programs, size = len(partial), partial[:1].numel()
    prefix_p, prefix_c = blocks(programs)
    launch(
        sums_kernel,
        sum_programs + triton.cdiv(size, prefix_c),
        first,
        second,
        first_sums,
        second_sums,
        partial,
        prefix,
        channels,
        parts,
        sum_programs,
        size,
        programs,
        *prefix.stride()[:2],
        VECTORIZED=channels % 8 == 0,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        PREFIX_P=prefix_p,
        PREFIX_C=prefix_c,
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
