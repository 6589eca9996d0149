"""conv_moments for depthwise convolutions: bound by memory, if h is formed seldom and what is read is kept.

A lane is a strip of an image, some columns wide, of a few channels, and walks down its rows. What it has read of a row
serves all columns of the strip and, in registers, all rows that the taps reach. Sums over positions stay in the lane
until the program ends.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import (
    activation_gradient,
    apply_activation,
    columns_of,
    load_moment_gradients,
    load_output_gradient,
    load_row,
    normalized,
    store_sums,
)
from .launch import SIZES, Input, OutputGradient, Rows, launch, partial_sums
from .moments import merge_moments, partial_moments

LARGEST_KERNEL = 7  # whose taps and accumulators the registers hold
# Of a thread, where as many do: three programs then share a multiprocessor, and work while others wait for memory.
REGISTERS = 168


@triton.jit
def _load_kernel(taps, column, channels, KERNEL: tl.constexpr, BLOCK_P: tl.constexpr):
    """Every tap of these channels, for all lanes."""
    columns = tl.broadcast_to(column[None, :], (BLOCK_P, column.shape[0]))  # loads as wide as those of activations
    kernel = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        kernel = kernel + (tl.load(taps + tap * channels + columns, mask=columns < channels, other=0.0),)
    return kernel


@triton.jit
def _added(items, at: tl.constexpr, product):
    """The items, with this added to one of them."""
    return items[:at] + (items[at] + product,) + items[at + 1 :]


@triton.jit
def _complete(
    accumulators, to_y, row, first, left, inside, out_width, channels, pivot, total, squares,
    MOMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores the row of y that no other row of x reaches, if it is one, and adds it to the lanes' moments, whose pivot
    is the first value of the program's first tile. The next row's accumulators become the first."""
    if row >= 0:
        for c in tl.static_range(COLUMNS):
            valid = (left + c < out_width)[:, None] & inside[None, :]
            stored = accumulators[c].to(to_y.dtype.element_ty)
            tl.store(to_y + (row * out_width + c) * channels, stored, mask=valid)
            if MOMENTS:
                value = stored.to(tl.float32)
                if c == 0:
                    pivot = tl.where((first == 0) & (row == 0), value, pivot)
                apart = tl.where(valid, value - pivot, 0.0)
                total += apart
                squares += apart * apart
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
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROWS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE  # of y that a row of x reaches, at most
    channels, program, column, inside = columns_of(channels, WIDE, BLOCK_C)
    segment = program // parts
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    begin = program % parts * images
    before = (segment * size + begin).to(tl.int64)
    strips = tl.cdiv(out_width, COLUMNS)
    lanes = tl.minimum(images, size - begin) * strips
    # Of rows of y: the first steps only begin some, the last only complete them.
    end = out_height + ROWS - 1
    bottom = tl.minimum(tl.cdiv(height + padding, STRIDE), end)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    # Sums of deviations lose nothing where they are from a value of the lane's own.
    pivot, total, squares = zero, zero, zero
    count = tl.zeros((BLOCK_P,), tl.int32)
    gates = zero
    kernel = _load_kernel(taps, column, channels, KERNEL, BLOCK_P)
    for first in range(0, lanes, BLOCK_P):
        lane = first + tl.arange(0, BLOCK_P)
        image = lane // strips
        left = tl.where(lane < lanes, lane % strips * COLUMNS, out_width)  # lanes too many are beyond the edge
        left_of_x = tl.where(lane < lanes, left * STRIDE - padding, width)
        count += tl.minimum(out_width - left, COLUMNS) * out_height
        image = image.to(tl.int64) + before
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
                                accumulators = _added(accumulators, a * COLUMNS + c, hs[c * STRIDE + kx] * w)
            accumulators, pivot, total, squares = _complete(
                accumulators, to_y, step - (ROWS - 1), first, left, inside, out_width, channels, pivot, total, squares,
                MOMENTS, COLUMNS,
            )  # fmt: skip
        for step in range(bottom, end):
            accumulators, pivot, total, squares = _complete(
                accumulators, to_y, step - (ROWS - 1), first, left, inside, out_width, channels, pivot, total, squares,
                MOMENTS, COLUMNS,
            )  # fmt: skip
    if MOMENTS:
        n = count.to(tl.float32)[:, None]
        mean = pivot + total / tl.maximum(n, 1.0)
        average = tl.sum(mean * n, 0) / tl.sum(count, 0)
        apart = mean - average[None, :]
        within = squares - total * total / tl.maximum(n, 1.0) + apart * apart * n
        programs = segments * parts
        to = partial + program * channels + column
        tl.store(to, average, mask=inside)
        # merge_moments counts images.
        tl.store(to + programs * channels, tl.sum(within, 0) / (out_height * out_width), mask=inside)


def forward(deferred: Input, weight: Tensor, y: Tensor, stride: int, padding: int, views: int) -> tuple[Tensor, Tensor]:
    """Fills y [N, C, H', W'] from x [N, C, H, W], both channels-last; returns mean and variance [views, C]."""
    images, channels, height, width = deferred.x.shape
    kernel = weight.shape[2]
    most = 4 if kernel <= 3 else 3 if stride == 1 else 2
    tile = _tile(channels, y.shape[3], most, 512 if kernel <= 3 and stride == 1 else 256)
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    block = max(1, tile["BLOCK_P"] // triton.cdiv(y.shape[3], tile["COLUMNS"]))
    rows = Rows.share(images, max(views, deferred.rows), block, blocks, deferred.x.device)
    partial = partial_moments(rows, channels, deferred.x) if views else deferred.x
    launch(
        conv_moments_depthwise_kernel,
        rows.programs * blocks,
        *deferred.pointers,
        _taps(weight, channels),
        y,
        partial,
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
        WIDE=channels % 8 == 0,
        **tile,
        maxnreg=REGISTERS if kernel <= 5 else None,
    )
    if views:
        return merge_moments(partial, rows)
    nothing = deferred.x.new_empty(0, channels, dtype=torch.float32)
    return nothing, nothing.clone()


@triton.jit
def _meet(
    window, kernel, h, to_taps, row: tl.constexpr, column: tl.constexpr, INPUT: tl.constexpr, WEIGHT: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, REACH: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The gradient of an h at (row, column) of its block and strip; what h adds to the taps' gradients, added."""
    dh = tl.zeros(h.shape, tl.float32)
    for i in tl.static_range(REACH):
        for j in tl.static_range(REACH):
            if row + i * STRIDE < KERNEL and column % STRIDE + j * STRIDE < KERNEL:
                e = window[(REACH - 1 - i) * WINDOW + column // STRIDE + REACH - 1 - j]
                if INPUT:
                    dh += e * kernel[(row + i * STRIDE) * KERNEL + column % STRIDE + j * STRIDE]
                if WEIGHT:
                    to_taps = _added(to_taps, (row + i * STRIDE) * KERNEL + column % STRIDE + j * STRIDE, e * h)
    return dh, to_taps


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
    taps,  # [k k, C]
    dx,
    partial,  # [2, programs, C]: sums for scale, shift
    of_gate,  # [N, strips, C]
    of_taps,  # [programs, k k, C]
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
    views,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    INPUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # x at q STRIDE - padding + d meets e at q - b by the tap d + b STRIDE, in rows and in columns.
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    WINDOW: tl.constexpr = COLUMNS + REACH - 1
    channels, program, column, inside = columns_of(channels, WIDE, BLOCK_C)
    segment = program // parts
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    centre, to_mean, to_square = load_moment_gradients(
        mean, dmean, dvariance, segment * views // segments, column, channels, inverse_count, MOMENTS
    )
    begin = program % parts * images
    before = (segment * size + begin).to(tl.int64)
    edge = padding // STRIDE
    strips = tl.cdiv((width - 1 + padding) // STRIDE - edge + 1, COLUMNS)
    lanes = tl.minimum(images, size - begin) * strips
    kernel = _load_kernel(taps, column, channels, KERNEL, BLOCK_P)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    to_taps = (zero,) * (KERNEL * KERNEL)
    of_scale, of_shift, gates = zero, zero, zero
    for first in range(0, lanes, BLOCK_P):
        lane = first + tl.arange(0, BLOCK_P)
        image = (lane // strips).to(tl.int64) + before
        # Lanes too many are beyond every edge.
        left = tl.where(lane < lanes, edge + lane % strips * COLUMNS, width + padding + out_width + REACH)
        left_of_e = left - (REACH - 1)
        left_of_x = left * STRIDE - padding
        in_y = (image * (out_height * out_width) + left_of_e)[:, None] * channels + column[None, :]
        in_x = (image * (height * width) + left_of_x)[:, None] * channels + column[None, :]
        from_dy, from_y, from_x, to_dx = dy + in_y, y + in_y, x + in_x, dx + in_x
        in_gate = image[:, None] * channels + column[None, :]
        if GATED:
            gates = tl.load(gate + in_gate, mask=(lane < lanes)[:, None] & inside[None, :], other=0.0)
        to_gate = zero
        window = (zero,) * (REACH * WINDOW)
        for step in range(edge - (REACH - 1), (height - 1 + padding) // STRIDE + 1):
            window = window[WINDOW:]
            right = tl.where((step >= 0) & (step < out_height), out_width, 0)
            for at in tl.static_range(WINDOW):
                valid = ((left_of_e + at >= 0) & (left_of_e + at < right))[:, None] & inside[None, :]
                to = (step * out_width + at) * channels
                e = load_output_gradient(from_dy, from_y, centre, to_mean, to_square, to, valid, MOMENTS)
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
                        dh, to_taps = _meet(
                            window, kernel, tl.where(valid, h * gates if GATED else h, 0.0), to_taps, d, at,
                            INPUT, WEIGHT, KERNEL, STRIDE, REACH, WINDOW,
                        )  # fmt: skip
                        if INPUT:
                            if GATED:
                                to_gate += tl.where(valid, dh * h, 0.0)
                                dh *= gates
                            dz = tl.where(valid, dh * activation_gradient(z, ACT), 0.0)
                            of_scale += dz * values
                            of_shift += dz
                            tl.store(to_dx + to, (dz * factor).to(dx.dtype.element_ty), mask=valid)
        if INPUT and GATED:
            to = of_gate + (image * strips + lane % strips)[:, None] * channels + column[None, :]
            tl.store(to, to_gate, mask=(lane < lanes)[:, None] & inside[None, :])
    if INPUT and DEFERRED:
        store_sums(partial, program, segments * parts, channels, column, tl.sum(of_scale, 0), tl.sum(of_shift, 0))
    if WEIGHT:
        for tap in tl.static_range(KERNEL * KERNEL):
            to = of_taps + (program.to(tl.int64) * (KERNEL * KERNEL) + tap) * channels + column
            tl.store(to, tl.sum(to_taps[tap], 0), mask=inside)


def backward(
    grads: OutputGradient,
    deferred: Input,
    weight: Tensor,
    dx: Tensor | None,
    stride: int,
    padding: int,
    wanted_weight: bool,
) -> tuple[Sequence[Tensor], Tensor | None]:
    """Fills dx, if it is wanted. Returns what programs have summed for scale, shift [programs, C] and gate [strips, C],
    and the gradient of the weight's prefix, [C, 1, k, k] in fp32, if it is wanted."""
    images, channels, height, width = deferred.x.shape
    kernel = weight.shape[2]
    columns = (width - 1 + padding) // stride - padding // stride + 1  # of strides, as the kernel has it
    most = 4 if kernel <= 3 or (kernel <= 5 and stride == 1) else 3
    tile = _tile(channels, columns, most, 256 if kernel <= 5 else 128)
    strips = triton.cdiv(columns, tile["COLUMNS"])
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    segments = max(grads.views, deferred.rows)
    rows = Rows.share(images, segments, max(1, tile["BLOCK_P"] // strips), blocks, deferred.x.device)
    partial = partial_sums(2, rows, channels, deferred.x)
    of_gate = deferred.x.new_empty(images * strips if deferred.gate is not None else 0, channels, dtype=torch.float32)
    of_taps = deferred.x.new_empty(
        rows.programs if wanted_weight else 0, kernel * kernel, channels, dtype=torch.float32
    )
    launch(
        conv_moments_depthwise_backward_kernel,
        rows.programs * blocks,
        *grads.pointers,
        *deferred.pointers,
        _taps(weight, channels),
        deferred.x if dx is None else dx,
        partial,
        of_gate,
        of_taps,
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
        grads.views,
        **deferred.constants,
        MOMENTS=grads.views > 0,
        INPUT=dx is not None,
        WEIGHT=wanted_weight,
        KERNEL=kernel,
        STRIDE=stride,
        WIDE=channels % 8 == 0,
        **tile,
        maxnreg=REGISTERS if kernel <= 3 else None,
    )
    of_prefix = of_taps.sum(0).t().reshape(channels, 1, kernel, kernel) if wanted_weight else None
    return (*partial, of_gate), of_prefix


def _taps(weight: Tensor, channels: int) -> Tensor:
    """The weight's prefix [C, 1, k, k] as kernels read it: [k k, C] in fp32."""
    return weight[:channels].flatten(1).t().float().contiguous()


def _tile(channels: int, width: int, columns: int, size: int) -> dict[str, int]:
    """A lane's columns, at most so many, and a tile's lanes and channels, so that the fewest of them are idle.

    size: lanes times channels, of which each of the program's threads has an equal share. What a lane holds in
    registers grows with its columns, the channels of a thread, and the kernel.
    """
    columns = min(range(columns, 1, -1), key=lambda n: triton.cdiv(width, n) * n)
    block = min((64, 32, 16), key=lambda n: triton.cdiv(channels, n) * n)
    return {"COLUMNS": columns, "BLOCK_P": size // block, "BLOCK_C": block}
