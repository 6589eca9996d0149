"""Fused operators for existing networks, without changes of their code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attributes import evaluation
from .batch_norm import SlimBatchNorm
from .conv import SlimConv2d, has_moments
from .convert import SLIMMABLE, example_inputs, refuse_lazy
from .groups import ChannelGroups
from .selected import is_norm_act, selected_class
from .tracing import plain_operations


@plain_operations()
def fused(model: nn.Module, example: Any = None) -> nn.Module:
    """Let a network defer its batch normalisations, in place, so that fused operators can apply them.

    The network runs once, and every convolution learns which batch normalisation reads its output. From then on, with
    every policy but "eager", such convolutions run as `conv_moments`, and the normalisation, a ReLU, ReLU6, hard-swish,
    SiLU or GELU, and the gate of squeeze-and-excite are applied by the next operator: a convolution, a mean over height
    and width, or a residual sum. All other functions get the computed tensor. Parameters, buffers, hooks and names stay
    the same. With the policy "eager", under torch.compile and under autocast in float16, the network is computed in
    plain PyTorch as before.

    Args:
        model: a network, converted by `slimmable` or not. Layers nn.Conv2d and batch normalisations that follow each
            other get the classes of slimmable layers.
        example: an input, or a tuple of the inputs; by default what `slimmable` ran on, or images of the size that the
            network was made for.

    Returns:
        The network itself.

    Raises:
        TypeError: if parameters have no sizes, or the network does not run on the example, or without one on images.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        >>> fused(model, torch.randn(2, 3, 8, 8))[0].norm is model[1]
        True
    """
    refuse_lazy(model)
    chains = _chains(model, _inputs(model, example))
    for conv, norm in chains:
        if not has_moments(conv):
            continue
        if type(conv) is nn.Conv2d:
            conv.__class__ = SlimConv2d
        if not isinstance(norm, SlimBatchNorm):
            kind = type(norm)
            norm.__class__ = SLIMMABLE.get(kind) or selected_class(kind, ())  # type: ignore[assignment]
            norm.measured = {}  # type: ignore[assignment]
        vars(conv)["norm"] = norm  # not as a module of the convolution
    return model


def _inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """Inputs on which the model runs."""
    groups = vars(model).get("channel_groups")
    if example is None and isinstance(groups, ChannelGroups):
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        return tuple(
            torch.zeros(x[0], dtype=weight.dtype if x[1].is_floating_point else x[1], device=weight.device)
            for x in groups.inputs
        )
    return example_inputs(model, example)


def _chains(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Convolutions and the batch normalisations that read their outputs, of the classes that `fused` supports."""
    outputs: list[tuple[Tensor, int, nn.Conv2d]] = []  # with the number of changes in place
    chains: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def keep(conv: nn.Conv2d, _: Any, output: Tensor) -> None:
        outputs.append((output, output._version, conv))

    def find(norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        chains.extend(
            (conv, norm)
            for output, version, conv in outputs
            if args and output is args[0] and output._version == version
        )

    hooks = [
        *(m.register_forward_hook(keep) for m in model.modules() if type(m) in (nn.Conv2d, SlimConv2d)),
        *(m.register_forward_pre_hook(find) for m in model.modules() if _defers(m)),
    ]
    try:
        with evaluation(model), torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return chains


def _defers(module: nn.Module) -> bool:
    """Whether a module is a batch normalisation that can be deferred."""
    return isinstance(module, SlimBatchNorm) or type(module) is nn.BatchNorm2d or is_norm_act(type(module))
