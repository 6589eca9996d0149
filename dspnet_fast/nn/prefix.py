"""Prefixes of weights for plain PyTorch functions, with gradients added in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor

from .sized import main_grad

HALF = (torch.bfloat16, torch.float16)

_shared: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] | None = None  # by id of the weight, sizes and dtype


@contextmanager
def shared_prefixes() -> Iterator[None]:
    """Within this context a layer that runs several times uses one prefix, so its gradient is added once."""
    global _shared
    before, _shared = _shared, {}
    try:
        yield
    finally:
        _shared = before


@overload
def prefix(weight: Tensor, *sizes: int, like: Tensor | None = None) -> Tensor: ...
@overload
def prefix(weight: None, *sizes: int, like: Tensor | None = None) -> None: ...


def prefix(weight: Any, *sizes: int, like: Tensor | None = None) -> Any:
    """The first `sizes` elements of each of a weight's first dimensions, differentiable.

    The gradient is added to the same prefix of the weight's `main_grad` if it has one. Otherwise autograd gets a
    full-size gradient that is zero outside the prefix.

    Args:
        weight: a parameter, or None.
        sizes: sizes of the prefix, at most those of the weight.
        like: with a tensor in 16 bits, round the prefix to its dtype, as automatic mixed precision does.

    Returns:
        The prefix; None for None.

    Example:
        >>> prefix(torch.ones(4, 6), 2, 3).shape
        torch.Size([2, 3])
    """
    if weight is None:
        return None
    whole = sizes == weight.shape[: len(sizes)]
    dtype = like.dtype if like is not None and like.dtype in HALF and not torch.is_autocast_enabled() else weight.dtype
    if whole and dtype == weight.dtype:
        return weight
    buffer = main_grad(weight)
    if buffer is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _prefix(weight, sizes).to(dtype)
    if _shared is None:
        return _Prefix.apply(weight, buffer, sizes, dtype)
    key = id(weight), sizes, dtype
    if key not in _shared:
        _shared[key] = _Prefix.apply(weight, buffer, sizes, dtype)
    return _shared[key]


def _prefix(weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return weight[tuple(map(slice, sizes))]


class _Prefix(torch.autograd.Function):
    """A prefix of a weight, whose gradient is added to the same prefix of a buffer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, buffer: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.buffer = _prefix(buffer, sizes)  # not saved for backward: autograd rejects tensors changed in place
        # Convolutions would copy a prefix with gaps in their forward and again in their backward passes.
        return torch.empty_like(_prefix(weight, sizes), dtype=dtype).copy_(_prefix(weight, sizes))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.buffer += gradient
        return None, None, None, None
