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

from .deferred import (
    apply_activation,
    load_row,
    materialize_gradient,
    normalized,
    program_columns,
    row_tile,
    store_sums,
)
from .launch import (
    SIZES,
    Input,
    Rows,
    accepts_dtype,
    channels_last,
    check_row_count,
    launch,
    partial_sums,
    power_of_two,
)
from .sums import sums, sums_per_image

BLOCK_M = 64


@triton.jit
def _load_z(
    x, residual, row, residual_row, offsets, valid,
    DEFERRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_DEFERRED: tl.constexpr,
):  # fmt: skip
    """x, the residual, and z, the input of the activation. row, residual_row: (factor, offset) of `load_row`."""
    values = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    z = normalized(values, row[0], row[1], DEFERRED)
    residual_values = values
    if HAS_RESIDUAL:
        residual_values = tl.load(residual + offsets, mask=valid, other=0.0).to(tl.float32)
        z += normalized(residual_values, residual_row[0], residual_row[1], RESIDUAL_DEFERRED)
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
    row = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    residual_row = load_row(
        residual_scale, residual_shift, segment * residual_rows // segments, column, inside, channels, RESIDUAL_DEFERRED
    )
    in_segment, valid, offsets = row_tile(program % parts * BLOCK_M, size, segment, column, inside, channels, BLOCK_M)
    _, _, z = _load_z(x, residual, row, residual_row, offsets, valid, DEFERRED, HAS_RESIDUAL, RESIDUAL_DEFERRED)
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
    deferred = Input.of(x, scale, shift, act, gate)
    added = Input.of(deferred.x if residual is None else residual, residual_scale, residual_shift, "identity", None)
    out = torch.empty_like(deferred.x)
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    segments = math.lcm(deferred.rows, added.rows)  # each has one row of scale and of residual_scale
    size = check_row_count(len(x) * positions) // segments
    parts, block = triton.cdiv(size, BLOCK_M), power_of_two(channels, 16, 128)
    launch(
        norm_act_kernel,
        segments * parts * triton.cdiv(channels, block),
        *deferred.pointers,
        *added.pointers[:3],
        out,
        channels,
        positions,
        size,
        parts,
        segments,
        deferred.rows,
        added.rows,
        **deferred.constants,
        HAS_RESIDUAL=residual is not None,
        RESIDUAL_DEFERRED=added.scale is not None,
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
    row = load_row(scale, shift, segment * scale_rows // segments, column, inside, channels, DEFERRED)
    residual_row = load_row(
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
        in_segment, valid, offsets = row_tile(first, size, segment, column, inside, channels, BLOCK_M)
        values, residual_values, z = _load_z(
            x, residual, row, residual_row, offsets, valid, DEFERRED, HAS_RESIDUAL, RESIDUAL_DEFERRED
        )
        if POOLED:
            image = (segment * size + in_segment) // positions
            dh = tl.load(grad + image[:, None] * channels + column[None, :], mask=valid, other=0.0)
        else:
            dh = tl.load(grad + offsets, mask=valid, other=0.0)
        # z already contains scale and shift, so DEFERRED is False here.
        dz, to_gate = materialize_gradient(
            dh.to(tl.float32) * grad_factor, z, row[0], row[1], gates, valid, ACT, False, GATED
        )
        of_gate += to_gate
        of_scale += tl.sum(dz * values, 0)
        of_shift += tl.sum(dz, 0)
        tl.store(dx + offsets, (dz * row[0]).to(dx.dtype.element_ty), mask=valid)
        if RESIDUAL_GRADIENT:
            of_residual_scale += tl.sum(dz * residual_values, 0)
            tl.store(dresidual + offsets, (dz * residual_row[0]).to(dx.dtype.element_ty), mask=valid)
    programs = segments * parts
    if DEFERRED or RESIDUAL_DEFERRED:
        store_sums(partial, program, programs, channels, column, of_scale, of_shift)
    if GATED:
        tl.store(partial + (2 * programs + program) * channels + column, of_gate, mask=inside)
    if RESIDUAL_GRADIENT and RESIDUAL_DEFERRED:
        tl.store(partial + (3 * programs + program) * channels + column, of_residual_scale, mask=inside)


def materialize_backward(
    grad: Tensor, deferred: Input, residual: Input | None = None, residual_gradient: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dresidual, and the programs' sums for scale, shift, gate and residual_scale, [4, programs, C].

    grad: like x, channels-last, or [N, C], contiguous, the gradient of the mean over positions.
    """
    x, pooled = deferred.x, grad.ndim == 2
    added = residual or Input(x, None, None, "identity", None)
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    block = power_of_two(channels, 16, 64)
    segments = math.lcm(deferred.rows, added.rows) if deferred.gate is None else max(len(x), 1)
    rows = Rows.split(len(x) * positions, segments, BLOCK_M, triton.cdiv(channels, block), x.device)
    dx, partial = torch.empty_like(x), partial_sums(4, rows, channels, x)
    dresidual = torch.empty_like(x) if residual_gradient else x.new_empty(0)
    launch(
        norm_act_backward_kernel,
        rows.programs * triton.cdiv(channels, block),
        grad,
        *deferred.pointers,
        *added.pointers[:3],
        dx,
        dresidual if residual_gradient else dx,
        partial,
        1 / positions if pooled else 1.0,
        channels,
        positions,
        *rows.arguments,
        deferred.rows,
        added.rows,
        **deferred.constants,
        HAS_RESIDUAL=residual is not None,
        RESIDUAL_DEFERRED=added.scale is not None,
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
    added = None if residual is None else Input.of(residual, residual_scale, residual_shift, "identity", None)
    dx, dresidual, partial = materialize_backward(
        channels_last(grad), Input.of(x, scale, shift, act, gate), added, residual is not None and residual_gradient
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
