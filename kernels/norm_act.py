"""norm_act, its backward, and that of norm_act_pool, whose gradient is the same for all positions of an image.

    z = scale x + shift + (residual_scale residual + residual_shift)    out = act(z) * gate
    dz = d gate act'(z)    dx = scale dz    dscale = sum(dz x)    dshift = sum(dz)    dgate = sum(d act(z))

Bound by memory: forward reads x and the residual and writes the output; backward also reads d, and writes dx and
dresidual. A program of the backward processes several tiles of 64 rows, to keep the partial sums small.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import apply_activation, load_row, materialize_gradient, normalized, program_columns, store_sums
from .launch import (
    SIZES,
    Rows,
    accepts_dtype,
    channels_last,
    check_row_count,
    contiguous,
    launch,
    partial_sums,
    power_of_two,
)
from .sums import sums, sums_per_image

BLOCK_M = 64


@triton.jit
def _load_z(
    x, residual, factor, offset, residual_factor, residual_offset, offsets, valid,
    DEFERRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_DEFERRED: tl.constexpr,
):  # fmt: skip
    """x, the residual, and z, the input of the activation."""
    values = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    z = normalized(values, factor, offset, DEFERRED)
    residual_values = values
    if HAS_RESIDUAL:
        residual_values = tl.load(residual + offsets, mask=valid, other=0.0).to(tl.float32)
        z += normalized(residual_values, residual_factor, residual_offset, RESIDUAL_DEFERRED)
    return values, residual_values, z


@triton.jit(do_not_specialize=SIZES)
def norm_act_kernel(
    x,  # [rows, C]
    scale,  # [scale_rows, C]
    shift,
    gate,  # [N, C]
    residual,
    residual_scale,  # [residual_rows, C]
    residual_shift,
    out,
    channels,
    positions,
    size,
    parts,
    segments,
    scale_rows,
    residual_rows,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_DEFERRED: tl.constexpr,
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    segment = program // parts
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    residual_factor, residual_offset = load_row(
        residual_scale, residual_shift, segment * residual_rows // segments, column, inside, channels, RESIDUAL_DEFERRED
    )
    in_segment = program % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = (in_segment < size)[:, None] & inside[None, :]
    row = segment.to(tl.int64) * size + in_segment
    offsets = row[:, None] * channels + column[None, :]
    _, _, z = _load_z(
        x,
        residual,
        factor,
        offset,
        residual_factor,
        residual_offset,
        offsets,
        valid,
        DEFERRED,
        HAS_RESIDUAL,
        RESIDUAL_DEFERRED,
    )
    value = apply_activation(z, ACT)
    if GATED:
        image = (segment * size + in_segment) // positions  # in 32 bits: 64-bit divisions are function calls
        value *= tl.load(gate + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=valid)


def norm_act(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
) -> Tensor:
    """dspnet_fast.ops.norm_act, for valid arguments that `accepts` supports."""
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    scale, shift, gate = contiguous(scale, shift, gate)
    residual_scale, residual_shift = contiguous(residual_scale, residual_shift)
    out = torch.empty_like(x)
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    segments = _segments(scale, residual_scale)
    size = check_row_count(len(x) * positions) // segments
    parts, block = triton.cdiv(size, BLOCK_M), power_of_two(channels, 16, 128)
    launch(
        norm_act_kernel,
        segments * parts * triton.cdiv(channels, block),
        x,
        *(x if tensor is None else tensor for tensor in (scale, shift, gate, residual, residual_scale, residual_shift)),
        out,
        channels,
        positions,
        size,
        parts,
        segments,
        1 if scale is None else len(scale),
        1 if residual_scale is None else len(residual_scale),
        ACT=act,
        DEFERRED=scale is not None,
        GATED=gate is not None,
        HAS_RESIDUAL=residual is not None,
        RESIDUAL_DEFERRED=residual_scale is not None,
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    return out


@triton.jit(do_not_specialize=SIZES)
def norm_act_backward_kernel(
    grad,  # [rows, C], or [N, C] if POOLED
    x,  # [rows, C]
    scale,  # [scale_rows, C]
    shift,
    gate,  # [N, C]
    residual,
    residual_scale,  # [residual_rows, C]
    residual_shift,
    dx,
    dresidual,
    partial,  # [4, programs, C]: sums for scale, shift, gate, residual_scale
    grad_factor,
    channels,
    positions,
    size,
    parts,
    tiles,
    segments,
    scale_rows,
    residual_rows,
    ACT: tl.constexpr,
    DEFERRED: tl.constexpr,
    GATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_DEFERRED: tl.constexpr,
    RESIDUAL_GRADIENT: tl.constexpr,
    POOLED: tl.constexpr,
    VECTORIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, program, column, inside = program_columns(channels, VECTORIZED, BLOCK_C)
    segment = program // parts
    factor, offset = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    residual_factor, residual_offset = load_row(
        residual_scale, residual_shift, segment * residual_rows // segments, column, inside, channels, RESIDUAL_DEFERRED
    )
    gates = tl.full((1, BLOCK_C), 1.0, tl.float32)
    if GATED:
        gates = tl.load(gate + segment * channels + column, mask=inside, other=0.0)[None, :]
    of_scale = tl.zeros((BLOCK_C,), tl.float32)
    of_shift = tl.zeros((BLOCK_C,), tl.float32)
    of_gate = tl.zeros((BLOCK_C,), tl.float32)
    of_residual_scale = tl.zeros((BLOCK_C,), tl.float32)
    begin = program % parts * tiles * BLOCK_M
    for first in range(begin, tl.minimum(begin + tiles * BLOCK_M, size), BLOCK_M):
        in_segment = first + tl.arange(0, BLOCK_M)
        valid = (in_segment < size)[:, None] & inside[None, :]
        row = segment.to(tl.int64) * size + in_segment
        offsets = row[:, None] * channels + column[None, :]
        values, residual_values, z = _load_z(
            x,
            residual,
            factor,
            offset,
            residual_factor,
            residual_offset,
            offsets,
            valid,
            DEFERRED,
            HAS_RESIDUAL,
            RESIDUAL_DEFERRED,
        )
        if POOLED:
            image = (segment * size + in_segment) // positions
            dh = tl.load(grad + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
        else:
            dh = tl.load(grad + offsets, mask=valid, other=0.0)
        # z already contains scale and shift, so DEFERRED is False here.
        dz, to_gate = materialize_gradient(
            dh.to(tl.float32) * grad_factor, z, factor, offset, gates, valid, ACT, False, GATED
        )
        of_gate += to_gate
        of_scale += tl.sum(dz * values, 0)
        of_shift += tl.sum(dz, 0)
        tl.store(dx + offsets, (dz * factor).to(dx.dtype.element_ty), mask=valid)
        if RESIDUAL_GRADIENT:
            of_residual_scale += tl.sum(dz * residual_values, 0)
            tl.store(dresidual + offsets, (dz * residual_factor).to(dx.dtype.element_ty), mask=valid)
    programs = segments * parts
    if DEFERRED or RESIDUAL_DEFERRED:
        store_sums(partial, program, programs, channels, column, of_scale, of_shift)
    if GATED:
        tl.store(partial + (2 * programs + program) * channels + column, of_gate, mask=inside)
    if RESIDUAL_GRADIENT and RESIDUAL_DEFERRED:
        tl.store(partial + (3 * programs + program) * channels + column, of_residual_scale, mask=inside)


def materialize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    residual_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dresidual, and the programs' sums for scale, shift, gate and residual_scale, [4, programs, C].

    grad: like x, or [N, C], the gradient of the mean over positions. Activations are channels-last, the other tensors
    contiguous.
    """
    pooled = grad.ndim == 2
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    block = power_of_two(channels, 16, 64)
    segments = _segments(scale, residual_scale) if gate is None else max(len(x), 1)
    rows = Rows.split(len(x) * positions, segments, BLOCK_M, triton.cdiv(channels, block), x.device)
    dx, partial = torch.empty_like(x), partial_sums(4, rows, channels, x)
    dresidual = torch.empty_like(x) if residual_gradient else x.new_empty(0)
    launch(
        norm_act_backward_kernel,
        rows.programs * triton.cdiv(channels, block),
        grad,
        x,
        *(x if tensor is None else tensor for tensor in (scale, shift, gate, residual, residual_scale, residual_shift)),
        dx,
        dresidual if residual_gradient else dx,
        partial,
        1 / positions if pooled else 1.0,
        channels,
        positions,
        *rows.arguments,
        1 if scale is None else len(scale),
        1 if residual_scale is None else len(residual_scale),
        ACT=act,
        DEFERRED=scale is not None,
        GATED=gate is not None,
        HAS_RESIDUAL=residual is not None,
        RESIDUAL_DEFERRED=residual_scale is not None,
        RESIDUAL_GRADIENT=residual_gradient,
        POOLED=pooled,
        VECTORIZED=channels % 8 == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block,
    )
    return dx, dresidual, partial


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.norm_act_backward, for valid arguments that `accepts` supports."""
    x = channels_last(x)
    dx, dresidual, partial = materialize_backward(
        channels_last(grad),
        x,
        *contiguous(scale, shift),
        act,
        *contiguous(gate),
        None if residual is None else channels_last(residual),
        *contiguous(residual_scale, residual_shift),
        residual is not None and residual_gradient,
    )
    of_scale, of_shift, of_gate, of_residual_scale, of_residual_shift = (
        x.new_empty(0, dtype=torch.float32) for _ in range(5)
    )
    if scale is not None:
        of_scale, of_shift = sums(partial[0], partial[1], len(scale))
    if gate is not None:
        of_gate = sums_per_image(partial[2], len(x))
    if residual_scale is not None and residual_gradient:
        of_residual_scale, of_residual_shift = sums(partial[3], partial[1], len(residual_scale))
    return dx, of_scale, of_shift, of_gate, dresidual, of_residual_scale, of_residual_shift


def accepts(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels support x: (True, "") or (False, reason)."""
    return accepts_dtype(x)


def _segments(*rows: Tensor | None) -> int:
    """The smallest number of segments of the batch such that each has one row of scale and of residual_scale."""
    return math.lcm(*(1 if tensor is None else len(tensor) for tensor in rows))
