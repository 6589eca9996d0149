"""Moments of channels: merged from those of programs, or taken of a stored tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import columns_of, deviation, moments_from
from .launch import SIZES, Rows, launch, power_of_two

BLOCK_C = 8  # columns of partial moments, few so that many programs share the work: a sector of memory


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    partial,  # [2, views, parts, C]: means, sums of squared deviations
    mean,  # [views, C]
    variance,
    channels,
    views,
    size,  # rows of a view
    parts,
    part_rows,  # rows of a part, the last of which may have fewer
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, view, column, inside = columns_of(channels, WIDE, BLOCK_C)
    means = partial + view * parts * channels + column
    before = 0.0  # rows
    average = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, parts, BLOCK_P):  # once, but for many programs of one view
        part = first + tl.arange(0, BLOCK_P)
        valid = (part < parts)[:, None] & inside[None, :]
        of_part = means[None, :] + part[:, None] * channels
        m = tl.load(of_part, mask=valid, other=0.0)
        within = tl.load(of_part + views * parts * channels, mask=valid, other=0.0)
        count = tl.where(part < parts, tl.minimum(part_rows, size - part * part_rows), 0).to(tl.float32)[:, None]
        total = (tl.minimum(tl.minimum(first + BLOCK_P, parts) * part_rows, size) - first * part_rows).to(tl.float32)
        # Differences from a mean that is near all of them lose nothing when they are added.
        pivot = tl.load(means + first * channels, mask=inside, other=0.0)
        block_average = pivot + tl.sum((m - pivot[None, :]) * count, 0) / total
        apart = m - block_average[None, :]
        delta = block_average - average
        share = total / (before + total)
        average += delta * share
        squares += tl.sum(within + apart * apart * count, 0) + delta * delta * (before * share)
        before += total
    tl.store(mean + view * channels + column, average, mask=inside)
    tl.store(variance + view * channels + column, squares / size, mask=inside)


def partial_moments(rows: Rows, channels: int, like: Tensor) -> Tensor:
    """Room for what `merge_moments` takes: [2, programs, C], means and sums of squared deviations of each program."""
    return like.new_empty(2, rows.programs, channels, dtype=torch.float32)


def merge_moments(partial: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [segments, C] of all rows of each segment."""
    channels = partial.shape[2]
    mean, variance = (partial.new_empty(rows.segments, channels) for _ in range(2))
    block = power_of_two(rows.parts, 64, 1024)
    launch(
        merge_moments_kernel,
        rows.segments * triton.cdiv(channels, BLOCK_C),
        partial,
        mean,
        variance,
        channels,
        rows.segments,
        rows.size,
        rows.parts,
        rows.tiles * rows.block,
        WIDE=channels % 8 == 0,
        BLOCK_P=block,
        BLOCK_C=BLOCK_C,
        num_warps=8 if block > 256 else 4,
    )
    return mean, variance


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x,  # [segments * size, C]
    partial,  # [2, segments * parts, C]
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
    segment = program // parts
    pivot = tl.zeros((BLOCK_C,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        valid = (row < size)[:, None] & inside[None, :]
        offsets = (segment.to(tl.int64) * size + row)[:, None] * channels + column[None, :]
        values = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
        pivot, apart = deviation(values, pivot, first, begin, size)
        sums += apart
        squares += apart * apart
    count = tl.minimum(tiles * BLOCK_M, size - begin)
    mean, of_squares = moments_from(pivot, tl.sum(sums, 0), tl.sum(squares, 0), count)
    tl.store(partial + program * channels + column, mean, mask=inside)
    tl.store(partial + (programs + program) * channels + column, of_squares, mask=inside)


def moments(x: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [views, C] of x [rows, C], whose rows are `views` parts of equal size."""
    channels = x.shape[1]
    block = power_of_two(channels, 16, 64)
    rows = Rows.share(len(x), views, 64, triton.cdiv(channels, block), x.device)
    partial = partial_moments(rows, channels, x)
    launch(
        moments_kernel,
        rows.programs * triton.cdiv(channels, block),
        x,
        partial,
        channels,
        rows.size,
        rows.parts,
        rows.tiles,
        rows.programs,
        WIDE=channels % 8 == 0,
        BLOCK_M=rows.block,
        BLOCK_C=block,
    )
    return merge_moments(partial, rows)
