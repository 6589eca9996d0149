"""Tensors whose normalisation, activation function and gate are deferred, in networks that `fused` has prepared.

A convolution attaches the moments of its output to the tensor that it returns. Batch normalisation of such a tensor
returns a `DeferredTensor`, which an activation function, a gate or a residual sum extends, and which the next
convolution or mean over the positions loads. Every other function gets the computed tensor, so that the model's own
code needs no changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from .deferred import ConvOutput, Deferred, compute, gate_by, mean


class _State:
    """What a tensor stands for: `x`, or with a shortcut act(x + shortcut). The value is computed once, when needed.

    Attributes:
        gradients: whether the value is computed with gradients.
        value: the value if it is computed.
        is_read: whether autograd may have passed the tensor to a function.
    """

    __slots__ = ("_versions", "act", "gradients", "is_read", "shortcut", "value", "x")

    def __init__(
        self, x: Deferred, shortcut: Deferred | None = None, act: str = "identity", gradients: bool | None = None
    ) -> None:
        self.x, self.shortcut, self.act = x, shortcut, act
        self.gradients = torch.is_grad_enabled() if gradients is None else gradients
        self.value: Tensor | None = None
        self.is_read = False
        self._versions = [(x.x, _version(x.x))]
        for tensor in (x.gate, *(() if shortcut is None else (shortcut.x, shortcut.gate))):
            if tensor is not None:
                self._versions.append((tensor, _version(tensor)))

    @classmethod
    def of_value(cls, value: Tensor) -> _State:
        """A tensor that is computed already; changes of it in place are changes of the value."""
        state = cls(Deferred(value))
        state.value, state._versions = value, []
        return state

    def followed_by(self, act: str) -> _State | None:
        """With an activation function behind it; None if it has one."""
        if self.shortcut is None:
            x = Deferred(self.x.x, self.x.scale, self.x.shift, act)
            return _State(x, None, "identity", self.gradients) if self.x.is_affine else None
        return _State(self.x, self.shortcut, act, self.gradients) if self.act == "identity" else None

    def tensors(self) -> list[Tensor | None]:
        """The tensors that the value is computed from, in the order that `with_tensors` takes."""
        x, other = self.x, self.shortcut
        own = [x.x, x.scale, x.shift, x.gate]
        return own if other is None else [*own, other.x, other.scale, other.shift, other.gate]

    def with_tensors(self, tensors: Sequence[Any]) -> _State:
        """The same function of other tensors, with gradients."""
        parts = [part for part in (self.x, self.shortcut) if part is not None]
        made = []
        for index, part in enumerate(parts):
            x, scale, shift, gate = tensors[4 * index : 4 * index + 4]
            made.append(Deferred(x, scale, shift, part.act, gate))
        return _State(made[0], made[1] if len(made) > 1 else None, self.act, True)

    def computed(self) -> Tensor:
        """The value."""
        if self.value is None:
            self._check()
            with torch.set_grad_enabled(self.gradients), _without_hooks():
                self.value = compute(self.x, self.shortcut, self.act)
        return self.value

    def loaded(self) -> Deferred:
        """What an operator that applies a deferred normalisation loads."""
        if self.shortcut is not None:
            return Deferred(self.computed())
        self._check()
        return self.x

    def _check(self) -> None:
        """Raise RuntimeError if a tensor was changed in place after the function of it was deferred."""
        for tensor, version in self._versions:
            if _version(tensor) != version:
                raise RuntimeError(
                    "a tensor was changed in place before an activation that depends on it was computed: "
                    "compute this network with the policy 'eager'"
                )


class DeferredTensor(Tensor):
    """A tensor that is computed by the first function that reads it, unless this function loads a `Deferred`."""

    _state: _State
    _node: Any  # of autograd, when the state was made

    @classmethod
    def of(cls, x: Deferred) -> Self:
        """The tensor of a deferred activation."""
        return cls._made(_State(x))

    @classmethod
    def _made(cls, state: _State, changed: Self | None = None) -> Self:
        """A new tensor, or the tensor `changed` with another state, as by a function that works in place."""
        tensors = state.tensors()
        with torch._C.DisableTorchFunctionSubclass():  # autograd clears the hooks of a changed tensor
            if torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in tensors]):
                made = _Defer.apply(state, changed, *tensors)
            else:
                made = _empty(state.x.x) if changed is None else changed
            made._state, made._node = state, made.grad_fn
        return cast(Self, made)

    @property
    def state(self) -> _State:
        """What the tensor stands for."""
        with torch._C.DisableTorchFunctionSubclass():
            node = self.grad_fn
        if node is not self._node:  # it is the output of a custom gradient, such as a checkpoint
            with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
                value = _Read.apply(self, self._state)
            self._state, self._node = _State.of_value(value), node
        return self._state

    def _replace(self, state: _State) -> None:
        """Stand for another function of the same tensors, before anything has read this one."""
        self._state = state
        if self._node is not None:
            self._node.state = state

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        deferring = _DEFERRING.get(func)
        if deferring is not None and args:
            result = deferring(*args, **kwargs)
            if result is not NotImplemented:
                return result
        read: list[tuple[DeferredTensor, Tensor, int | None]] = []

        def computed_argument(x: Any) -> Any:
            if not isinstance(x, DeferredTensor):
                return x
            value = x.state.computed()
            read.append((x, value, _version(value)))
            return value

        result = func(*tree_map(computed_argument, args), **tree_map(computed_argument, kwargs))
        for tensor, value, version in read:
            if _version(value) != version or func in _WATCHING:  # the value is no longer what was deferred
                cls._made(_State.of_value(value), tensor)
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For code that calls PyTorch's C++ functions without `__torch_function__`, such as custom gradients."""

        def computed_argument(x: Any) -> Any:
            if not isinstance(x, DeferredTensor):
                return x
            state = x._state
            state.is_read = True
            if state.value is not None:
                return state.value
            # Not kept, because autograd does not see it.
            return _State(state.x, state.shortcut, state.act, False).computed()

        return func(*tree_map(computed_argument, args), **tree_map(computed_argument, kwargs or {}))


class _Defer(torch.autograd.Function):
    """Connects a deferred tensor to autograd, for functions that read it without `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, state: _State, changed: DeferredTensor | None, *tensors: Tensor | None) -> DeferredTensor:
        ctx.state = state
        if changed is None:
            return _empty(state.x.x)
        ctx.mark_dirty(changed)
        return changed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[2:]
        leaves = [
            tensor if tensor is None else tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(ctx.state.tensors(), wanted, strict=True)
        ]
        with torch.enable_grad():
            output = ctx.state.with_tensors(leaves).computed()
        sources = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        gradients = iter(torch.autograd.grad(output, sources, gradient))
        return None, None, *(next(gradients) if needs else None for needs in wanted)


class _Read(torch.autograd.Function):
    """The value of a deferred tensor, whose gradient goes to the tensor itself."""

    @staticmethod
    def forward(ctx: Any, tensor: DeferredTensor, state: _State) -> Tensor:
        return state.computed().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _empty(like: Tensor) -> DeferredTensor:
    """A tensor without memory."""
    return Tensor._make_wrapper_subclass(
        DeferredTensor, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
    )


def _without_hooks() -> AbstractContextManager:
    """No hooks for saved tensors: a checkpoint in which a value is computed would not see it computed again."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return saved_tensors_hooks(_itself, _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def _version(tensor: Tensor) -> int | None:
    """The number of changes in place; None in inference mode, which does not count them."""
    return None if tensor.is_inference() else tensor._version


def attach_moments(output: ConvOutput, norm: nn.Module) -> Tensor:
    """The output as a tensor that carries its moments, and the scale and shift of `norm`, to `moments_of`."""
    y = output.y
    y.moments = output.mean, output.variance, output.scale, output.shift, norm, _version(y)  # type: ignore[attr-defined]
    return y


def moments_of(y: Tensor, views: int, norm: nn.Module) -> ConvOutput | None:
    """A tensor with what a convolution attached; None without moments of these views, or with another norm's scale."""
    attached = getattr(y, "moments", None)
    if attached is None:
        return None
    mean, variance, scale, shift, of_norm, version = attached
    if len(mean) != views or version != _version(y) or (scale is not None and of_norm is not norm):
        return None
    return ConvOutput(y, mean, variance, scale, shift)


def loaded(x: Tensor) -> Deferred:
    """What an operator that applies a deferred normalisation loads."""
    return x.state.loaded() if isinstance(x, DeferredTensor) else Deferred(x)


def device_of(x: Tensor) -> torch.device:
    """The device of a tensor, without `__torch_function__`."""
    return x._state.x.x.device if isinstance(x, DeferredTensor) else x.device


def computed(x: Tensor) -> Tensor:
    """An ordinary tensor."""
    return x.state.computed() if isinstance(x, DeferredTensor) else x


def _deferring_activation(act: str, in_place: bool = False) -> Callable[..., Any]:
    """The function that defers an activation function."""

    def defer(x: DeferredTensor, inplace: bool = in_place, **options: Any) -> Any:
        state = x.state
        made = state.followed_by(act)
        if made is None or options or (inplace and state.value is not None):
            return NotImplemented
        if inplace and not state.is_read:
            x._replace(made)
            return x
        return DeferredTensor._made(made, x if inplace else None)

    return defer


def _hardtanh(x: DeferredTensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _deferring_activation("relu6")(x, inplace) if (min_val, max_val) == (0, 6) else NotImplemented


def _gelu(x: DeferredTensor, *, approximate: str = "none") -> Any:
    act = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return _deferring_activation(act)(x) if act else NotImplemented


def _add(a: Any, b: Any = None, *, in_place: bool = False, **options: Any) -> Any:
    """The sum of two tensors of one shape, which an activation function may follow."""
    fits = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
    if options or not fits or (in_place and (not isinstance(a, DeferredTensor) or a.state.value is not None)):
        return NotImplemented
    x, shortcut = loaded(a), loaded(b)
    if x.scale is None and x.is_affine:
        x, shortcut = shortcut, x
    if x.scale is None and x.is_affine:  # two ordinary tensors
        return NotImplemented
    return DeferredTensor._made(_State(x, shortcut), a if in_place else None)


def _multiply(a: Any, b: Any = None, *, in_place: bool = False, **options: Any) -> Any:
    """The product of a tensor and a gate [N, C, 1, 1]."""
    if isinstance(b, DeferredTensor) and not in_place:
        a, b = b, a
    if options or not isinstance(a, DeferredTensor) or not isinstance(b, Tensor) or isinstance(b, DeferredTensor):
        return NotImplemented
    state = a.state
    fits = b.shape == (*a.shape[:2], 1, 1) and b.dtype == a.dtype
    if not fits or state.shortcut is not None or (in_place and state.value is not None):
        return NotImplemented
    gate = b.flatten(1).to(torch.promote_types(b.dtype, torch.float32))
    made = _State(gate_by(state.x, gate), None, "identity", state.gradients)
    return DeferredTensor._made(made, a if in_place else None)


def _mean(x: DeferredTensor, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    """The mean over height and width."""
    over = {d % 4 for d in dim} if isinstance(dim, (tuple, list)) else set()
    state = x.state
    if options or over != {2, 3} or state.shortcut is not None:
        return NotImplemented
    pooled = mean(state.loaded()).to(state.x.x.dtype)
    return pooled.view(*pooled.shape, 1, 1) if keepdim else pooled


def _adaptive_mean(x: DeferredTensor, output_size: Any) -> Any:
    return _mean(x, (2, 3), True) if output_size in (1, (1, 1), [1, 1]) else NotImplemented


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
}
_WATCHING = {Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_}
_DEFERRING: Mapping[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _deferring_activation("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _deferring_activation("relu", in_place=True)),
    F.relu6: _deferring_activation("relu6"),
    F.hardtanh: _hardtanh,
    F.hardswish: _deferring_activation("hardswish"),
    F.silu: _deferring_activation("silu"),
    F.gelu: _gelu,
    **dict.fromkeys((torch.add, Tensor.add), _add),
    Tensor.add_: partial(_add, in_place=True),
    **dict.fromkeys((torch.mul, Tensor.mul), _multiply),
    Tensor.mul_: partial(_multiply, in_place=True),
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    F.adaptive_avg_pool2d: _adaptive_mean,
}
