"""conv_moments for 1 x 1 kernels, backward: matrix products with many rows, bound by memory at the sizes of MobileNets.

    e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt, dh = e W, dW = e^T h, dz = dh gate act'(z)

Two kernels compute dx and dW, and each reads dy, y and x. If the weight has at most FUSED elements, one kernel computes
both: dW then stays in registers. As in the forward, the kernel for dx exists in a `wide` form, whose programs keep rows
of e on the chip, and in one with a program per block of columns. Programs store partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_moments_pointwise import DEEP, load_prefix, precision, product_tile, wide_tile
from .deferred import (
    activation_gradient,
    apply_activation,
    assume_multiple_of,
    load_moment_gradients,
    load_output_gradient,
    load_row,
    normalized,
    program_columns,
    reduce_rows,
    store_sums,
    sum_per_image,
)
from .launch import SIZES, WAVES, Input, OutputGradient, Rows, launch, partial_sums, power_of_two

FUSED = 1 << 13  # elements of the largest weight gradient that stays in the registers of a program


@triton.jit
def _load_output_tile(
    dy, y, mean, dmean, dvariance, view, tile, row, row_inside, out_column, out_channels, inverse_count,
    MOMENTS: tl.constexpr,
):  # fmt: skip
    """e of a tile's rows and these output channels, in the dtype of y; 0 outside."""
    center, mean_term, variance_factor = load_moment_gradients(
        mean, dmean, dvariance, view, out_column, out_channels, inverse_count, MOMENTS
    )
    valid = row_inside[:, None] & (out_column < out_channels)[None, :]
    offsets = row[:, None] * out_channels + out_column[None, :]
    first = tile * out_channels
    e = load_output_gradient(dy + first, y + first, center, mean_term, variance_factor, offsets, valid, MOMENTS)
    return e.to(y.dtype.element_ty)


@triton.jit
def _store_input_gradient(
    dh, x, gate, dx, dgate, factor, offset, gates, tile, first_image, images, image, row, row_inside, column, inside,
    channels, ACT: tl.constexpr, DEFERRED: tl.constexpr, GATED: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Stores dx of a tile and, if IMAGES, dgate of its images.

    Returns x, dz, the activation with its gate, and dh times the activation without it.
    """
    # Rows outside of the segment have e = 0, hence dh = 0.
    valid = row_inside[:, None] & inside[None, :]
    in_x = row[:, None] * channels + column[None, :]
    values = tl.load(x + tile * channels + in_x, mask=valid, other=0.0).to(tl.float32)
    z = normalized(values, factor, offset, DEFERRED)
    h = apply_activation(z, ACT)
    to_gate = dh
    if GATED:
        to_gate = dh * h
        if IMAGES:
            offset_of_tile = first_image * channels
            image_dgate = sum_per_image(to_gate, image, row_inside, IMAGES, x.dtype.element_ty != tl.float32)
            in_tile = tl.arange(0, IMAGES)
            tl.store(
                dgate + offset_of_tile + in_tile[:, None] * channels + column[None, :],
                image_dgate,
                mask=(in_tile < images)[:, None] & inside[None, :],
            )
            in_gate = offset_of_tile + image[:, None] * channels + column[None, :]
            gates = tl.load(gate + in_gate, mask=valid, other=0.0)
        dh *= gates
        h *= gates
    dz = dh * activation_gradient(z, ACT)
    tl.store(dx + tile * channels + in_x, (dz * factor).to(dx.dtype.element_ty), mask=valid)
    return values, dz, tl.where(valid, h, 0.0), to_gate


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
    dweight,  # [programs, O, C], if WEIGHT
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
    WEIGHT: tl.constexpr,  # whether to compute the weight's gradient too; all channels are then in one block
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
    gates = factor
    if GATED and IMAGES == 0:
        gate_sum = tl.zeros((ROWS_PER_LOAD, BLOCK_I), tl.float32)
        gates = tl.load(gate + segment * channels + column, mask=inside, other=0.0)[None, :]
    all_out = tl.arange(0, BLOCK_O)
    if WEIGHT:
        weight_sum = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    begin = program % parts * tiles * step
    # Tiles recompute loop invariants: there are no registers left to keep them.
    for first in tl.range(begin, tl.minimum(begin + tiles * step, size), step, disable_licm=True):
        tile = (segment * size + first).to(tl.int64)
        first_image = segment * size + first
        row_inside = first + row < size
        if IMAGES:
            tile *= positions
            row_inside = image < tl.minimum(step, size - first)
        dh = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        if WEIGHT:
            e = _load_output_tile(
                dy,
                y,
                mean,
                dmean,
                dvariance,
                view,
                tile,
                row,
                row_inside,
                all_out,
                out_channels,
                inverse_count,
                MOMENTS,
            )
            prefix = load_prefix(weight, all_out, all_out < out_channels, column, inside, stride_o, stride_i)
            dh = tl.dot(e, prefix.to(e.dtype), dh, input_precision=PRECISION)
        else:
            for first_out in range(0, out_channels, BLOCK_O):
                out_column = first_out + tl.arange(0, BLOCK_O)
                e = _load_output_tile(
                    dy, y, mean, dmean, dvariance, view, tile, row, row_inside, out_column, out_channels,
                    inverse_count, MOMENTS,
                )  # fmt: skip
                prefix = load_prefix(weight, out_column, out_column < out_channels, column, inside, stride_o, stride_i)
                dh = tl.dot(e, prefix.to(e.dtype), dh, input_precision=PRECISION)
        values, dz, h, to_gate = _store_input_gradient(
            dh, x, gate, dx, dgate, factor, offset, gates, tile, first_image, tl.minimum(step, size - first), image,
            row, row_inside, column, inside, channels, ACT, DEFERRED, GATED, IMAGES,
        )  # fmt: skip
        if GATED and IMAGES == 0:
            gate_sum += reduce_rows(to_gate, ROWS_PER_LOAD)
        if DEFERRED:
            dscale += reduce_rows(dz * values, ROWS_PER_LOAD)
            dshift += reduce_rows(dz, ROWS_PER_LOAD)
        if WEIGHT:
            weight_sum = tl.dot(tl.trans(e), h.to(e.dtype), weight_sum, input_precision=PRECISION)
    if DEFERRED:
        store_sums(partial, program, segments * parts, channels, column, tl.sum(dscale, 0), tl.sum(dshift, 0))
    if GATED and IMAGES == 0:
        tl.store(dgate + program * channels + column, tl.sum(gate_sum, 0), mask=inside)
    if WEIGHT:
        to = dweight + program.to(tl.int64) * out_channels * channels
        valid = (all_out < out_channels)[:, None] & inside[None, :]
        tl.store(to + all_out[:, None] * channels + column[None, :], weight_sum, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def conv_moments_pointwise_wide_input_gradient_kernel(
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
    dweight,  # not used
    inverse_count,
    channels,
    out_channels,
    stride_o,
    stride_i,
    positions,
    size,
    parts,
    tiles,  # 1
    segments,
    scale_rows,
    views,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT: tl.constexpr,  # False
    IMAGES: tl.constexpr,
    ROWS_PER_LOAD: tl.constexpr,
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
    row = tl.arange(0, BLOCK_M)
    image = row // positions
    step = BLOCK_M // positions if IMAGES else BLOCK_M
    first = program % parts * step
    first_image = segment * size + first
    tile = first_image.to(tl.int64)
    row_inside = first + row < size
    if IMAGES:
        tile *= positions
        row_inside = image < tl.minimum(step, size - first)
    es = ()
    for chunk in tl.static_range(CHUNKS):
        out_column = chunk * BLOCK_O + tl.arange(0, BLOCK_O)
        e = _load_output_tile(
            dy, y, mean, dmean, dvariance, segment * views // segments, tile, row, row_inside, out_column, out_channels,
            inverse_count, MOMENTS,
        )  # fmt: skip
        es = es + (e,)
    for first_in in range(0, channels, BLOCK_I):
        column = first_in + tl.arange(0, BLOCK_I)
        inside = column < channels
        dh = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            out_column = chunk * BLOCK_O + tl.arange(0, BLOCK_O)
            prefix = load_prefix(weight, out_column, out_column < out_channels, column, inside, stride_o, stride_i)
            dh = tl.dot(es[chunk], prefix, dh, input_precision=PRECISION)
        factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
        gates = factor
        if GATED and IMAGES == 0:
            gates = tl.load(gate + segment * channels + column, mask=inside, other=0.0)[None, :]
        values, dz, _, to_gate = _store_input_gradient(
            dh, x, gate, dx, dgate, factor, offset, gates, tile, first_image, tl.minimum(step, size - first), image,
            row, row_inside, column, inside, channels, ACT, DEFERRED, GATED, IMAGES,
        )  # fmt: skip
        if DEFERRED:
            of_scale = tl.sum(reduce_rows(dz * values, ROWS_PER_LOAD), 0)
            of_shift = tl.sum(reduce_rows(dz, ROWS_PER_LOAD), 0)
            store_sums(partial, program, segments * parts, channels, column, of_scale, of_shift)
        if GATED and IMAGES == 0:
            tl.store(dgate + program * channels + column, tl.sum(reduce_rows(to_gate, ROWS_PER_LOAD), 0), mask=inside)


def input_gradient(
    grads: OutputGradient, deferred: Input, weight: Tensor, dx: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fills dx. Returns the programs' sums for scale and shift, [2, programs, C], and the gate's gradient [N, C] or the
    programs' sums for it, [programs, C]; a program then processes rows of a single image. With weight_gradient also
    the programs' sums for it, [programs, O, C], if it is small, otherwise None."""
    images, channels, height, width = deferred.x.shape
    out_channels, positions, dtype = grads.y.shape[1], height * width, deferred.x.dtype
    gated, fp32 = deferred.gate is not None, dtype == torch.float32
    kernel, waves = conv_moments_pointwise_input_gradient_kernel, WAVES
    tile = _fused_tile(dtype, channels, out_channels) if weight_gradient else {}
    fused = bool(tile)
    if fused:  # each program stores a partial sum of the whole weight gradient
        waves = min(WAVES, 2 * FUSED // (tile["BLOCK_I"] * tile["BLOCK_O"]))
    elif tile := wide_tile(dtype, out_channels, channels, "BLOCK_O", "BLOCK_I"):
        kernel, waves = conv_moments_pointwise_wide_input_gradient_kernel, None
    else:  # tiles for deep products have no registers left for gates
        inner = min(out_channels, DEEP) if gated else out_channels
        tile = product_tile(dtype, channels, inner, "BLOCK_I", "BLOCK_O")
        if deferred.scale is not None:  # nor for the sums of large tiles
            tile["BLOCK_M"] = min(tile["BLOCK_M"], 64)
    if fused or waves is None:
        weight = weight[:out_channels, :channels].to(dtype)
    if gated and not fp32 and not fused:  # the tile size that whole images fill best
        block_m = max((64, 128) if waves else (128, 64), key=lambda rows: rows // positions * positions / rows)
        tile |= {"BLOCK_M": block_m, "num_warps": block_m // 16}
    block_m = tile["BLOCK_M"]
    blocks = 1 if waves is None else triton.cdiv(channels, tile["BLOCK_I"])
    views, device = max(grads.views, deferred.rows), deferred.x.device
    in_tile = block_m // positions if gated else 0
    if in_tile:
        rows = Rows.split(images, views, in_tile, blocks, device, waves)
    else:  # with a gate, a program processes rows of one image, over which the gate's gradient is a sum
        rows = Rows.split(images * positions, images if gated else views, block_m, blocks, device, waves)
    partial = partial_sums(2, rows, channels, deferred.x)
    dgate = deferred.x.new_empty(images if in_tile else rows.programs, channels, dtype=torch.float32)
    dweight = deferred.x.new_empty(rows.programs if fused else 0, out_channels, channels, dtype=torch.float32)
    launch(
        kernel,
        rows.programs * blocks,
        *grads.pointers,
        weight,
        *deferred.pointers,
        dx,
        partial,
        dgate,
        dweight,
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
        WEIGHT=fused,
        IMAGES=in_tile and power_of_two(in_tile, 16, block_m),
        ROWS_PER_LOAD=min(block_m, 32 * tile["num_warps"] * (16 // dtype.itemsize) // tile["BLOCK_I"]),
        VECTORIZED=channels % 8 == out_channels % 8 == 0,
        WEIGHT_VECTORIZED=weight.stride(0) % 8 == 0,
        **tile,
    )
    return partial, dgate, dweight if fused else None


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
    block_m, largest = (16, 32) if deferred.x.dtype == torch.float32 else (64, 128)
    block_m = (
        max(block_m // 2, 16) if deferred.gate is not None else block_m
    )  # tiles of the gate need shared memory too
    block_o, block_i = power_of_two(out_channels, 16, largest), power_of_two(channels, 16, largest)
    blocks = triton.cdiv(out_channels, block_o) * triton.cdiv(channels, block_i)
    # Fewer programs for larger tiles: together their partial sums have the size of WAVES tiles of 64 x 64 elements.
    waves = min(WAVES, WAVES * 64 * 64 // (block_o * block_i))
    rows = Rows.split(
        images * height * width, max(grads.views, deferred.rows), block_m, blocks, deferred.x.device, waves
    )
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
        num_warps=8 if block_o * block_i > 64 * 64 else 4,
        num_stages=2,
    )
    return partial


def _fused_tile(dtype: torch.dtype, channels: int, out_channels: int) -> dict[str, int]:
    """The tile of the kernel that computes both gradients; empty if the weight's gradient is too large, or for fp32."""
    block_i, block_o = triton.next_power_of_2(max(channels, 16)), triton.next_power_of_2(max(out_channels, 16))
    if dtype == torch.float32 or block_i * block_o > FUSED:
        return {}
    block_m, warps = (64, 4) if block_i == 16 else (32, 8)
    stages = 2 if block_i * block_o <= 64 * 64 else 1
    return {"BLOCK_M": block_m, "BLOCK_O": block_o, "BLOCK_I": block_i, "num_warps": warps, "num_stages": stages}
