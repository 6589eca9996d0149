"""Moments of channels: merged from partial moments of programs, or computed from a stored tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import deviation, moments_from, program_columns, row_tile, store_sums
from .launch import SIZES, Rows, launch, power_of_two

BLOCK_C = 8  # columns of partial moments per program: one memory sector, to use as many programs as possible


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    partial,  # [2, views, parts, C]: means, sums of squared deviations
    mean,  # [views, C]
    variance,
    channels,
    views,
    size,  # rows of a view
    parts,
    part_rows,  # rows of a part; the last part may have fewer
    VECTORIZED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, view, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    means = partial + view * parts * channels + column
    rows_before = 0.0
    average = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, parts, BLOCK_P):  # usually a single iteration
        part = first + tl.arange(0, BLOCK_P)
        valid = (part < parts)[:, None] & inside[None, :]
        to_part = means[None, :] + part[:, None] * channels
        m = tl.load(to_part, mask=valid, other=0.0)
        within = tl.load(to_part + views * parts * channels, mask=valid, other=0.0)
        count = tl.where(part < parts, tl.minimum(part_rows, size - part * part_rows), 0).to(tl.float32)[:, None]
        total = (tl.minimum(tl.minimum(first + BLOCK_P, parts) * part_rows, size) - first * part_rows).to(tl.float32)
        # The sum of differences from one of the means does not cancel.
        pivot = tl.load(means + first * channels, mask=inside, other=0.0)
        block_average = pivot + tl.sum((m - pivot[None, :]) * count, 0) / total
        deviations = m - block_average[None, :]
        delta = block_average - average
        share = total / (rows_before + total)
        average += delta * share
        squares += tl.sum(within + deviations * deviations * count, 0) + delta * delta * (rows_before * share)
        rows_before += total
    tl.store(mean + view * channels + column, average, mask=inside)
    tl.store(variance + view * channels + column, squares / size, mask=inside)


def partial_moments(rows: Rows, channels: int, like: Tensor) -> Tensor:
    """An empty buffer for `merge_moments`: [2, programs, C], each program's means and sums of squared deviations."""
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
        VECTORIZED=channels % 8 == 0,
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
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    segment = program // parts
    pivot = tl.zeros((BLOCK_C,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        _, valid, offsets = row_tile(first, size, segment, column, inside, channels, BLOCK_M)
        values = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
        pivot, deviations = deviation(values, pivot, first, begin, size)
        sums += deviations
        squares += deviations * deviations
    count = tl.minimum(tiles * BLOCK_M, size - begin)
    mean, squared_deviations = moments_from(pivot, tl.sum(sums, 0), tl.sum(squares, 0), count)
    store_sums(partial, program, programs, channels, column, mean, squared_deviations)


def no_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of y [N, C, H, W] for 0 views: [0, C]."""
    return y.new_empty(0, y.shape[1], dtype=torch.float32), y.new_empty(0, y.shape[1], dtype=torch.float32)


def moments(x: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [views, C] of x [rows, C], whose rows are those of `views` views of equal size."""
    channels = x.shape[1]
    block = power_of_two(channels, 16, 64)
    rows = Rows.split(len(x), views, 64, triton.cdiv(channels, block), x.device)
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
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=rows.block,
        BLOCK_C=block,
    )
    return merge_moments(partial, rows)
