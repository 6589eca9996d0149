"""conv_moments for 1 x 1 kernels: matrix products with many rows, bound by memory at the sizes of MobileNets.

    forward: y = h W^T, h = act(scale x + shift) * gate, and the moments of y
    backward: e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt, dh = e W, dW = e^T h, dz = dh gate act'(z)

Rows are positions, columns are channels. The deferred normalisation is applied to tiles of x between load and product,
and the moments are summed from the accumulators. x is read once per block of output channels; these programs run at
about the same time, so most of their reads hit the L2 cache. y is written once. The weight's prefix is read with its
strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import (
    activation_gradient,
    apply_activation,
    assume_multiple_of,
    deviation,
    load_moment_gradients,
    load_output_gradient,
    load_row,
    moments_from,
    normalized,
    partial_column_sums,
    program_columns,
    reduce_column_sums,
    store_sums,
    zero_column_sums,
)
from .launch import SIZES, Input, OutputGradient, Rows, launch, partial_sums, power_of_two
from .moments import merge_moments, no_moments, partial_moments

DEEP = 256  # the matrix product dominates the cost of products deeper than this


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


def forward(deferred: Input, weight: Tensor, y: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Fills y [N, O, H, W] from x [N, C, H, W], both channels-last; returns mean and variance [views, O]."""
    images, channels, height, width = deferred.x.shape
    out_channels = y.shape[1]
    block_m, block_o, block_i, warps = _tile(deferred.x.dtype, out_channels, channels)
    blocks = triton.cdiv(out_channels, block_o)
    rows = Rows.split(images * height * width, max(views, deferred.rows), block_m, blocks, deferred.x.device)
    partial = partial_moments(rows, out_channels, deferred.x) if views else deferred.x
    launch(
        conv_moments_pointwise_kernel,
        rows.programs * blocks,
        *deferred.pointers,
        weight,
        y,
        partial,
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
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=warps,
        num_stages=2,
    )
    return merge_moments(partial, rows) if views else no_moments(y)


@triton.jit
def _reduce_rows(x, ROWS_PER_LOAD: tl.constexpr):
    """Adds up the rows of a tile that one thread holds: [ROWS_PER_LOAD, columns]. Needs no exchange between threads."""
    return tl.sum(tl.reshape(x, (x.shape[0] // ROWS_PER_LOAD, ROWS_PER_LOAD, x.shape[1])), 0)


@triton.jit
def _sum_per_image(x, image, row_inside, IMAGES: tl.constexpr, SPLIT: tl.constexpr):
    """The sums [IMAGES, columns] of each image's rows of x, as a product with a matrix of ones and zeros."""
    # row_inside makes the matrix depend on the tile: otherwise the compiler would keep it in registers.
    ones = tl.where((tl.arange(0, IMAGES)[:, None] == image[None, :]) & row_inside[None, :], 1.0, 0.0)
    if SPLIT:  # on tensor cores: the sum of two bf16 products, of the upper and the lower bits of x
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        low = (x - high).to(tl.bfloat16)
        ones = ones.to(tl.bfloat16)
        sums = tl.dot(ones, low, tl.dot(ones, high.to(tl.bfloat16)))
    else:
        sums = tl.dot(ones, x, input_precision="ieee")
    return sums


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
    partial,  # [2, programs, C]: sums for scale and shift
    dgate,  # [N, C]; if IMAGES is 0, the programs' sums [programs, C]
    inverse_count,
    channels,
    out_channels,
    stride_o,
    stride_i,
    positions,
    size,
    parts,
    tiles,
    segments,
    scale_rows,
    views,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,  # if tiles consist of whole images, their number rounded up to a power of two; else 0
    ROWS_PER_LOAD: tl.constexpr,  # rows that all threads of a program load at once
    VECTORIZED: tl.constexpr,
    WEIGHT_VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    out_channels = assume_multiple_of(out_channels, VECTORIZED)
    stride_o = assume_multiple_of(stride_o, WEIGHT_VECTORIZED)
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_I)
    segment = program // parts
    view = segment * views // segments
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    dscale = tl.zeros((ROWS_PER_LOAD, BLOCK_I), tl.float32)
    dshift = tl.zeros((ROWS_PER_LOAD, BLOCK_I), tl.float32)
    row = tl.arange(0, BLOCK_M)
    image = row // positions
    # The unit of segments is an image if IMAGES, otherwise a row.
    step = BLOCK_M // positions if IMAGES else BLOCK_M
    if GATED and IMAGES == 0:
        gate_sum = tl.zeros((ROWS_PER_LOAD, BLOCK_I), tl.float32)
        gates = tl.load(gate + segment * channels + column, mask=inside, other=0.0)[None, :]
    begin = program % parts * tiles * step
    # Tiles recompute loop invariants: there are no registers left to keep them.
    for first in tl.range(begin, tl.minimum(begin + tiles * step, size), step, disable_licm=True):
        tile = (segment * size + first).to(tl.int64)
        row_inside = first + row < size
        if IMAGES:
            tile *= positions
            row_inside = image < tl.minimum(step, size - first)
        dh = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for first_out in range(0, out_channels, BLOCK_O):
            out_column = first_out + tl.arange(0, BLOCK_O)
            out_inside = out_column < out_channels
            center, mean_term, variance_factor = load_moment_gradients(
                mean, dmean, dvariance, view, out_column, out_channels, inverse_count, MOMENTS
            )
            in_y = row[:, None] * out_channels + out_column[None, :]
            out_valid = row_inside[:, None] & out_inside[None, :]
            e = load_output_gradient(
                dy + tile * out_channels,
                y + tile * out_channels,
                center,
                mean_term,
                variance_factor,
                in_y,
                out_valid,
                MOMENTS,
            )
            prefix = tl.load(
                weight + out_column[:, None] * stride_o + column[None, :] * stride_i,
                mask=out_inside[:, None] & inside[None, :],
                other=0.0,
            )
            e = e.to(x.dtype.element_ty)
            dh = tl.dot(e, prefix.to(e.dtype), dh, input_precision=PRECISION)
        # Rows outside of the segment have e = 0, hence dh = 0.
        valid = row_inside[:, None] & inside[None, :]
        in_x = row[:, None] * channels + column[None, :]
        values = tl.load(x + tile * channels + in_x, mask=valid, other=0.0).to(tl.float32)
        z = normalized(values, factor, offset, DEFERRED)
        if IMAGES:
            offset_of_tile = (segment * size + first) * channels
            in_gate = offset_of_tile + image[:, None] * channels + column[None, :]
            image_dgate = _sum_per_image(
                dh * apply_activation(z, ACT), image, row_inside, IMAGES, x.dtype.element_ty != tl.float32
            )
            in_tile = tl.arange(0, IMAGES)
            tl.store(
                dgate + offset_of_tile + in_tile[:, None] * channels + column[None, :],
                image_dgate,
                mask=(in_tile < tl.minimum(step, size - first))[:, None] & inside[None, :],
            )
            dh *= tl.load(gate + in_gate, mask=valid, other=0.0)
        elif GATED:
            gate_sum += _reduce_rows(dh * apply_activation(z, ACT), ROWS_PER_LOAD)
            dh *= gates
        dz = dh * activation_gradient(z, ACT)
        if DEFERRED:
            dscale += _reduce_rows(dz * values, ROWS_PER_LOAD)
            dshift += _reduce_rows(dz, ROWS_PER_LOAD)
        tl.store(dx + tile * channels + in_x, (dz * factor).to(dx.dtype.element_ty), mask=valid)
    if DEFERRED:
        store_sums(partial, program, segments * parts, channels, column, tl.sum(dscale, 0), tl.sum(dshift, 0))
    if GATED and IMAGES == 0:
        tl.store(dgate + program * channels + column, tl.sum(gate_sum, 0), mask=inside)


def input_gradient(grads: OutputGradient, deferred: Input, weight: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Fills dx. Returns the programs' sums for scale and shift, [2, programs, C], and the gate's gradient [N, C] or the
    programs' sums for it, [programs, C]; a program then processes rows of a single image."""
    images, channels, height, width = deferred.x.shape
    out_channels, positions, dtype = grads.y.shape[1], height * width, deferred.x.dtype
    gated = deferred.gate is not None
    # Tiles for deep products have no registers left for gates.
    block_m, block_i, block_o, warps = _tile(dtype, channels, min(out_channels, DEEP) if gated else out_channels)
    if gated and dtype != torch.float32:  # the tile size that whole images fill best
        block_m = max(64, 128, key=lambda rows: rows // positions * positions / rows)
        warps = block_m // 16
    blocks = triton.cdiv(channels, block_i)
    views, device = max(grads.views, deferred.rows), deferred.x.device
    in_tile = block_m // positions if gated else 0
    if in_tile:
        rows = Rows.split(images, views, in_tile, blocks, device)
    else:  # with a gate, a program processes rows of one image, over which the gate's gradient is a sum
        rows = Rows.split(images * positions, images if gated else views, block_m, blocks, device)
    partial = partial_sums(2, rows, channels, deferred.x)
    dgate = deferred.x.new_empty(images if in_tile else rows.programs, channels, dtype=torch.float32)
    launch(
        conv_moments_pointwise_input_gradient_kernel,
        rows.programs * blocks,
        *grads.pointers,
        weight,
        *deferred.pointers,
        dx,
        partial,
        dgate,
        grads.inverse_count,
        channels,
        out_channels,
        weight.stride(0),
        weight.stride(1),
        positions,
        *rows.arguments,
        deferred.rows,
        grads.views,
        **deferred.constants,
        MOMENTS=grads.views > 0,
        PRECISION=precision(),
        IMAGES=in_tile and power_of_two(in_tile, 16, block_m),
        ROWS_PER_LOAD=min(block_m, 32 * warps * (16 // dtype.itemsize) // block_i),
        VECTORIZED=channels % 8 == out_channels % 8 == 0,
        WEIGHT_VECTORIZED=weight.stride(0) % 8 == 0,
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=warps,
        num_stages=2,
    )
    return partial, dgate


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
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    channels = assume_multiple_of(channels, VECTORIZED)
    out_channels = assume_multiple_of(out_channels, VECTORIZED)
    in_blocks = tl.cdiv(channels, BLOCK_I)
    blocks = tl.cdiv(out_channels, BLOCK_O) * in_blocks
    program = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    segment = program // parts
    view = segment * views // segments
    out_column = block // in_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    out_inside = out_column < out_channels
    center, mean_term, variance_factor = load_moment_gradients(
        mean, dmean, dvariance, view, out_column, out_channels, inverse_count, MOMENTS
    )
    column = block % in_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < channels
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    in_tile = tl.arange(0, BLOCK_M)
    accumulator = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        tile = segment * size + first
        row_inside = first + in_tile < size
        in_y = in_tile[:, None] * out_channels + out_column[None, :]
        out_valid = row_inside[:, None] & out_inside[None, :]
        offset_of_tile = tile.to(tl.int64) * out_channels
        e = load_output_gradient(
            dy + offset_of_tile, y + offset_of_tile, center, mean_term, variance_factor, in_y, out_valid, MOMENTS
        )
        valid = row_inside[:, None] & inside[None, :]
        in_x = in_tile[:, None] * channels + column[None, :]
        values = tl.load(x + tile.to(tl.int64) * channels + in_x, mask=valid, other=0.0)
        h = apply_activation(normalized(values, factor, offset, DEFERRED), ACT)
        if GATED:
            image = (tile + in_tile) // positions
            h *= tl.load(gate + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
        h = tl.where(valid, h, 0.0).to(x.dtype.element_ty)
        accumulator = tl.dot(tl.trans(e.to(h.dtype)), h, accumulator, input_precision=PRECISION)
    to = partial + program.to(tl.int64) * out_channels * channels + out_column[:, None] * channels + column[None, :]
    tl.store(to, accumulator, mask=out_inside[:, None] & inside[None, :])


def weight_gradient(grads: OutputGradient, deferred: Input) -> Tensor:
    """The programs' sums for the gradient of the weight's prefix, [programs, O, C]."""
    images, channels, height, width = deferred.x.shape
    out_channels = grads.y.shape[1]
    block_m, largest = (16, 32) if deferred.x.dtype == torch.float32 else (64, 64)
    block_o, block_i = power_of_two(out_channels, 16, largest), power_of_two(channels, 16, largest)
    blocks = triton.cdiv(out_channels, block_o) * triton.cdiv(channels, block_i)
    rows = Rows.split(images * height * width, max(grads.views, deferred.rows), block_m, blocks, deferred.x.device)
    partial = deferred.x.new_empty(rows.programs, out_channels, channels, dtype=torch.float32)
    launch(
        conv_moments_pointwise_weight_gradient_kernel,
        rows.programs * blocks,
        *grads.pointers,
        *deferred.pointers,
        partial,
        grads.inverse_count,
        channels,
        out_channels,
        height * width,
        *rows.arguments,
        deferred.rows,
        grads.views,
        **deferred.constants,
        MOMENTS=grads.views > 0,
        PRECISION=precision(),
        VECTORIZED=channels % 8 == out_channels % 8 == 0,
        BLOCK_M=rows.block,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_stages=2,
    )
    return partial


def precision() -> str:
    """The precision of fp32 products: "ieee", or "tf32" if the user has allowed it by either of torch's interfaces."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _tile(dtype: torch.dtype, columns: int, inner: int) -> tuple[int, int, int, int]:
    """Rows, columns and depth of a tile of the product, and the number of warps.

    fp32 products do not use tensor cores and are unrolled, so their tiles are small. Each block of columns loads and
    normalises its rows again, at a cost of about inner / 2 further columns. This favours wide blocks, unless their last
    block is mostly empty.
    """
    if dtype == torch.float32:
        return 32, power_of_two(columns, 16, 32), 16, 4
    if inner > DEEP and columns > 64:
        return 128, 128, 32, 8
    block = min((64, 32, 16), key=lambda block: triton.cdiv(columns, block) * (block + inner // 2))
    return 64, block, power_of_two(inner, 16, 32), 4
