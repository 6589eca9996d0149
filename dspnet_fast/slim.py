"""Cut a subnet out of a slimmable model, as an ordinary, smaller network of torch.nn layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .models import Classifier, Network, encoder_of, image_channels
from .nn import (
    SlimBatchNorm1d,
    SlimBatchNorm2d,
    SlimConv2d,
    SlimLinear,
    SlimSequential,
    activate,
    configure_batch_norm,
)
from .nn.activate import Sizes
from .nn.batch_norm import SlimBatchNorm
from .subnets import Subnet


def slim(model: nn.Module, dn: Subnet | str | float | Sizes | None, example: Tensor | None = None) -> nn.Module:
    """Copy the subnet `dn` of a slimmable model into a network of torch.nn layers.

    Args:
        model: a model of slimmable layers; not changed.
        dn: the subnet, in a form that `activate` takes.
        example: an input of the model, used to find the input channels of each layer; by default images
            [2, C, 64, 64], with the C of a network of `models`, otherwise 3.

    Returns:
        The network in evaluation mode, with only the subnet's weights. Parameter names are the model's; inactive blocks
        are left out. Batch normalisation has the statistics measured for the subnet, or for an unmeasured full network
        its running statistics.

    Raises:
        RuntimeError: if no statistics were measured for the subnet (`dspnet_fast.statistics.post_statistics`).

    Example:
        >>> model = SlimConv2d(3, 16, kernel_size=1)
        >>> slim(model, 0.5)
        Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """
    with activate(model, dn):
        channels = _input_channels(model, torch.zeros(2, image_channels(model), 64, 64) if example is None else example)
        plain = _plain(model, "", channels)
    if isinstance(plain, Network | Classifier) and isinstance(dn, Subnet | str):
        encoder = encoder_of(plain)
        encoder.full = encoder.subnet(dn) if isinstance(dn, str) else dn
    return plain.eval()


def _input_channels(model: nn.Module, example: Tensor) -> dict[str, int]:
    """The number of input channels of each slimmable layer, found by running a copy on the meta device."""
    meta_copy = copy.deepcopy(model).to("meta").train()
    configure_batch_norm(meta_copy, bn_groups=1, process_group=None)
    channels: dict[str, int] = {}
    for path, module in meta_copy.named_modules():
        if isinstance(module, SlimConv2d | SlimLinear | SlimBatchNorm):
            dim = -1 if isinstance(module, SlimLinear) else 1
            module.register_forward_pre_hook(
                lambda _, inputs, path=path, dim=dim: channels.__setitem__(path, inputs[0].shape[dim])
            )
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        meta_copy(example.to(device="meta", dtype=dtype))
    return channels


def _plain(module: nn.Module, path: str, channels: dict[str, int]) -> nn.Module:
    """Copy a module tree with every slimmable layer replaced by the torch.nn layer of its active size."""
    if isinstance(module, SlimConv2d):
        return _plain_conv(module, channels[path])
    if isinstance(module, SlimLinear):
        linear = nn.Linear(channels[path], module.size, module.bias is not None, **_like(module))
        return _copy_prefixes(module, linear)
    if isinstance(module, SlimBatchNorm1d | SlimBatchNorm2d):
        return _plain_batch_norm(module, channels[path])
    prefix = f"{path}." if path else ""
    children = {name: child for name, child in module.named_children()}
    if isinstance(module, SlimSequential):
        names = list(children)[: module.size]
        return nn.Sequential(*(_plain(children[name], prefix + name, channels) for name in names))
    if not children:
        return copy.deepcopy(module)
    plain = copy.copy(module)
    plain._parameters = copy.deepcopy(module._parameters)
    plain._buffers = copy.deepcopy(module._buffers)
    plain._modules = {name: _plain(child, prefix + name, channels) for name, child in children.items()}
    return plain


def _like(module: nn.Module) -> dict:
    weight = next(module.parameters())
    return {"device": weight.device, "dtype": weight.dtype}


def _copy_prefixes(source: nn.Module, target: nn.Module) -> nn.Module:
    """Fill the target's parameters with the prefixes of the source's parameters of the same names."""
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            full = source.get_parameter(name)
            parameter.copy_(full[tuple(slice(size) for size in parameter.shape)])
    return target


def _plain_conv(module: SlimConv2d, in_channels: int) -> nn.Module:
    if module.groups == 1:
        groups, out_channels = 1, module.size
    else:
        groups = in_channels * module.groups // module.in_channels
        out_channels = groups * module.out_channels // module.groups
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        groups,
        module.bias is not None,
        module.padding_mode,
        **_like(module),
    )
    return _copy_prefixes(module, conv)


def _plain_batch_norm(module: SlimBatchNorm, features: int) -> nn.Module:
    mean, variance = module.evaluation_statistics()
    kind = nn.BatchNorm2d if isinstance(module, SlimBatchNorm2d) else nn.BatchNorm1d
    norm = kind(features, module.eps, module.momentum, module.affine, device=mean.device, dtype=mean.dtype)
    with torch.no_grad():
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
        if module.active_dn is None and module.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(module.num_batches_tracked)  # type: ignore[union-attr]
    return _copy_prefixes(module, norm)
