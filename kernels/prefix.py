"""Adds the gradient of a prefix of a weight to main_grad or to a new full-size gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .deferred import assume_multiple_of
from .launch import SIZES, launch
from .sums import blocks, sum_parts


@triton.jit(do_not_specialize=SIZES)
def add_to_prefix_kernel(
    partial,  # [programs, O, C]
    prefix,  # [O, C]
    size,  # O C
    channels,
    programs,
    stride_o,
    stride_i,
    VECTORIZED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    size = assume_multiple_of(size, VECTORIZED)
    element = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = element < size
    to = prefix + element // channels * stride_o + element % channels * stride_i
    total = tl.load(to, mask=inside, other=0.0).to(tl.float32) + sum_parts(partial, programs, size, element, BLOCK_P)
    tl.store(to, total.to(prefix.dtype.element_ty), mask=inside)


def add_to_prefix(prefix: Tensor, partial: Tensor) -> None:
    """Add the sum of partial [programs, O, C] over programs to prefix, [O, C] or [O, C, 1, 1]."""
    if torch._debug_has_internal_overlap(prefix) == 1:  # programs would race
        raise RuntimeError("main_grad: several of its elements are a single memory location; clone it first")
    programs, out_channels, channels = partial.shape
    block_p, block_c = blocks(programs)
    launch(
        add_to_prefix_kernel,
        triton.cdiv(out_channels * channels, block_c),
        partial,
        prefix,
        out_channels * channels,
        channels,
        programs,
        *prefix.stride()[:2],
        VECTORIZED=out_channels * channels % 8 == 0,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
    )


def gradient_prefix(
    weight: Tensor, main_grad: Tensor | None, out_channels: int, channels: int
) -> tuple[Tensor, Tensor]:
    """The prefix to add a gradient to, and the gradient that a backward returns: empty with main_grad."""
    if main_grad is not None:
        return main_grad[:out_channels, :channels], weight.new_empty(0)
    zeros = torch.zeros_like(weight)
    return zeros[:out_channels, :channels], zeros
