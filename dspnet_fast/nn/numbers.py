"""Numbers of channels among the attributes of modules, which a forward method may use: `num_heads`, `normalized_shape`.

Layers of torch.nn have known attributes. Those of other modules are compared with the sizes of their tensors; they are
changed only if a subnet cannot run without, except for numbers of attention heads, which are always changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .groups import ChannelGroups, Dimension, Number

MAX_GUESSES = 24  # for the attributes of a class
HEADS = ("num_heads", "heads", "n_heads", "nhead", "num_attention_heads", "nh")
HEAD_SIZES = ("head_dim", "dim_head", "key_dim")  # of which subnets keep all channels, if there are several heads
UNRELATED = ("training", "num_classes", "patch_size", "window_size", "img_size", "stride", "kernel_size", "dilation",
             "padding", "depth", "image_size", "grid_size", "input_size", "active_units")  # fmt: skip


def known_numbers(model: nn.Module, groups: ChannelGroups) -> list[Number]:
    """Attributes of torch.nn's layers, and numbers of attention heads of all modules."""
    return list(_known_numbers(model, groups))


def _known_numbers(model: nn.Module, groups: ChannelGroups) -> Iterator[Number]:
    modules = dict(model.named_modules())
    for path, module in modules.items():
        of = {name: {d.dim: d for d in found} for name, found in groups.tensors.get(path, {}).items()}
        weight = of.get("weight", {})
        if isinstance(module, _ConvNd):
            grouped = module.groups > 1
            if grouped and 0 in weight:
                yield Number(path, "groups", None, module.groups, weight[0])
            if not type(module).__module__.startswith(("torch.", "dspnet_fast.")):  # whose forward method may read them
                names = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
                for attribute, dim in zip(names, (0, 0 if grouped else 1), strict=True):
                    if dim in weight:
                        yield Number(path, attribute, None, vars(module)[attribute], weight[dim])
        elif isinstance(module, nn.GroupNorm) and 0 in weight:
            yield Number(path, "num_channels", None, module.num_channels, weight[0])
            if module.num_groups > 1:
                yield Number(path, "num_groups", None, module.num_groups, weight[0])
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            for dim, dimension in weight.items():
                yield Number(path, "normalized_shape", dim, module.normalized_shape[dim], dimension)
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and 0 in weight:
            yield Number(path, "num_features", None, module.num_features, weight[0])
        elif isinstance(module, nn.MultiheadAttention):
            _tie(groups, list(_nearby(module, path, groups)))
            outputs = groups.tensors.get(f"{path}.out_proj", {}).get("weight", [])
            for dimension in outputs:
                if dimension.dim == 1:
                    yield Number(path, "embed_dim", None, module.embed_dim, dimension)
        elif isinstance(module, nn.Transformer):
            for dimension in groups.tensors.get(f"{path}.encoder.layers.0.norm1".lstrip("."), {}).get("weight", []):
                yield Number(path, "d_model", None, module.d_model, dimension)
        for attribute in HEADS:
            count = vars(module).get(attribute)
            if isinstance(count, int) and count > 1:
                for dimension in _nearby(module, path, groups):
                    if dimension.count_units() == count < len(dimension.group):
                        yield Number(path, attribute, None, count, dimension, units=True)
                        break


def tie_heads(model: nn.Module, groups: ChannelGroups, kind: type[nn.Module]) -> bool:
    """Give the input of every attention module of a class as many channels as all its heads; False if nothing is new.

    Forward methods that compute the size of a head from the input need it.
    """
    before = dict(groups.ties)
    for path, module in model.named_modules():
        if type(module) is kind:
            _tie(groups, list(_nearby(module, path, groups)))
    return groups.ties != before


def _tie(groups: ChannelGroups, dimensions: list[Dimension]) -> None:
    single = [(int(d.group[0]), len(d.group)) for d in dimensions if len(np.unique(d.group)) == 1]
    heads = [index for index, _ in single if index >= 0 and groups.groups[index].unit_size > 1]
    sizes = {index: size for index, size in reversed(single) if index >= 0 and groups.groups[index].unit_size == 1}
    for index, size in sizes.items():
        leaders = [head for head in heads if (head, size) in single]
        if leaders and index not in groups.ties:
            groups.ties[index] = leaders[0]


def guessed_numbers(model: nn.Module, groups: ChannelGroups, kind: type[nn.Module]) -> Iterator[list[Number]]:
    """Guesses at what the attributes of all modules of a class count.

    An attribute may count the channels of any dimension of its size, among the module's own tensors and those of its
    children. There is a guess for every combination, the most likely first. Guesses that also count the channels of the
    module around follow: a layer may split off channels that it passes on. In the last guesses, the size of a head may
    shrink, as it does if there is one head, and a number may count channels that occur several times, such as those of
    queries and keys.
    """
    yield from _guesses(model, groups, kind)
    yield from _guesses(model, groups, kind, around=True)
    yield from _guesses(model, groups, kind, sizes=True)


def _guesses(
    model: nn.Module, groups: ChannelGroups, kind: type[nn.Module], around: bool = False, sizes: bool = False
) -> Iterator[list[Number]]:
    places: dict[tuple[str, int | None], int] = {}  # number of choices by attribute and place
    choices: list[tuple[str, tuple[str, int | None], int, list[Dimension]]] = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if type(module) is not kind:
            continue
        dimensions = _with_parts(_nearby(module, path, groups, levels=4 if sizes else 3))
        if path and (around or not dimensions):  # some layers have no parameters
            parent = path.rpartition(".")[0]
            own = {len(dimension.group) for dimension in dimensions}
            outer = _with_parts(_nearby(modules[parent], parent, groups))
            dimensions += [dimension for dimension in outer if len(dimension.group) not in own]
        for attribute, place, number in _numbers_of(module):
            if attribute in HEAD_SIZES and not sizes:
                continue
            children = [name for name, _ in module.named_children()]
            first: list[Dimension] = []  # an element of a list may belong to the child of the same place
            if place is not None and place < len(children):
                child = f"{path}.{children[place]}"
                first = list(_nearby(module.get_submodule(children[place]), child, groups))
            equal: dict[tuple[int, ...], Dimension] = {}
            found = [dimension for dimension in [*first, *dimensions] if len(dimension.group) == number]
            if sizes:
                found += [d for d in dimensions if d.count_units() == number and len(d.group) <= 3 * number]
            for dimension in found:
                if attribute not in HEAD_SIZES or (dimension.dim == 0 and dimension.count_units() == number):
                    equal.setdefault(tuple(np.unique(dimension.group)), dimension)
            if equal:
                key = attribute, place
                places[key] = max(places.get(key, 0), len(equal))
                choices.append((path, key, number, list(equal.values())))
    if not choices:
        return
    for picked in itertools.islice(itertools.product(*(range(count) for count in places.values())), MAX_GUESSES):
        index = dict(zip(places, picked, strict=True))
        yield [
            Number(path, *key, number, equal[min(index[key], len(equal) - 1)]) for path, key, number, equal in choices
        ]


def _with_parts(dimensions: Iterator[Dimension]) -> list[Dimension]:
    """Dimensions, and then the positions of each group in those that have several."""
    whole = list(dimensions)
    return [*whole, *(part for dimension in whole for part in dimension.parts())]


def _numbers_of(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Integer attributes of a module that may count channels: name, place in a tuple or list, and value."""
    for attribute, value in vars(module).items():
        known = isinstance(module, _ConvNd) and attribute in ("in_channels", "out_channels")
        if known or attribute.startswith("_") or attribute in UNRELATED or attribute in HEADS:
            continue
        if isinstance(value, tuple | list):
            if all(isinstance(number, int) for number in value):
                yield from ((attribute, place, number) for place, number in enumerate(value) if number > 1)
        elif isinstance(value, int) and value > 1:
            yield attribute, None, value


def _nearby(module: nn.Module, path: str, groups: ChannelGroups, levels: int = 3) -> Iterator[Dimension]:
    """Dimensions of a module's own tensors, of its children's, and of its grandchildren's, or of further levels."""
    level = [(path, module)]
    for _ in range(levels):
        for name, _ in level:
            for dimensions in groups.tensors.get(name, {}).values():
                yield from dimensions
        level = [(f"{name}.{child}" if name else child, of) for name, m in level for child, of in m.named_children()]
