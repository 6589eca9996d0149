"""conv_moments for 1 x 1 kernels: tall matrix products, bound by memory at the sizes of MobileNets.

Rows are pixels, columns channels. The owed normalisation is formed on tiles of x between the load and the product, and
moments are taken of the accumulators: x is read once per block of output channels, which lie next to each other in time
and so mostly come out of the L2 cache, and y is written once. The weight's prefix is read by its strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Input, OutputGradient, Rows, launch, partial_sums, power_of_two
from .moments import merge_moments, partial_moments
from .owed import (
    activated,
    deviation,
    fold,
    folded,
    known,
    load_moment_gradients,
    load_output_gradient,
    load_row,
    moments_from,
    normalized,
    settle_gradient,
    store_sums,
    unfold,
)


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
    OWED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    WEIGHT_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    channels = known(channels, WIDE)
    out_channels = known(out_channels, WIDE)
    stride_o = known(stride_o, WEIGHT_WIDE)
    blocks = tl.cdiv(out_channels, BLOCK_O)
    program = tl.program_id(0) // blocks
    segment = program // parts
    out_column = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    out_inside = out_column < out_channels
    in_tile = tl.arange(0, BLOCK_M)
    pivot = tl.zeros((BLOCK_O,), tl.float32)
    sums = folded(BLOCK_M, BLOCK_O)
    squares = folded(BLOCK_M, BLOCK_O)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        tile = segment * size + first
        there = first + in_tile < size
        accumulator = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for first_in in range(0, channels, BLOCK_I):
            column = first_in + tl.arange(0, BLOCK_I)
            inside = column < channels
            valid = there[:, None] & inside[None, :]
            factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, OWED)
            in_x = in_tile[:, None] * channels + column[None, :]
            values = tl.load(x + tile.to(tl.int64) * channels + in_x, mask=valid, other=0.0)
            h = activated(normalized(values, factor, offset, OWED), ACT)
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
        out_valid = there[:, None] & out_inside[None, :]
        stored = accumulator.to(y.dtype.element_ty)
        in_y = in_tile[:, None] * out_channels + out_column[None, :]
        tl.store(y + tile.to(tl.int64) * out_channels + in_y, stored, mask=out_valid)
        if MOMENTS:
            pivot, apart = deviation(stored.to(tl.float32), pivot, first, begin, size)
            sums += fold(apart)
            squares += fold(apart * apart)
    if MOMENTS:
        programs = segments * parts
        count = tl.minimum(tiles * BLOCK_M, size - begin)
        mean, squares = moments_from(pivot, unfold(sums), unfold(squares), count)
        tl.store(partial + program * out_channels + out_column, mean, mask=out_inside)
        tl.store(partial + (programs + program) * out_channels + out_column, squares, mask=out_inside)


def forward(owed: Input, weight: Tensor, y: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Fills y [N, O, H, W] from x [N, C, H, W], both channels-last; returns mean and variance [views, O]."""
    images, channels, height, width = owed.x.shape
    out_channels = y.shape[1]
    block_m, block_o, block_i = _tile(owed.x.dtype, out_channels, channels)
    blocks = triton.cdiv(out_channels, block_o)
    rows = Rows.share(images * height * width, max(views, owed.rows), block_m, blocks, owed.x.device)
    partial = partial_moments(rows, out_channels, owed.x) if views else owed.x
    launch(
        conv_moments_pointwise_kernel,
        rows.programs * blocks,
        *owed.pointers,
        weight,
        y,
        partial,
        channels,
        out_channels,
        weight.stride(0),
        weight.stride(1),
        height * width,
        *rows.arguments,
        owed.rows,
        **owed.constants,
        MOMENTS=views > 0,
        PRECISION=precision(),
        WIDE=channels % 8 == out_channels % 8 == 0,
        WEIGHT_WIDE=weight.stride(0) % 8 == 0,
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=_warps(block_o),
        num_stages=2,
    )
    if views:
        return merge_moments(partial, rows)
    nothing = owed.x.new_empty(0, out_channels, dtype=torch.float32)
    return nothing, nothing.clone()


@triton.jit(do_not_specialize=SIZES)
def conv_moments_pointwise_input_gradient_kernel(
    dy,  # [rows, O]
    dmean,  # [views, O]
    dvariance,
    y,
    mean,
    weight,
    x,  # [rows, C]
    scale,
    shift,
    gate,
    dx,
    partial,  # [3, programs, C]: sums for scale, shift, gate
    inverse_count,
    channels,
    out_channels,
    stride_o,
    stride_i,
    size,
    parts,
    tiles,
    segments,
    scale_rows,
    views,
    ACT: tl.constexpr,
    OWED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    WEIGHT_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    channels = known(channels, WIDE)
    out_channels = known(out_channels, WIDE)
    stride_o = known(stride_o, WEIGHT_WIDE)
    blocks = tl.cdiv(channels, BLOCK_I)
    program = tl.program_id(0) // blocks
    segment = program // parts
    column = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < channels
    view = segment * views // segments
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, OWED)
    gates = tl.full((1, BLOCK_I), 1.0, tl.float32)
    if GATED:
        gates = tl.load(gate + segment * channels + column, mask=inside, other=0.0)[None, :]
    in_tile = tl.arange(0, BLOCK_M)
    of_scale = tl.zeros((BLOCK_I,), tl.float32)
    of_shift = tl.zeros((BLOCK_I,), tl.float32)
    of_gate = tl.zeros((BLOCK_I,), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        tile = (segment * size + first).to(tl.int64)
        there = first + in_tile < size
        dh = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for first_out in range(0, out_channels, BLOCK_O):
            out_column = first_out + tl.arange(0, BLOCK_O)
            out_inside = out_column < out_channels
            centre, to_mean, to_square = load_moment_gradients(
                mean, dmean, dvariance, view, out_column, out_channels, inverse_count, MOMENTS
            )
            in_y = in_tile[:, None] * out_channels + out_column[None, :]
            out_valid = there[:, None] & out_inside[None, :]
            e = load_output_gradient(
                dy + tile * out_channels, y + tile * out_channels, centre, to_mean, to_square, in_y, out_valid, MOMENTS
            )
            prefix = tl.load(
                weight + out_column[:, None] * stride_o + column[None, :] * stride_i,
                mask=out_inside[:, None] & inside[None, :],
                other=0.0,
            )
            e = e.to(x.dtype.element_ty)
            dh = tl.dot(e, prefix.to(e.dtype), dh, input_precision=PRECISION)
        valid = there[:, None] & inside[None, :]
        in_x = in_tile[:, None] * channels + column[None, :]
        values = tl.load(x + tile * channels + in_x, mask=valid, other=0.0).to(tl.float32)
        dz, to_gate = settle_gradient(dh, values, factor, offset, gates, valid, ACT, OWED, GATED)
        of_gate += to_gate
        of_scale += tl.sum(dz * values, 0)
        of_shift += tl.sum(dz, 0)
        tl.store(dx + tile * channels + in_x, (dz * factor).to(dx.dtype.element_ty), mask=valid)
    store_sums(partial, program, segments * parts, channels, column, of_scale, of_shift, of_gate, OWED, GATED)


def input_gradient(grads: OutputGradient, owed: Input, weight: Tensor, dx: Tensor) -> Tensor:
    """Fills dx; returns what programs have summed for scale, shift and gate, [3, programs, C]."""
    images, channels, height, width = owed.x.shape
    out_channels = grads.y.shape[1]
    block_m, block_i, block_o = _tile(owed.x.dtype, channels, out_channels)
    if owed.gate is not None:
        block_m = power_of_two(height * width, 16, block_m)
    blocks = triton.cdiv(channels, block_i)
    # A program works within one image where there is a gate, whose gradient is a sum over an image.
    segments = max(grads.views, owed.rows) if owed.gate is None else images
    rows = Rows.share(images * height * width, segments, block_m, blocks, owed.x.device)
    partial = partial_sums(rows, channels, owed.x)
    launch(
        conv_moments_pointwise_input_gradient_kernel,
        rows.programs * blocks,
        *grads.pointers,
        weight,
        *owed.pointers,
        dx,
        partial,
        grads.inverse_count,
        channels,
        out_channels,
        weight.stride(0),
        weight.stride(1),
        *rows.arguments,
        owed.rows,
        grads.views,
        **owed.constants,
        MOMENTS=grads.views > 0,
        PRECISION=precision(),
        WIDE=channels % 8 == out_channels % 8 == 0,
        WEIGHT_WIDE=weight.stride(0) % 8 == 0,
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=_warps(block_i),
        num_stages=2,
    )
    return partial


@triton.jit(do_not_specialize=SIZES)
def conv_moments_pointwise_weight_gradient_kernel(
    dy,  # [rows, O]
    dmean,  # [views, O]
    dvariance,
    y,
    mean,
    x,  # [rows, C]
    scale,
    shift,
    gate,
    partial,  # [programs, O, C]
    inverse_count,
    channels,
    out_channels,
    positions,
    size,
    parts,
    tiles,
    segments,
    scale_rows,
    views,
    ACT: tl.constexpr,
    OWED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    channels = known(channels, WIDE)
    out_channels = known(out_channels, WIDE)
    in_blocks = tl.cdiv(channels, BLOCK_I)
    blocks = tl.cdiv(out_channels, BLOCK_O) * in_blocks
    program = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    segment = program // parts
    view = segment * views // segments
    out_column = block // in_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    out_inside = out_column < out_channels
    centre, to_mean, to_square = load_moment_gradients(
        mean, dmean, dvariance, view, out_column, out_channels, inverse_count, MOMENTS
    )
    column = block % in_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < channels
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, OWED)
    in_tile = tl.arange(0, BLOCK_M)
    accumulator = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        tile = segment * size + first
        there = first + in_tile < size
        in_y = in_tile[:, None] * out_channels + out_column[None, :]
        out_valid = there[:, None] & out_inside[None, :]
        before = tile.to(tl.int64) * out_channels
        e = load_output_gradient(dy + before, y + before, centre, to_mean, to_square, in_y, out_valid, MOMENTS)
        valid = there[:, None] & inside[None, :]
        in_x = in_tile[:, None] * channels + column[None, :]
        values = tl.load(x + tile.to(tl.int64) * channels + in_x, mask=valid, other=0.0)
        h = activated(normalized(values, factor, offset, OWED), ACT)
        if GATED:
            image = (tile + in_tile) // positions
            h *= tl.load(gate + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
        h = tl.where(valid, h, 0.0).to(x.dtype.element_ty)
        accumulator = tl.dot(tl.trans(e.to(h.dtype)), h, accumulator, input_precision=PRECISION)
    to = partial + program.to(tl.int64) * out_channels * channels + out_column[:, None] * channels + column[None, :]
    tl.store(to, accumulator, mask=out_inside[:, None] & inside[None, :])


def weight_gradient(grads: OutputGradient, owed: Input) -> Tensor:
    """What programs have summed for the gradient of the weight's prefix, [programs, O, C]."""
    images, channels, height, width = owed.x.shape
    out_channels = grads.y.shape[1]
    block_m, largest = (16, 32) if owed.x.dtype == torch.float32 else (64, 64)
    block_o, block_i = power_of_two(out_channels, 16, largest), power_of_two(channels, 16, largest)
    blocks = triton.cdiv(out_channels, block_o) * triton.cdiv(channels, block_i)
    rows = Rows.share(images * height * width, max(grads.views, owed.rows), block_m, blocks, owed.x.device)
    partial = owed.x.new_empty(rows.programs, out_channels, channels, dtype=torch.float32)
    launch(
        conv_moments_pointwise_weight_gradient_kernel,
        rows.programs * blocks,
        *grads.pointers,
        *owed.pointers,
        partial,
        grads.inverse_count,
        channels,
        out_channels,
        height * width,
        *rows.arguments,
        owed.rows,
        grads.views,
        **owed.constants,
        MOMENTS=grads.views > 0,
        PRECISION=precision(),
        WIDE=channels % 8 == out_channels % 8 == 0,
        BLOCK_M=rows.block,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_stages=2,
    )
    return partial


def precision() -> str:
    """Of products of fp32: exact, unless the caller has allowed tf32, by whichever of torch's two interfaces."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _tile(dtype: torch.dtype, columns: int, inner: int) -> tuple[int, int, int]:
    """Rows, columns and depth of a tile of the product. fp32 has no tensor cores, and its products are unrolled."""
    if dtype == torch.float32:
        return 32, power_of_two(columns, 16, 32), 16
    return 64, power_of_two(columns, 16, 128), power_of_two(inner, 16, 32)


def _warps(columns: int) -> int:
    return 8 if columns > 64 else 4
