"""Reduce the parameters and the stated sizes of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .depth import remove_block, removed_blocks
from .groups import ChannelGroups
from .prefix import select


@torch.no_grad()
def shrink(model: nn.Module, groups: ChannelGroups, units: tuple[int, ...], depths: Sequence[int]) -> None:
    """Cut an ordinary network to a subnet, in place.

    Args:
        model: a network of the layers that were traced, not converted by `slimmable`.
        groups: its channel groups.
        units: units that each group keeps.
        depths: blocks that each stage keeps.
    """
    for path in groups.tensors:
        module = model.get_submodule(path)
        for name, positions in groups.selection(path, units, module).items():
            tensor = module._parameters.get(name, module._buffers.get(name))
            assert tensor is not None
            cut = select(tensor, positions).clone()
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(cut, tensor.requires_grad)
            else:
                module._buffers[name] = cut
    for number in groups.numbers:
        module = model.get_submodule(number.path)
        setattr(module, number.attribute, number.attribute_value(module, units))
    for path in groups.tensors:
        state_sizes(model.get_submodule(path))
    for path, attribute in groups.caches:
        setattr(model.get_submodule(path), attribute, {})
    for path in removed_blocks(groups.stages, depths):
        remove_block(model, path)


def state_sizes(module: nn.Module) -> None:
    """Set the attributes that state the sizes of a layer's weight."""
    weight = module._parameters.get("weight")
    if isinstance(module, _NormBase):
        statistics = module.running_mean if weight is None else weight
        module.num_features = module.num_features if statistics is None else len(statistics)
    if weight is None:
        return
    if isinstance(module, _ConvNd):
        first, second = weight.shape[:2]
        outs, ins = (second * module.groups, first) if module.transposed else (first, second * module.groups)
        module.out_channels, module.in_channels = outs, ins
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()
