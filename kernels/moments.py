"""Moments of channels: merged from partial moments of programs, or computed from a stored tensor.

The launch that merges them also writes scale and shift of a batch normalisation, if one is given.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import deviation, moments_from, program_columns, row_tile, store_sums
from .launch import SIZES, Rows, launch, power_of_two
from .scale_shift import load_affine, store_scale_shift

BLOCK_C = 8  # columns of partial moments per program: one memory sector, to use as many programs as possible


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    partial,  # [2, views, parts, C]: means, sums of squared deviations
    mean,  # [views, C]
    variance,
    weight,  # at least [C]
    bias,
    scale,  # [views, C], if NORM
    shift,
    channels,
    views,
    size,  # rows of a view
    parts,
    part_rows,  # rows of a part; the last part may have fewer
    eps,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    offsets = view * channels + column
    tl.store(mean + offsets, average, mask=inside)
    tl.store(variance + offsets, squares / size, mask=inside)
    if NORM:
        gamma, beta = load_affine(weight, bias, column, inside, HAS_WEIGHT, HAS_BIAS)
        store_scale_shift(scale, shift, offsets, inside, average, squares / size, gamma, beta, eps)


@dataclass(frozen=True)
class PartialMoments:
    """The moments of programs: `values` [2, programs, C] are means and sums of squared deviations."""

    values: Tensor
    rows: Rows

    @staticmethod
    def empty(rows: Rows, channels: int, like: Tensor) -> "PartialMoments":
        """A buffer on the device of `like`, which the programs fill."""
        return PartialMoments(like.new_empty(2, rows.programs, channels, dtype=torch.float32), rows)

    @staticmethod
    def none(y: Tensor) -> "PartialMoments":
        """Those of y [N, C, H, W] for 0 views."""
        return PartialMoments.empty(Rows(0, 0, 1, 0, 0), y.shape[1], y)


@dataclass(frozen=True)
class Norm:
    """A batch normalisation: weight and bias of at least C elements, or None, and eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def merge_moments(partial: PartialMoments, norm: Norm | None = None) -> tuple[Tensor, ...]:
    """Mean and biased variance [segments, C] of each segment's rows; with norm, before them its scale and shift."""
    values, rows = partial.values, partial.rows
    channels = values.shape[2]
    mean, variance = moments = tuple(values.new_empty(rows.segments, channels) for _ in range(2))
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    scale_shift = () if norm is None else tuple(map(torch.empty_like, moments))
    if not rows.segments:
        return *scale_shift, mean, variance
    block = power_of_two(rows.parts, 64, 1024)
    launch(
        merge_moments_kernel,
        rows.segments * triton.cdiv(channels, BLOCK_C),
        values,
        mean,
        variance,
        mean if weight is None else weight,
        mean if bias is None else bias,
        *(scale_shift or moments),
        channels,
        rows.segments,
        rows.size,
        rows.parts,
        rows.tiles * rows.block,
        eps,
        NORM=norm is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        VECTORIZED=channels % 8 == 0,
        BLOCK_P=block,
        BLOCK_C=BLOCK_C,
        num_warps=8 if block > 256 else 4,
    )
    return *scale_shift, mean, variance


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


def moments_of_rows(x: Tensor, views: int) -> PartialMoments:
    """The moments of x [rows, C], whose rows are those of `views` views of equal size."""
    channels = x.shape[1]
    block = power_of_two(channels, 16, 64)
    rows = Rows.split(len(x), views, 64, triton.cdiv(channels, block), x.device)
    partial = PartialMoments.empty(rows, channels, x)
    launch(
        moments_kernel,
        rows.programs * triton.cdiv(channels, block),
        x,
        partial.values,
        channels,
        rows.size,
        rows.parts,
        rows.tiles,
        rows.programs,
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=rows.block,
        BLOCK_C=block,
    )
    return partial
