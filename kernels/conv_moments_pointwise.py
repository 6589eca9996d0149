"""conv_moments for 1 x 1 kernels, forward: y = h W^T, h = act(scale x + shift) * gate, and the moments of y.

Rows are positions, columns are channels. At the sizes of MobileNets, memory bounds these products. The deferred
normalisation is applied to tiles of x between load and product, and the moments are summed from the accumulators.

A product with many output columns and at most MOST_CHUNKS * CHUNK input columns has a `wide` kernel. A program keeps
its rows of h on the chip and multiplies them by one block of columns of the weight after the other. x is then read once
and y is written once; the weight's prefix, cast to 16 bits before, is read once per tile of rows, from the L2 cache.
Otherwise a program computes one block of columns of y. x is then read once per block, mostly from the L2 cache, as the
programs of a row run at about the same time. The weight's prefix is read with its strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import (
    apply_activation,
    assume_multiple_of,
    deviation,
    load_row,
    moments_from,
    normalized,
    partial_column_sums,
    reduce_column_sums,
    store_sums,
    zero_column_sums,
)
from .launch import SIZES, WAVES, Input, Rows, launch, power_of_two
from .moments import PartialMoments

DEEP = 256  # the matrix product dominates the cost of products deeper than this
CHUNK, MOST_CHUNKS = 64, 3  # columns of a tile of h or e that is kept on the chip, and the number of such tiles


@triton.jit
def load_prefix(weight, out_column, out_inside, column, inside, stride_o, stride_i):
    """The weight's elements of these channels, [out_column, column]."""
    valid = out_inside[:, None] & inside[None, :]
    return tl.load(weight + out_column[:, None] * stride_o + column[None, :] * stride_i, mask=valid, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def conv_moments_pointwise_kernel(
    x,  # [rows, C]
    scale,  # [scale_rows, C]
    shift,
    gate,  # [N, C]
    weight,
    y,  # [rows, O]
    partial,  # [2, programs, O]
    channels,
    out_channels,
    stride_o,
    stride_i,
    positions,  # rows of an image
    size,
    parts,
    tiles,
    segments,
    scale_rows,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORIZED: tl.constexpr,
    WEIGHT_VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    channels = assume_multiple_of(channels, VECTORIZED)
    out_channels = assume_multiple_of(out_channels, VECTORIZED)
    stride_o = assume_multiple_of(stride_o, WEIGHT_VECTORIZED)
    blocks = tl.cdiv(out_channels, BLOCK_O)
    program = tl.program_id(0) // blocks
    segment = program // parts
    out_column = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    out_inside = out_column < out_channels
    in_tile = tl.arange(0, BLOCK_M)
    pivot = tl.zeros((BLOCK_O,), tl.float32)
    sums = zero_column_sums(BLOCK_M, BLOCK_O)
    squares = zero_column_sums(BLOCK_M, BLOCK_O)
    begin = program % parts * tiles * BLOCK_M
    # Large tiles recompute loop invariants: they have no registers left to keep them.
    for first in tl.range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M, disable_licm=BLOCK_M > 64):
        tile = segment * size + first
        row_inside = first + in_tile < size
        accumulator = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for first_in in range(0, channels, BLOCK_I):
            column = first_in + tl.arange(0, BLOCK_I)
            inside = column < channels
            valid = row_inside[:, None] & inside[None, :]
            factor, offset = load_row(
                scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED
            )
            in_x = in_tile[:, None] * channels + column[None, :]
            values = tl.load(x + tile.to(tl.int64) * channels + in_x, mask=valid, other=0.0)
            h = apply_activation(normalized(values, factor, offset, DEFERRED), ACT)
            if GATED:
                image = (tile + in_tile) // positions
                h *= tl.load(gate + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
            prefix = tl.load(
                weight + column[:, None] * stride_i + out_column[None, :] * stride_o,
                mask=inside[:, None] & out_inside[None, :],
                other=0.0,
            )
            h = tl.where(valid, h, 0.0).to(x.dtype.element_ty)
            accumulator = tl.dot(h, prefix.to(h.dtype), accumulator, input_precision=PRECISION)
        out_valid = row_inside[:, None] & out_inside[None, :]
        stored = accumulator.to(y.dtype.element_ty)
        in_y = in_tile[:, None] * out_channels + out_column[None, :]
        tl.store(y + tile.to(tl.int64) * out_channels + in_y, stored, mask=out_valid)
        if MOMENTS:
            pivot, deviations = deviation(stored.to(tl.float32), pivot, first, begin, size)
            sums += partial_column_sums(deviations)
            squares += partial_column_sums(deviations * deviations)
    if MOMENTS:
        count = tl.minimum(tiles * BLOCK_M, size - begin)
        mean, squares = moments_from(pivot, reduce_column_sums(sums), reduce_column_sums(squares), count)
        store_sums(partial, program, segments * parts, out_channels, out_column, mean, squares)


@triton.jit(do_not_specialize=SIZES)
def conv_moments_pointwise_wide_kernel(
    x,  # [rows, C]
    scale,  # [scale_rows, C]
    shift,
    gate,  # [N, C]
    weight,
    y,  # [rows, O]
    partial,  # [2, programs, O]
    channels,
    out_channels,
    stride_o,
    stride_i,
    positions,  # rows of an image
    size,
    parts,
    tiles,  # 1
    segments,
    scale_rows,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORIZED: tl.constexpr,
    WEIGHT_VECTORIZED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    channels = assume_multiple_of(channels, VECTORIZED)
    out_channels = assume_multiple_of(out_channels, VECTORIZED)
    stride_o = assume_multiple_of(stride_o, WEIGHT_VECTORIZED)
    program = tl.program_id(0)
    segment = program // parts
    first = program % parts * BLOCK_M
    in_tile = tl.arange(0, BLOCK_M)
    tile = segment * size + first
    row_inside = first + in_tile < size
    hs = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = column < channels
        valid = row_inside[:, None] & inside[None, :]
        factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
        in_x = in_tile[:, None] * channels + column[None, :]
        values = tl.load(x + tile.to(tl.int64) * channels + in_x, mask=valid, other=0.0)
        h = apply_activation(normalized(values, factor, offset, DEFERRED), ACT)
        if GATED:
            image = (tile + in_tile) // positions
            h *= tl.load(gate + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
        hs = hs + (tl.where(valid, h, 0.0).to(x.dtype.element_ty),)
    count = tl.minimum(BLOCK_M, size - first)
    for first_out in range(0, out_channels, BLOCK_O):
        out_column = first_out + tl.arange(0, BLOCK_O)
        out_inside = out_column < out_channels
        accumulator = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
            prefix = load_prefix(weight, out_column, out_inside, column, column < channels, stride_o, stride_i)
            accumulator = tl.dot(hs[chunk], tl.trans(prefix), accumulator, input_precision=PRECISION)
        stored = accumulator.to(y.dtype.element_ty)
        in_y = in_tile[:, None] * out_channels + out_column[None, :]
        out_valid = row_inside[:, None] & out_inside[None, :]
        tl.store(y + tile.to(tl.int64) * out_channels + in_y, stored, mask=out_valid)
        if MOMENTS:
            value = stored.to(tl.float32)  # 0 in rows outside of the segment
            mean = reduce_column_sums(partial_column_sums(value)) / count
            deviations = tl.where(row_inside[:, None], value - mean[None, :], 0.0)
            squares = reduce_column_sums(partial_column_sums(deviations * deviations))
            store_sums(partial, program, segments * parts, out_channels, out_column, mean, squares)


def forward(deferred: Input, weight: Tensor, y: Tensor, views: int) -> PartialMoments:
    """Fills y [N, O, H, W] from x [N, C, H, W], both channels-last; returns its moments, of each view."""
    images, channels, height, width = deferred.x.shape
    out_channels, device = y.shape[1], deferred.x.device
    tile = wide_tile(deferred.x.dtype, channels, out_channels, "BLOCK_I", "BLOCK_O")
    kernel, blocks, waves = conv_moments_pointwise_wide_kernel, 1, None
    if tile:
        weight = weight[:out_channels, :channels].to(deferred.x.dtype)
    else:
        tile = product_tile(deferred.x.dtype, out_channels, channels, "BLOCK_O", "BLOCK_I")
        kernel, blocks, waves = conv_moments_pointwise_kernel, triton.cdiv(out_channels, tile["BLOCK_O"]), WAVES
    rows = Rows.split(images * height * width, max(views, deferred.rows), tile["BLOCK_M"], blocks, device, waves)
    partial = PartialMoments.empty(rows, out_channels, y) if views else PartialMoments.none(y)
    launch(
        kernel,
        rows.programs * blocks,
        *deferred.pointers,
        weight,
        y,
        partial.values,
        channels,
        out_channels,
        weight.stride(0),
        weight.stride(1),
        height * width,
        *rows.arguments,
        deferred.rows,
        **deferred.constants,
        MOMENTS=views > 0,
        PRECISION=precision(),
        VECTORIZED=channels % 8 == out_channels % 8 == 0,
        WEIGHT_VECTORIZED=weight.stride(0) % 8 == 0,
        **tile,
    )
    return partial


def precision() -> str:
    """The precision of fp32 products: "ieee", or "tf32" if the user has allowed it by either of torch's interfaces."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def product_tile(dtype: torch.dtype, columns: int, inner: int, of_columns: str, of_inner: str) -> dict[str, int]:
    """Rows, columns and depth of a tile of the product, and the number of warps and stages. The names of the kernel's
    parameters for columns and depth are of_columns and of_inner.

    fp32 products do not use tensor cores and are unrolled, so their tiles are small. Each block of columns loads and
    normalises its rows again, at a cost of about inner / 2 further columns. This favours wide blocks, unless their last
    block is mostly empty.
    """
    if dtype == torch.float32:
        block_m, block, depth, warps = 32, power_of_two(columns, 16, 32), 16, 4
    elif inner > DEEP and columns > 64:
        block_m, block, depth, warps = 128, 128, 32, 8
    else:
        block = min((64, 32, 16), key=lambda block: triton.cdiv(columns, block) * (block + inner // 2))
        block_m, depth, warps = 64, power_of_two(inner, 16, 32), 4
    return {"BLOCK_M": block_m, of_columns: block, of_inner: depth, "num_warps": warps, "num_stages": 2}


def wide_tile(dtype: torch.dtype, inner: int, columns: int, of_inner: str, of_columns: str) -> dict[str, int]:
    """The tile of a wide kernel, which keeps rows of `inner` columns on the chip; empty if they are too many, if one
    block has all columns, or for fp32, whose products are limited by arithmetic."""
    chunks = triton.cdiv(inner, CHUNK)
    if dtype == torch.float32 or columns <= 64 or chunks > MOST_CHUNKS:
        return {}
    chunk, stages = power_of_two(inner, 16, CHUNK), 2 if chunks == 1 else 1
    return {"BLOCK_M": 128, of_inner: chunk, of_columns: 64, "CHUNKS": chunks, "num_warps": 8, "num_stages": stages}
