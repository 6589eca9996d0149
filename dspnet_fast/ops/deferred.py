"""Deferred normalisation in plain PyTorch, shared by the native bodies of the operators.

An activation x [N, C, H, W] is stored as the convolution wrote it, and h = act(scale * x + shift) * gate is applied by
the operator that loads it. The N images are V views of equal size, one after another; scale and shift are [V, C], a row
for each view, or a single row for all.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = ("identity", "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh")

_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def _relu_gradient(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _relu6_gradient(z: Tensor) -> Tensor:
    return ((z > 0) & (z < 6)).to(z.dtype)


def _hardswish_gradient(z: Tensor) -> Tensor:
    """Derivative of z clamp(z + 3, 0, 6) / 6; at the kinks that of the middle piece, as in autograd."""
    return torch.where((z < -3) | (z > 3), (z > 3).to(z.dtype), z / 3 + 0.5)


def _silu_gradient(z: Tensor) -> Tensor:
    """Derivative of z s with s = sigmoid(z), whose own derivative is s (1 - s)."""
    s = z.sigmoid()
    return s * (1 + z * (1 - s))


def _gelu_gradient(z: Tensor) -> Tensor:
    """Derivative of z P(z), with the distribution function P and the density of the standard normal distribution."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2 + z * (-z * z / 2).exp() / math.sqrt(2 * math.pi)


def _gelu_tanh_gradient(z: Tensor) -> Tensor:
    """Derivative of z s, with s = sigmoid(c (z + 0.044715 z^3)) = (1 + tanh(c / 2 (z + 0.044715 z^3))) / 2."""
    c = 2 * math.sqrt(2 / math.pi)
    s = (c * (z + 0.044715 * z**3)).sigmoid()
    return s * (1 + z * (1 - s) * c * (1 + 3 * 0.044715 * z * z))


_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "relu": _relu_gradient,
    "relu6": _relu6_gradient,
    "hardswish": _hardswish_gradient,
    "silu": _silu_gradient,
    "gelu": _gelu_gradient,
    "gelu_tanh": _gelu_tanh_gradient,
}


def upcast(x: Tensor) -> Tensor:
    """x in the dtype of the computation: fp32 for narrower dtypes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_image(rows: Tensor, images: int) -> Tensor:
    """[V, C] -> [images, C, 1, 1], or [1, C, 1, 1] for a single row."""
    if len(rows) > 1:
        rows = rows.repeat_interleave(images // len(rows), 0)
    return rows[:, :, None, None]


def normalized(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """z = scale * x + shift, upcast; without scale and shift, x upcast."""
    x = upcast(x)
    if scale is None or shift is None:
        return x
    return x * per_image(scale, len(x)) + per_image(shift, len(x))


def apply_activation(z: Tensor, act: str) -> Tensor:
    """act(z)."""
    return _VALUES[act](z)


def materialize(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, gate: Tensor | None) -> Tensor:
    """h = act(scale * x + shift) * gate, upcast."""
    h = apply_activation(normalized(x, scale, shift), act)
    return h if gate is None else h * gate[:, :, None, None]


def activation_gradient(z: Tensor, act: str) -> Tensor:
    """act'(z)."""
    return _GRADIENTS[act](z)


def normalization_gradients(
    grad_z: Tensor, x: Tensor, scale: Tensor | None, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From dL/dz with z = scale * x + shift, upcast: dL/dx in the dtype of x, dL/dscale and dL/dshift [V, C].

    The last two are empty without scale and shift.
    """
    if scale is None:
        return grad_z.to(x.dtype), grad_z.new_empty(0), grad_z.new_empty(0)
    grad_x = (grad_z * per_image(scale, len(x))).to(x.dtype)
    return grad_x, sum_per_view(grad_z * x, rows), sum_per_view(grad_z, rows)


def sum_per_view(x: Tensor, views: int) -> Tensor:
    """[N, C, H, W] -> [views, C]: the sum over each view's images and positions."""
    return x.sum((2, 3)).unflatten(0, (views, -1)).sum(1)


def check_deferred(
    op: str, x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, gate: Tensor | None = None, views: int = 0
) -> None:
    """Raise RuntimeError unless x, scale, shift, act and gate are as described at the top of this module.

    views: the number of views that the operator computes moments of; 0 for none.
    """
    torch._check(
        x.ndim == 4 and x.is_floating_point(), lambda: f"{op}: x must be [N, C, H, W], floating point, {_of(x)}"
    )
    torch._check(act in ACTS, lambda: f"{op}: act must be one of {', '.join(ACTS)}, not {act!r}")
    torch._check(
        views >= 0 and (views == 0 or len(x) % views == 0),
        lambda: f"{op}: {len(x)} images are not {views} views of equal size",
    )
    torch._check((scale is None) == (shift is None), lambda: f"{op}: give both scale and shift, or neither")
    if scale is not None and shift is not None:
        for name, rows in (("scale", scale), ("shift", shift)):
            torch._check(
                rows.ndim == 2 and rows.shape[1] == x.shape[1] and rows.dtype == upcast(x[:0]).dtype,
                lambda name=name, rows=rows: (  # type: ignore[misc]
                    f"{op}: {name} must be [views, {x.shape[1]}], {upcast(x[:0]).dtype}, {_of(rows)}"
                ),
            )
        torch._check(
            len(scale) == len(shift)
            and len(scale) > 0
            and len(x) % len(scale) == 0
            and (views == 0 or len(scale) in (1, views)),
            lambda: (
                f"{op}: scale and shift must have 1 row or one per view, got {len(scale)} and {len(shift)} rows "
                f"for {len(x)} images and {views} views"
            ),
        )
    if gate is not None:
        torch._check(
            gate.shape == x.shape[:2] and gate.dtype == upcast(x[:0]).dtype,
            lambda: f"{op}: gate must be {list(x.shape[:2])}, {upcast(x[:0]).dtype}, {_of(gate)}",
        )


def _of(tensor: Tensor) -> str:
    return f"got {list(tensor.shape)} {tensor.dtype}"
