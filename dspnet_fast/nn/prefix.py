"""Prefixes of weights for plain PyTorch functions, with gradients added in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.autocast import is_autocasting
from .sized import main_grad

Positions = tuple[tuple[int, int | Tensor], ...]  # by dimension the length of a prefix, or the positions
HALF = (torch.bfloat16, torch.float16)

Prefixes = tuple[Any, Any]  # of weight and bias: tensors, or None as for the parameters of torch.nn layers


class _Shared:
    """Prefixes that layers use whenever they run within `shared_prefixes`."""

    def __init__(self, collects: bool, whole: bool) -> None:
        self.whole = whole
        self.found: dict[tuple[nn.Module, tuple[int, ...], torch.dtype | None], Prefixes] = {}
        self.leaves: list[tuple[Tensor, Tensor]] | None = [] if collects else None  # (prefix of main_grad, leaf)

    def add_gradients(self) -> None:
        """Add the gradients of all leaves to the buffers in one call."""
        added = [(buffer, leaf.grad) for buffer, leaf in self.leaves or () if leaf.grad is not None]
        if added:
            buffers, gradients = zip(*added, strict=True)
            torch._foreach_add_(buffers, gradients)


_shared: _Shared | None = None


@contextmanager
def shared_prefixes(collects: bool = False, whole: bool = True) -> Iterator[None]:
    """Within this context a layer that runs several times uses the same prefixes, so their gradient is added once.

    Contexts within a context share its prefixes.

    Args:
        collects: whether the backward pass also ends within the context. The gradients of prefixes are then added to
            `main_grad` at the end of the context, all in one call: a call for each costs more on small layers, and
            on cores without a common cache.
        whole: whether this includes gradients of whole weights in 16 bits. Without it they are added during the
            backward pass, as is needed if they are all-reduced meanwhile.
    """
    global _shared
    if _shared is not None:
        yield
        return
    _shared = _Shared(collects, whole)
    try:
        yield
        with torch.no_grad():
            _shared.add_gradients()
    finally:
        _shared = None


@contextmanager
def separate_prefixes() -> Iterator[None]:
    """Within this context layers share no prefixes, not even within `shared_prefixes`."""
    global _shared
    before, _shared = _shared, None
    try:
        yield
    finally:
        _shared = before


def prefixes(layer: nn.Module, *sizes: int, like: Tensor | None = None) -> Prefixes:
    """The first `sizes` elements of the weight's first dimensions and `sizes[0]` elements of the bias, differentiable.

    The gradient is added to the same prefix of the parameter's `main_grad` if it has one. Otherwise autograd gets a
    full-size gradient that is zero outside the prefix.

    Args:
        layer: a layer whose `weight` and `bias` are parameters or None.
        sizes: sizes of the prefix, at most those of the weight.
        like: with a tensor in 16 bits, round the prefixes to its dtype, as automatic mixed precision does.

    Returns:
        The prefixes of weight and bias; None for None.

    Example:
        >>> weight, bias = prefixes(nn.Linear(6, 4), 2, 3)
        >>> weight.shape, bias.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    half = like is not None and like.dtype in HALF and not is_autocasting(like.device)
    dtype = like.dtype if like is not None and half else None
    if _shared is None:
        return _of(layer.weight, sizes, dtype), _of(layer.bias, sizes[:1], dtype)
    key = layer, sizes, dtype
    if key not in _shared.found:
        _shared.found[key] = _of(layer.weight, sizes, dtype), _of(layer.bias, sizes[:1], dtype)
    return _shared.found[key]


def _of(weight: Any, sizes: tuple[int, ...], dtype: torch.dtype | None) -> Any:
    if weight is None:
        return None
    dtype = dtype or weight.dtype
    full = sizes == weight.shape[: len(sizes)]
    if full and dtype == weight.dtype:
        return weight
    buffer = main_grad(weight)
    if buffer is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _prefix(weight, sizes).to(dtype)
    if _shared is None or _shared.leaves is None or (full and not _shared.whole):
        return _Prefix.apply(weight, buffer, sizes, dtype)
    leaf = _copy(weight.detach(), sizes, dtype).requires_grad_(weight.requires_grad)
    _shared.leaves.append((_prefix(buffer, sizes), leaf))
    return leaf


def select(tensor: Tensor, positions: Positions) -> Tensor:
    """The active channels of a parameter or buffer, differentiable; gradients are added as by `prefixes`.

    Args:
        tensor: the parameter or buffer.
        positions: by dimension, the length of a prefix or the positions.

    Returns:
        The selected part: a view if `positions` has only prefixes.

    Example:
        >>> select(torch.arange(5), ((0, torch.tensor([1, 3])),))
        tensor([1, 3])
    """
    buffer = main_grad(tensor)
    if buffer is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _select(tensor, positions)
    return _Selection.apply(tensor, buffer, positions)


def _select(tensor: Tensor, positions: Positions) -> Tensor:
    for dim, kept in positions:
        tensor = tensor.narrow(dim, 0, kept) if isinstance(kept, int) else tensor.index_select(dim, kept)
    return tensor


class _Selection(torch.autograd.Function):
    """The active channels of a parameter, whose gradient is added to the same positions of a buffer."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, buffer: Tensor, positions: Positions) -> Tensor:
        ctx.buffer, ctx.positions = buffer, positions
        return _select(tensor, positions).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        if all(isinstance(kept, int) for _, kept in ctx.positions):
            _select(ctx.buffer, ctx.positions).add_(gradient)
            return None, None, None
        index: list[Tensor] = []
        kept_of = dict(ctx.positions)
        for dim, size in enumerate(ctx.buffer.shape):
            kept = kept_of.get(dim, size)
            found = torch.arange(kept, device=gradient.device) if isinstance(kept, int) else kept
            index.append(found.view([-1 if other == dim else 1 for other in range(ctx.buffer.ndim)]))
        ctx.buffer.index_put_(tuple(index), gradient, accumulate=True)
        return None, None, None


def _prefix(weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return weight[tuple(map(slice, sizes))]


def _copy(weight: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Convolutions would copy a prefix with gaps in their forward and again in their backward passes.
    part = _prefix(weight, sizes)
    return part.clone() if dtype == part.dtype else part.to(dtype)


class _Prefix(torch.autograd.Function):
    """A prefix of a weight, whose gradient is added to the same prefix of a buffer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, buffer: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.buffer = _prefix(buffer, sizes)  # not saved for backward: autograd rejects tensors changed in place
        return _copy(weight, sizes, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.buffer += gradient
        return None, None, None, None
