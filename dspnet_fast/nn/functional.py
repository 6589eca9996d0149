"""The steps that networks made of deferred activations are written in.

`conv_norm_act`, `materialize`, `pool` and `gated` take and give either kind of activation. With slimmable layers it is
an
`Deferred`: what a convolution left in memory, and what the next operator applies as it reads (docs/formulation.md).
With
torch.nn's own layers, as in a network that `slim` cut out, it is a Tensor and the steps are the ordinary ones.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..ops import norm_act, norm_act_pool
from .batch_norm import SlimBatchNorm
from .conv import SlimConv2d
from .deferred import Activation, Deferred

ACTS: dict[type[nn.Module], str] = {nn.Identity: "identity", nn.ReLU: "relu", nn.Hardswish: "hardswish"}


def act_name(act: nn.Module | None) -> str:
    """What the operators call an activation module; ValueError for one that they do not have."""
    if act is None:
        return "identity"
    if type(act) not in ACTS:
        raise ValueError(f"no fused {type(act).__name__}: there are {', '.join(kind.__name__ for kind in ACTS)}")
    return ACTS[type(act)]


def conv_norm_act(x: Activation, conv: nn.Module, norm: nn.Module, act: nn.Module | None = None) -> Activation:
    """act(norm(conv(x))). With slimmable layers, one operator and arithmetic on vectors of channels.

    conv: ungrouped or depthwise, without bias, with square kernel, stride and zero padding, undilated.
    """
    if not (isinstance(conv, SlimConv2d) and isinstance(norm, SlimBatchNorm)):
        y = norm(conv(x))
        return y if act is None else act(y)
    deferred = norm(conv(x if isinstance(x, Deferred) else Deferred(x), views=norm.batch_views))
    return replace(deferred, act=act_name(act))


def materialize(x: Activation, shortcut: Activation | None = None, act: nn.Module | None = None) -> Tensor:
    """The activation itself; with a shortcut, act(x + shortcut)."""
    if isinstance(x, Tensor) and not isinstance(shortcut, Deferred):
        y = x if shortcut is None else x + shortcut
        return y if act is None else act(y)
    x = x if isinstance(x, Deferred) else Deferred(x)
    if shortcut is None:
        return norm_act(x.x, x.scale, x.shift, x.act, x.gate, None, None, None)
    if x.act != "identity" or x.gate is not None:
        x = Deferred(materialize(x))
    other = shortcut if isinstance(shortcut, Deferred) else Deferred(shortcut)
    if other.act != "identity" or other.gate is not None:
        other = Deferred(materialize(other))
    return norm_act(x.x, x.scale, x.shift, act_name(act), None, other.x, other.scale, other.shift)


def pool(x: Activation) -> Tensor:
    """The mean over H and W, [N, C]; of an Deferred in fp32 at least."""
    if isinstance(x, Tensor):
        return x.mean((2, 3))
    if x.gate is not None:
        return x.gate * pool(replace(x, gate=None))
    return norm_act_pool(x.x, x.scale, x.shift, x.act)


def gated(x: Activation, gate: Tensor) -> Activation:
    """x * gate, for a gate [N, C]."""
    if isinstance(x, Tensor):
        return x * gate[:, :, None, None]
    return replace(x, gate=gate if x.gate is None else x.gate * gate)
