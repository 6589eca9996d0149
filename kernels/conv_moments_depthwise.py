"""conv_moments for depthwise convolutions.

    forward: y[o] = sum over taps k of W[k] h[o stride - padding + k], h = act(scale x + shift) * gate; moments of y
    backward: e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt, dW = sum(h e), dh = sum(W e), dz = dh gate act'(z)
    if y was pooled, e also has the term dpool / positions scale act'(scale y + shift), with the scale and shift of y

Bound by memory: forward reads x and writes y; backward reads dy, y and x and writes dx. To approach that bound, each h
must be computed once or twice and each loaded value reused from registers. A lane processes a strip of an image, a few
columns wide, from top to bottom: the values of a row are used for all columns of the strip, and, in registers, for all
rows that the taps reach. Sums over positions stay in the lane's registers until the end of the program.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import (
    activation_gradient,
    apply_activation,
    load_moment_gradients,
    load_output_gradient,
    load_row,
    normalized,
    program_columns,
    store_sums,
)
from .launch import SIZES, Input, OutputGradient, Rows, launch, partial_sums
from .moments import PartialMoments

LARGEST_KERNEL = 7  # larger kernels' taps and accumulators would not fit into registers
# Per thread, if the kernel does not need more: three programs fit on a multiprocessor and hide each other's latency.
REGISTERS = 168


@triton.jit
def _load_taps(taps, column, channels, KERNEL: tl.constexpr, BLOCK_P: tl.constexpr):
    """All taps of these channels, each broadcast over the lanes: [BLOCK_P, columns]."""
    # The layout of activations, for loads of the same width.
    columns = tl.broadcast_to(column[None, :], (BLOCK_P, column.shape[0]))
    kernel = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        kernel = kernel + (tl.load(taps + tap * channels + columns, mask=columns < channels, other=0.0),)
    return kernel


@triton.jit
def _add_at(items, at: tl.constexpr, product):
    """The tuple items, with product added to items[at]."""
    return items[:at] + (items[at] + product,) + items[at + 1 :]


@triton.jit
def _store_row(
    accumulators, to_y, row, first, left, inside, out_width, channels, pivot, total, squares,
    MOMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores a complete row of y, if row >= 0, adds it to the lanes' moments, and shifts the accumulators by one row.

    The pivot of a lane's moments is the first value that it stores.
    """
    if row >= 0:
        for c in tl.static_range(COLUMNS):
            valid = (left + c < out_width)[:, None] & inside[None, :]
            stored = accumulators[c].to(to_y.dtype.element_ty)
            tl.store(to_y + (row * out_width + c) * channels, stored, mask=valid)
            if MOMENTS:
                value = stored.to(tl.float32)
                if c == 0:
                    pivot = tl.where((first == 0) & (row == 0), value, pivot)
                deviations = tl.where(valid, value - pivot, 0.0)
                total += deviations
                squares += deviations * deviations
    fresh = (tl.zeros(pivot.shape, tl.float32),)
    return accumulators[COLUMNS:] + fresh * COLUMNS, pivot, total, squares


@triton.jit(do_not_specialize=SIZES)
def conv_moments_depthwise_kernel(
    x,  # [N, H, W, C]
    scale,  # [scale_rows, C]
    shift,
    gate,  # [N, C]
    taps,  # [k k, C]
    y,  # [N, H', W', C]
    partial,  # [2, programs, C]
    channels,
    height,
    width,
    out_height,
    out_width,
    padding,
    size,
    parts,
    images,
    segments,
    scale_rows,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    VECTORIZED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROWS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE  # rows of y that a row of x reaches, at most
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    segment = program // parts
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    begin = program % parts * images
    first_image = (segment * size + begin).to(tl.int64)
    strips = tl.cdiv(out_width, COLUMNS)
    lanes = tl.minimum(images, size - begin) * strips
    # Steps over rows of y. The first steps complete no row; the last ones only store rows, without reading x.
    end = out_height + ROWS - 1
    bottom = tl.minimum(tl.cdiv(height + padding, STRIDE), end)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    # Each lane has a pivot near its values, so that sums of deviations do not cancel.
    pivot, total, squares = zero, zero, zero
    count = tl.zeros((BLOCK_P,), tl.int32)
    gates = zero
    kernel = _load_taps(taps, column, channels, KERNEL, BLOCK_P)
    for first in range(0, lanes, BLOCK_P):
        lane = first + tl.arange(0, BLOCK_P)
        image = lane // strips
        left = tl.where(lane < lanes, lane % strips * COLUMNS, out_width)  # surplus lanes are outside of the image
        left_of_x = tl.where(lane < lanes, left * STRIDE - padding, width)
        count += tl.minimum(out_width - left, COLUMNS) * out_height
        image = image.to(tl.int64) + first_image
        if GATED:
            valid = (lane < lanes)[:, None] & inside[None, :]
            gates = tl.load(gate + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
        to_y = y + (image * (out_height * out_width) + left)[:, None] * channels + column[None, :]
        from_x = x + (image * (height * width) + left_of_x)[:, None] * channels + column[None, :]
        accumulators = (zero,) * (ROWS * COLUMNS)
        for step in range(tl.minimum(padding // STRIDE, ROWS - 1), bottom):
            for d in tl.static_range(STRIDE):
                row = step * STRIDE - padding + d
                right = tl.where((row >= 0) & (row < height), width, 0)
                hs = ()
                for at in tl.static_range((COLUMNS - 1) * STRIDE + KERNEL):
                    valid = ((left_of_x + at >= 0) & (left_of_x + at < right))[:, None] & inside[None, :]
                    values = tl.load(from_x + (row * width + at) * channels, mask=valid, other=0.0)
                    h = apply_activation(normalized(values, factor, offset, DEFERRED), ACT)
                    if GATED:
                        h *= gates
                    hs = hs + (tl.where(valid, h, 0.0),)
                for a in tl.static_range(ROWS):
                    for kx in tl.static_range(KERNEL):
                        if d + (ROWS - 1 - a) * STRIDE < KERNEL:
                            w = kernel[(d + (ROWS - 1 - a) * STRIDE) * KERNEL + kx]
                            for c in tl.static_range(COLUMNS):
                                accumulators = _add_at(accumulators, a * COLUMNS + c, hs[c * STRIDE + kx] * w)
            accumulators, pivot, total, squares = _store_row(
                accumulators, to_y, step - (ROWS - 1), first, left, inside, out_width, channels, pivot, total, squares,
                MOMENTS, COLUMNS,
            )  # fmt: skip
        for step in range(bottom, end):
            accumulators, pivot, total, squares = _store_row(
                accumulators, to_y, step - (ROWS - 1), first, left, inside, out_width, channels, pivot, total, squares,
                MOMENTS, COLUMNS,
            )  # fmt: skip
    if MOMENTS:
        n = count.to(tl.float32)[:, None]
        mean = pivot + total / tl.maximum(n, 1.0)
        average = tl.sum(mean * n, 0) / tl.sum(count, 0)
        deviations = mean - average[None, :]
        within = squares - total * total / tl.maximum(n, 1.0) + deviations * deviations * n
        squares = tl.sum(within, 0) / (out_height * out_width)  # merge_moments weights by images instead of elements
        store_sums(partial, program, segments * parts, channels, column, average, squares)


def forward(deferred: Input, weight: Tensor, y: Tensor, stride: int, padding: int, views: int) -> PartialMoments:
    """Fills y [N, C, H', W'] from x [N, C, H, W], both channels-last; returns its moments, of each view."""
    images, channels, height, width = deferred.x.shape
    kernel = weight.shape[2]
    max_columns = 4 if kernel <= 3 else 3 if stride == 1 else 2
    tile = _tile(channels, y.shape[3], max_columns, 512 if kernel <= 3 and stride == 1 else 256)
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    block = max(1, tile["BLOCK_P"] // triton.cdiv(y.shape[3], tile["COLUMNS"]))
    rows = Rows.split(images, max(views, deferred.rows), block, blocks, deferred.x.device)
    partial = PartialMoments.empty(rows, channels, y) if views else PartialMoments.none(y)
    launch(
        conv_moments_depthwise_kernel,
        rows.programs * blocks,
        *deferred.pointers,
        _taps(weight, channels),
        y,
        partial.values,
        channels,
        height,
        width,
        y.shape[2],
        y.shape[3],
        padding,
        rows.size,
        rows.parts,
        rows.tiles * rows.block,
        rows.segments,
        deferred.rows,
        **deferred.constants,
        MOMENTS=views > 0,
        KERNEL=kernel,
        STRIDE=stride,
        VECTORIZED=channels % 8 == 0,
        **tile,
        maxnreg=REGISTERS if kernel <= 5 else None,
    )
    return partial


@triton.jit
def _backward_element(
    window, kernel, h, dtaps_sums, row: tl.constexpr, column: tl.constexpr, INPUT: tl.constexpr, WEIGHT: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, REACH: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """For one h: its gradient dh, and dtaps_sums with its contributions to the taps' gradients added.

    row, column: the position of h in its STRIDE rows and in its strip.
    """
    dh = tl.zeros(h.shape, tl.float32)
    for i in tl.static_range(REACH):
        for j in tl.static_range(REACH):
            if row + i * STRIDE < KERNEL and column % STRIDE + j * STRIDE < KERNEL:
                e = window[(REACH - 1 - i) * WINDOW + column // STRIDE + REACH - 1 - j]
                if INPUT:
                    dh += e * kernel[(row + i * STRIDE) * KERNEL + column % STRIDE + j * STRIDE]
                if WEIGHT:
                    dtaps_sums = _add_at(dtaps_sums, (row + i * STRIDE) * KERNEL + column % STRIDE + j * STRIDE, e * h)
    return dh, dtaps_sums


@triton.jit(do_not_specialize=SIZES)
def conv_moments_depthwise_backward_kernel(
    dy,  # [N, H', W', C]
    dmean,  # [views, C]
    dvariance,
    y,
    mean,
    x,  # [N, H, W, C]
    scale,  # [scale_rows, C]
    shift,
    gate,  # [N, C]
    pooled_grad,  # [N, C]
    pooled_scale,  # [pooled_rows, C]
    pooled_shift,
    taps,  # [k k, C]
    dx,
    partial,  # [2, programs, C]: sums for scale and shift
    dgate,  # [N, strips, C]
    dtaps,  # [programs, k k, C]
    inverse_count,
    channels,
    height,
    width,
    out_height,
    out_width,
    padding,
    size,
    parts,
    images,
    segments,
    scale_rows,
    pooled_rows,
    views,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    POOLED: tl.constexpr,  # the activation function before the mean; "" if y was not pooled
    POOLED_DEFERRED: tl.constexpr,
    MOMENTS: tl.constexpr,
    INPUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    VECTORIZED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The tap d + b STRIDE connects x at q STRIDE - padding + d with e at q - b, in rows and in columns.
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    WINDOW: tl.constexpr = COLUMNS + REACH - 1
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    segment = program // parts
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    center, mean_term, variance_factor = load_moment_gradients(
        mean, dmean, dvariance, segment * views // segments, column, channels, inverse_count, MOMENTS
    )
    pooled_factor, pooled_offset = 1.0, 0.0
    if POOLED != "":
        pooled_factor, pooled_offset = load_row(
            pooled_scale, pooled_shift, segment * pooled_rows // segments, column, inside, channels, POOLED_DEFERRED
        )
    begin = program % parts * images
    first_image = (segment * size + begin).to(tl.int64)
    edge = padding // STRIDE
    strips = tl.cdiv((width - 1 + padding) // STRIDE - edge + 1, COLUMNS)
    lanes = tl.minimum(images, size - begin) * strips
    kernel = _load_taps(taps, column, channels, KERNEL, BLOCK_P)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dtaps_sums = (zero,) * (KERNEL * KERNEL)
    dscale, dshift, gates, pooled_share = zero, zero, zero, zero
    for first in range(0, lanes, BLOCK_P):
        lane = first + tl.arange(0, BLOCK_P)
        image = (lane // strips).to(tl.int64) + first_image
        # Surplus lanes are outside of the image.
        left = tl.where(lane < lanes, edge + lane % strips * COLUMNS, width + padding + out_width + REACH)
        left_of_e = left - (REACH - 1)
        left_of_x = left * STRIDE - padding
        in_y = (image * (out_height * out_width) + left_of_e)[:, None] * channels + column[None, :]
        in_x = (image * (height * width) + left_of_x)[:, None] * channels + column[None, :]
        from_dy, from_y, from_x, to_dx = dy + in_y, y + in_y, x + in_x, dx + in_x
        in_gate = image[:, None] * channels + column[None, :]
        in_lanes = (lane < lanes)[:, None] & inside[None, :]
        if GATED:
            gates = tl.load(gate + in_gate, mask=in_lanes, other=0.0)
        if POOLED != "":
            pooled_share = tl.load(pooled_grad + in_gate, mask=in_lanes, other=0.0)
            pooled_share *= pooled_factor / (out_height * out_width)
        dgate_sum = zero
        window = (zero,) * (REACH * WINDOW)
        for step in range(edge - (REACH - 1), (height - 1 + padding) // STRIDE + 1):
            window = window[WINDOW:]
            right = tl.where((step >= 0) & (step < out_height), out_width, 0)
            for at in tl.static_range(WINDOW):
                valid = ((left_of_e + at >= 0) & (left_of_e + at < right))[:, None] & inside[None, :]
                to = (step * out_width + at) * channels
                e = load_output_gradient(
                    from_dy, from_y, center, mean_term, variance_factor, to, valid, MOMENTS,
                    pooled_share, pooled_factor, pooled_offset, POOLED,
                )  # fmt: skip
                window = window + (e,)
            if step >= edge:
                for d in tl.static_range(STRIDE):
                    row = step * STRIDE - padding + d
                    right = tl.where((row >= 0) & (row < height), width, 0)
                    for at in tl.static_range(COLUMNS * STRIDE):
                        valid = ((left_of_x + at >= 0) & (left_of_x + at < right))[:, None] & inside[None, :]
                        to = (row * width + at) * channels
                        values = tl.load(from_x + to, mask=valid, other=0.0).to(tl.float32)
                        z = normalized(values, factor, offset, DEFERRED)
                        h = apply_activation(z, ACT)
                        dh, dtaps_sums = _backward_element(
                            window, kernel, tl.where(valid, h * gates if GATED else h, 0.0), dtaps_sums, d, at,
                            INPUT, WEIGHT, KERNEL, STRIDE, REACH, WINDOW,
                        )  # fmt: skip
                        if INPUT:
                            if GATED:
                                dgate_sum += tl.where(valid, dh * h, 0.0)
                                dh *= gates
                            dz = tl.where(valid, dh * activation_gradient(z, ACT), 0.0)
                            dscale += dz * values
                            dshift += dz
                            tl.store(to_dx + to, (dz * factor).to(dx.dtype.element_ty), mask=valid)
        if INPUT and GATED:
            to = dgate + (image * strips + lane % strips)[:, None] * channels + column[None, :]
            tl.store(to, dgate_sum, mask=in_lanes)
    if INPUT and DEFERRED:
        store_sums(partial, program, segments * parts, channels, column, tl.sum(dscale, 0), tl.sum(dshift, 0))
    if WEIGHT:
        for tap in tl.static_range(KERNEL * KERNEL):
            to = dtaps + (program.to(tl.int64) * (KERNEL * KERNEL) + tap) * channels + column
            tl.store(to, tl.sum(dtaps_sums[tap], 0), mask=inside)


def backward(
    grads: OutputGradient,
    deferred: Input,
    pooled: Input,
    weight: Tensor,
    dx: Tensor | None,
    stride: int,
    padding: int,
    weight_gradient: bool,
) -> tuple[Sequence[Tensor], Tensor]:
    """Fills dx, unless it is None. pooled: y as it was pooled; its gate is the gradient of the mean, or None.

    Returns the programs' sums for scale and shift [programs, C], for the gate [N strips, C], and for the weight
    [programs, k k, C], which are empty without weight_gradient.
    """
    images, channels, height, width = deferred.x.shape
    kernel = weight.shape[2]
    columns = (width - 1 + padding) // stride - padding // stride + 1  # in units of the stride, as in the kernel
    # The pooled term needs registers that a lane of 4 columns and 5 x 5 taps does not have.
    max_columns = 4 if kernel <= 3 or (kernel <= 5 and stride == 1 and pooled.gate is None) else 3
    tile = _tile(channels, columns, max_columns, 256 if kernel <= 5 else 128)
    strips = triton.cdiv(columns, tile["COLUMNS"])
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    segments = math.lcm(max(grads.views, 1), deferred.rows, pooled.rows)
    rows = Rows.split(images, segments, max(1, tile["BLOCK_P"] // strips), blocks, deferred.x.device)
    partial = partial_sums(2, rows, channels, deferred.x)
    dgate = deferred.x.new_empty(images * strips if deferred.gate is not None else 0, channels, dtype=torch.float32)
    dtaps = deferred.x.new_empty(
        rows.programs if weight_gradient else 0, kernel * kernel, channels, dtype=torch.float32
    )
    launch(
        conv_moments_depthwise_backward_kernel,
        rows.programs * blocks,
        *grads.pointers,
        *deferred.pointers,
        pooled.pointers[3],
        *pooled.pointers[1:3],
        _taps(weight, channels),
        deferred.x if dx is None else dx,
        partial,
        dgate,
        dtaps,
        grads.inverse_count,
        channels,
        height,
        width,
        *grads.y.shape[2:],
        padding,
        rows.size,
        rows.parts,
        rows.tiles * rows.block,
        rows.segments,
        deferred.rows,
        pooled.rows,
        grads.views,
        **deferred.constants,
        POOLED="" if pooled.gate is None else pooled.act,
        POOLED_DEFERRED=pooled.scale is not None,
        MOMENTS=grads.views > 0,
        INPUT=dx is not None,
        WEIGHT=weight_gradient,
        KERNEL=kernel,
        STRIDE=stride,
        VECTORIZED=channels % 8 == 0,
        **tile,
        maxnreg=REGISTERS if kernel <= 3 else None,
    )
    return (*partial, dgate), dtaps


def _taps(weight: Tensor, channels: int) -> Tensor:
    """The weight's prefix [C, 1, k, k] in the layout of the kernels: [k k, C] in fp32."""
    return weight[:channels].flatten(1).t().float().contiguous()


def _tile(channels: int, width: int, columns: int, size: int) -> dict[str, int]:
    """The columns of a lane, at most `columns`, and the lanes and channels of a tile, chosen for the fewest idle lanes.

    size: lanes times channels, distributed evenly over the program's threads. The registers of a thread limit it: their
    number grows with the columns of a lane, the channels of a thread and the kernel.
    """
    columns = min(range(columns, 1, -1), key=lambda n: triton.cdiv(width, n) * n)
    block = min((64, 32, 16), key=lambda n: triton.cdiv(channels, n) * n)
    return {"COLUMNS": columns, "BLOCK_P": size // block, "BLOCK_C": block}
