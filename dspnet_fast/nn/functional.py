"""Building blocks of networks with deferred normalisation: `conv_norm_act`, `materialize`, `pool` and `gated`.

Each takes a `Deferred` or a Tensor. Activations of slimmable layers are `Deferred` (docs/formulation.md), except with
the policy `eager`. Then, and with torch.nn layers, as in a network cut out by `slim`, they are Tensors and the
functions are the ordinary PyTorch ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..ops.registry import uses_pytorch
from .batch_norm import SlimBatchNorm
from .conv import SlimConv2d
from .deferred import Activation, Deferred, compute, gate_by, mean

ACTS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}


def act_name(act: nn.Module | None) -> str:
    """The operators' name of an activation module; None is the identity.

    Raises:
        ValueError: for a module without an entry in `ACTS`.
    """
    if act is None:
        return "identity"
    if type(act) not in ACTS:
        supported = ", ".join(kind.__name__ for kind in ACTS)
        raise ValueError(f"the operators do not support the activation {type(act).__name__}: use one of {supported}")
    return "gelu_tanh" if isinstance(act, nn.GELU) and act.approximate == "tanh" else ACTS[type(act)]


def conv_norm_act(x: Activation, conv: nn.Module, norm: nn.Module, act: nn.Module | None = None) -> Activation:
    """Convolution, batch normalisation and activation function: act(norm(conv(x))).

    Args:
        x: input, [N, C, H, W].
        conv: a `SlimConv2d` without bias, ungrouped or depthwise, with square kernel, stride and zero padding and
            without dilation; or any torch.nn layer.
        norm: the batch normalisation of its output.
        act: an `nn.ReLU`, `nn.ReLU6`, `nn.Hardswish`, `nn.SiLU`, `nn.GELU` or `nn.Identity`; None for no activation
            function.

    Returns:
        A `Deferred` of shape [N, C', H', W'] for slimmable layers, a Tensor for torch.nn layers and with the policy
        `eager`.

    Raises:
        ValueError: if `conv` or `act` is not supported.

    Example:
        >>> conv, norm = SlimConv2d(3, 8, 3, padding=1, bias=False), SlimBatchNorm2d(8)
        >>> y = conv_norm_act(torch.randn(2, 3, 16, 16), conv, norm, nn.ReLU())
        >>> materialize(y).shape
        torch.Size([2, 8, 16, 16])
    """
    device = x.x.device if isinstance(x, Deferred) else x.device
    if uses_pytorch(device) or not (isinstance(conv, SlimConv2d) and isinstance(norm, SlimBatchNorm)):
        y = norm(conv(x))
        return y if act is None else act(y)
    x = x if isinstance(x, Deferred) else Deferred(x)
    return replace(norm(conv(x, views=norm.batch_views, norm=norm)), act=act_name(act))


def materialize(
    x: Activation, shortcut: Activation | None = None, act: nn.Module | None = None, inplace: bool = False
) -> Tensor:
    """Compute an activation as a tensor; with a shortcut, act(x + shortcut).

    Args:
        x: activation, [N, C, H, W].
        shortcut: the residual to add, of the same shape, or None.
        act: activation function of the sum; not applied to a `Deferred` without shortcut, which holds its own.
        inplace: whether the sum may overwrite x where x is a Tensor, as it may be if nothing else reads x.

    Returns:
        The activation, [N, C, H, W].

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> y = materialize(Deferred(x, torch.ones(1, 8), torch.zeros(1, 8), "relu"))
        >>> torch.equal(y, x.relu())
        True
    """
    if isinstance(x, Tensor) and not isinstance(shortcut, Deferred):
        if shortcut is None:
            y = x
        else:
            y = x.add_(shortcut) if inplace and x.dtype == shortcut.dtype else x + shortcut
        return y if act is None else act(y)
    deferred = x if isinstance(x, Deferred) else Deferred(x)
    if shortcut is None:
        return compute(deferred)
    return compute(deferred, shortcut if isinstance(shortcut, Deferred) else Deferred(shortcut), act_name(act))


def pool(x: Activation) -> Tensor:
    """Global average pooling: the mean over H and W.

    Args:
        x: activation, [N, C, H, W].

    Returns:
        [N, C]; for a `Deferred` in fp32, or fp64 if its tensor is fp64.

    Example:
        >>> x = Deferred(torch.randn(2, 8, 4, 4), act="relu")
        >>> pool(x).shape
        torch.Size([2, 8])
    """
    if isinstance(x, Tensor):
        if torch.is_grad_enabled() and x.dtype != torch.float16:  # a mean copies its gradient
            return x.sum((2, 3)) / x.shape[2:].numel()
        return x.mean((2, 3))
    return mean(x)


def gated(x: Activation, gate: Tensor) -> Activation:
    """Multiply an activation by a factor per image and channel, as squeeze-and-excite does.

    Args:
        x: activation, [N, C, H, W].
        gate: factors, [N, C].

    Returns:
        The product, of the same type as x.

    Example:
        >>> x, gate = torch.randn(2, 8, 4, 4), torch.rand(2, 8)
        >>> torch.equal(materialize(gated(Deferred(x), gate)), gated(x, gate))
        True
    """
    if isinstance(x, Tensor):
        return x * gate[:, :, None, None]
    return gate_by(x, gate)
