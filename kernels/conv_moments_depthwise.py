"""conv_moments for depthwise convolutions: bound by memory, and by the arithmetic of forming h anew for every tap.

A program works on tiles of positions by channels. The taps of a tile overlap, so all but the first read of an element
comes out of the L1 cache; h is formed again each time, which costs less than writing it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Input, OutputGradient, Rows, launch, partial_sums, power_of_two
from .moments import merge_moments, partial_moments
from .owed import (
    activated,
    add_tile,
    known,
    load_moment_gradients,
    load_output_gradient,
    load_row,
    normalized,
    settle_gradient,
    store_sums,
)

LARGEST_KERNEL = 7  # whose taps' gradients are held at once
BLOCK_P = 32  # positions of a tile


@triton.jit
def _load_settled(
    x, gate, factor, offset, image, i, j, there, column, height, width, channels,
    ACT: tl.constexpr, OWED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """h at position (i, j) of images that are counted from where x and gate begin; 0 in the padding."""
    valid = (there & (i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None] & (column < channels)[None, :]
    position = (image * height + i) * width + j
    values = tl.load(x + position[:, None] * channels + column[None, :], mask=valid, other=0.0)
    h = activated(normalized(values, factor, offset, OWED), ACT)
    if GATED:
        h *= tl.load(gate + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
    # Rounded as it would be if it were stored.
    return tl.where(valid, h, 0.0).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _load_tap(weight, tap, column, channels, stride_o, like):
    """One tap of every channel's kernel, [1, columns], rounded to the dtype of activations."""
    taps = tl.load(weight + column * stride_o + tap, mask=column < channels, other=0.0)
    return taps.to(like.dtype.element_ty).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=SIZES)
def conv_moments_depthwise_kernel(
    x,  # [N, H, W, C]
    scale,  # [scale_rows, C]
    shift,
    gate,  # [N, C]
    weight,  # [O, 1, k, k], contiguous from the second dimension on
    y,  # [N, H', W', C]
    partial,  # [2, programs, C]
    channels,
    stride_o,
    height,
    width,
    out_height,
    out_width,
    stride,
    padding,
    size,
    parts,
    tiles,
    segments,
    scale_rows,
    ACT: tl.constexpr,
    OWED: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = known(channels, WIDE)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0) // blocks
    segment = program // parts
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, OWED)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    in_tile = tl.arange(0, BLOCK_P)
    begin = program % parts * tiles * BLOCK_P
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_P, size), BLOCK_P):
        tile = segment * size + first
        there = first + in_tile < size
        first_image = tile // (out_height * out_width)
        position = tile - first_image * (out_height * out_width) + in_tile
        image = position // (out_height * out_width)
        position -= image * (out_height * out_width)
        before = first_image.to(tl.int64) * (height * width) * channels
        top = position // out_width * stride - padding
        left = position % out_width * stride - padding
        accumulator = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for k in range(KERNEL * KERNEL):  # not unrolled: all taps' loads at once would not fit the registers
            h = _load_settled(
                x + before, gate + first_image * channels, factor, offset, image, top + k // KERNEL, left + k % KERNEL,
                there, column, height, width, channels, ACT, OWED, GATED,
            )  # fmt: skip
            accumulator += h * _load_tap(weight, k, column, channels, stride_o, x)
        valid = there[:, None] & inside[None, :]
        stored = accumulator.to(y.dtype.element_ty)
        in_y = in_tile[:, None] * channels + column[None, :]
        tl.store(y + tile.to(tl.int64) * channels + in_y, stored, mask=valid)
        if MOMENTS:
            total = tl.minimum(BLOCK_P, size - first)
            stored = tl.where(valid, stored.to(tl.float32), 0.0)
            mean, squares = add_tile(stored, valid, (first - begin).to(tl.float32), mean, squares, total)
    if MOMENTS:
        programs = segments * parts
        tl.store(partial + program * channels + column, mean, mask=inside)
        tl.store(partial + (programs + program) * channels + column, squares, mask=inside)


def forward(owed: Input, weight: Tensor, y: Tensor, stride: int, padding: int, views: int) -> tuple[Tensor, Tensor]:
    """Fills y [N, C, H', W'] from x [N, C, H, W], both channels-last; returns mean and variance [views, C]."""
    channels, height, width = owed.x.shape[1:]
    block_c = power_of_two(channels, 16, 64)
    blocks = triton.cdiv(channels, block_c)
    rows = Rows.share(y.numel() // channels, max(views, owed.rows), BLOCK_P, blocks, owed.x.device)
    partial = partial_moments(rows, channels, owed.x) if views else owed.x
    launch(
        conv_moments_depthwise_kernel,
        rows.programs * blocks,
        *owed.pointers,
        weight,
        y,
        partial,
        channels,
        weight.stride(0),
        height,
        width,
        y.shape[2],
        y.shape[3],
        stride,
        padding,
        *rows.arguments,
        owed.rows,
        **owed.constants,
        MOMENTS=views > 0,
        KERNEL=weight.shape[2],
        WIDE=channels % 8 == 0,
        BLOCK_P=BLOCK_P,
        BLOCK_C=block_c,
    )
    if views:
        return merge_moments(partial, rows)
    nothing = owed.x.new_empty(0, channels, dtype=torch.float32)
    return nothing, nothing.clone()


@triton.jit(do_not_specialize=SIZES)
def conv_moments_depthwise_input_gradient_kernel(
    dy,  # [N, H', W', C]
    dmean,  # [views, C]
    dvariance,
    y,
    mean,
    weight,
    x,  # [N, H, W, C]
    scale,
    shift,
    gate,
    dx,
    partial,  # [3, programs, C]: sums for scale, shift, gate
    inverse_count,
    channels,
    stride_o,
    height,
    width,
    out_height,
    out_width,
    stride,
    padding,
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
    KERNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = known(channels, WIDE)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0) // blocks
    segment = program // parts
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    view = segment * views // segments
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, OWED)
    centre, to_mean, to_square = load_moment_gradients(
        mean, dmean, dvariance, view, column, channels, inverse_count, MOMENTS
    )
    gates = tl.full((1, BLOCK_C), 1.0, tl.float32)
    if GATED:
        gates = tl.load(gate + segment * channels + column, mask=inside, other=0.0)[None, :]
    of_scale = tl.zeros((BLOCK_C,), tl.float32)
    of_shift = tl.zeros((BLOCK_C,), tl.float32)
    of_gate = tl.zeros((BLOCK_C,), tl.float32)
    in_tile = tl.arange(0, BLOCK_P)
    begin = program % parts * tiles * BLOCK_P
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_P, size), BLOCK_P):
        tile = segment * size + first
        there = first + in_tile < size
        first_image = tile // (height * width)
        position = tile - first_image * (height * width) + in_tile
        image = position // (height * width)
        position -= image * (height * width)
        before = first_image.to(tl.int64) * (out_height * out_width) * channels
        dh = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for k in range(KERNEL * KERNEL):
            # The output positions that read this one by this tap: (i, j), if they fall on the stride.
            below = position // width + padding - k // KERNEL
            right = position % width + padding - k % KERNEL
            i = below // stride
            j = right // stride
            read = (below >= 0) & (right >= 0) & (below == i * stride) & (right == j * stride)
            read = there & read & (i < out_height) & (j < out_width)
            reader = (image * out_height + i) * out_width + j
            out_valid = read[:, None] & inside[None, :]
            in_y = reader[:, None] * channels + column[None, :]
            e = load_output_gradient(dy + before, y + before, centre, to_mean, to_square, in_y, out_valid, MOMENTS)
            e = e.to(x.dtype.element_ty).to(tl.float32)
            dh += e * _load_tap(weight, k, column, channels, stride_o, x)
        valid = there[:, None] & inside[None, :]
        in_x = in_tile[:, None] * channels + column[None, :]
        values = tl.load(x + tile.to(tl.int64) * channels + in_x, mask=valid, other=0.0).to(tl.float32)
        dz, to_gate = settle_gradient(dh, values, factor, offset, gates, valid, ACT, OWED, GATED)
        of_gate += to_gate
        of_scale += tl.sum(dz * values, 0)
        of_shift += tl.sum(dz, 0)
        tl.store(dx + tile.to(tl.int64) * channels + in_x, (dz * factor).to(dx.dtype.element_ty), mask=valid)
    store_sums(partial, program, segments * parts, channels, column, of_scale, of_shift, of_gate, OWED, GATED)


def input_gradient(grads: OutputGradient, owed: Input, weight: Tensor, dx: Tensor, stride: int, padding: int) -> Tensor:
    """Fills dx; returns what programs have summed for scale, shift and gate, [3, programs, C]."""
    images, channels, height, width = owed.x.shape
    block_c = power_of_two(channels, 16, 64)
    blocks = triton.cdiv(channels, block_c)
    # A program works within one image where there is a gate, whose gradient is a sum over an image.
    segments = max(grads.views, owed.rows) if owed.gate is None else images
    rows = Rows.share(images * height * width, segments, BLOCK_P, blocks, owed.x.device)
    partial = partial_sums(rows, channels, owed.x)
    launch(
        conv_moments_depthwise_input_gradient_kernel,
        rows.programs * blocks,
        *grads.pointers,
        weight,
        *owed.pointers,
        dx,
        partial,
        grads.inverse_count,
        channels,
        weight.stride(0),
        height,
        width,
        *grads.y.shape[2:],
        stride,
        padding,
        *rows.arguments,
        owed.rows,
        grads.views,
        **owed.constants,
        MOMENTS=grads.views > 0,
        KERNEL=weight.shape[2],
        WIDE=channels % 8 == 0,
        BLOCK_P=BLOCK_P,
        BLOCK_C=block_c,
    )
    return partial


@triton.jit(do_not_specialize=SIZES)
def conv_moments_depthwise_weight_gradient_kernel(
    dy,  # [N, H', W', C]
    dmean,  # [views, C]
    dvariance,
    y,
    mean,
    x,  # [N, H, W, C]
    scale,
    shift,
    gate,
    partial,  # [programs, k k, C]
    inverse_count,
    channels,
    height,
    width,
    out_height,
    out_width,
    stride,
    padding,
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
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,  # the power of two from KERNEL^2 on
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = known(channels, WIDE)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0) // blocks
    segment = program // parts
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    view = segment * views // segments
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, OWED)
    centre, to_mean, to_square = load_moment_gradients(
        mean, dmean, dvariance, view, column, channels, inverse_count, MOMENTS
    )
    tap = tl.arange(0, TAPS)
    accumulator = tl.zeros((TAPS, BLOCK_C), tl.float32)
    in_tile = tl.arange(0, BLOCK_P)
    begin = program % parts * tiles * BLOCK_P
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_P, size), BLOCK_P):
        tile = segment * size + first
        there = first + in_tile < size
        first_image = tile // (out_height * out_width)
        position = tile - first_image * (out_height * out_width) + in_tile
        image = position // (out_height * out_width)
        position -= image * (out_height * out_width)
        before = first_image.to(tl.int64) * (height * width) * channels
        top = position // out_width * stride - padding
        left = position % out_width * stride - padding
        valid = there[:, None] & inside[None, :]
        in_y = in_tile[:, None] * channels + column[None, :]
        written = tile.to(tl.int64) * channels
        e = load_output_gradient(dy + written, y + written, centre, to_mean, to_square, in_y, valid, MOMENTS)
        e = e.to(x.dtype.element_ty).to(tl.float32)
        for k in range(KERNEL * KERNEL):
            h = _load_settled(
                x + before, gate + first_image * channels, factor, offset, image, top + k // KERNEL, left + k % KERNEL,
                there, column, height, width, channels, ACT, OWED, GATED,
            )  # fmt: skip
            accumulator += tl.where((tap == k)[:, None], tl.sum(e * h, 0)[None, :], 0.0)
    to = partial + (program.to(tl.int64) * KERNEL * KERNEL + tap)[:, None] * channels + column[None, :]
    tl.store(to, accumulator, mask=(tap < KERNEL * KERNEL)[:, None] & inside[None, :])


def weight_gradient(grads: OutputGradient, owed: Input, kernel: int, stride: int, padding: int) -> Tensor:
    """The gradient of the weight's prefix, [C, 1, k, k] in fp32."""
    channels, height, width = owed.x.shape[1:]
    block_c = power_of_two(channels, 16, 32)
    blocks = triton.cdiv(channels, block_c)
    rows = Rows.share(grads.y.numel() // channels, max(grads.views, owed.rows), BLOCK_P, blocks, owed.x.device)
    partial = owed.x.new_empty(rows.programs, kernel * kernel, channels, dtype=torch.float32)
    launch(
        conv_moments_depthwise_weight_gradient_kernel,
        rows.programs * blocks,
        *grads.pointers,
        *owed.pointers,
        partial,
        grads.inverse_count,
        channels,
        height,
        width,
        *grads.y.shape[2:],
        stride,
        padding,
        *rows.arguments,
        owed.rows,
        grads.views,
        **owed.constants,
        MOMENTS=grads.views > 0,
        KERNEL=kernel,
        TAPS=triton.next_power_of_2(kernel * kernel),
        WIDE=channels % 8 == 0,
        BLOCK_P=BLOCK_P,
        BLOCK_C=block_c,
    )
    return partial.sum(0).t().reshape(channels, 1, kernel, kernel)
