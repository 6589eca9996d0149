"""Channel groups of a network: sets of channels in its tensors that shrink together, found by tracing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..subnets import make_divisible
from .depth import Stage, removed_blocks, repeated_blocks, stages_of
from .labels import FIXED, Axes, Labels
from .prefix import Positions
from .tracing import Tracer

OUTPUTS = "outputs"  # in `keep`: the channels of the network's outputs


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that a subnet reduces to a prefix.

    Attributes:
        name: path of a module whose output channels these are.
        units: number of units, each of which is kept or dropped as a whole.
        unit_size: number of output channels of a unit, above 1 for attention heads and groups of a convolution.
    """

    name: str
    units: int
    unit_size: int

    @property
    def full_size(self) -> int:
        """Number of channels."""
        return self.units * self.unit_size

    def units_at(self, width: float) -> int:
        """Number of units at a width: channels are rounded as `make_divisible` does, other units to the nearest."""
        if self.unit_size == 1:
            return min(make_divisible(self.units * width), self.units)
        return max(1, int(self.units * width + 0.5))


@dataclass(frozen=True)
class Dimension:
    """The channels along a dimension of a tensor.

    Attributes:
        dim: the dimension.
        group: index of each position's group, -1 for positions that all subnets keep.
        unit: index of each position's unit in the group.
    """

    dim: int
    group: np.ndarray
    unit: np.ndarray

    def kept(self, units: Sequence[int]) -> np.ndarray:
        """The positions that remain if each group keeps so many units."""
        limits = np.append(np.asarray(units, dtype=np.int64), 1)  # the last one is for group -1, whose unit is 0
        return np.flatnonzero(self.unit < limits[self.group])

    def count_units(self, kept: np.ndarray | slice = slice(None)) -> int:
        """Number of units among positions."""
        return len(np.unique(np.stack([self.group[kept], self.unit[kept]]), axis=1).T)

    def parts(self) -> list[Dimension]:
        """The positions of each group, if there are several."""
        groups = np.unique(self.group)
        chosen = [self.group == group for group in groups] if len(groups) > 1 else []
        return [Dimension(self.dim, self.group[mask], self.unit[mask]) for mask in chosen]

    @property
    def is_prefix(self) -> bool:
        """Whether every subnet keeps a prefix."""
        return len(np.unique(self.group)) == 1 and bool((np.diff(self.unit) >= 0).all())


@dataclass(frozen=True)
class Number:
    """An attribute that states a number of channels.

    Attributes:
        path: the module's path.
        attribute: the attribute's name.
        place: index in an attribute that is a tuple or list; None for an integer.
        full: the number in the full network.
        dimension: the channels that it counts.
        units: whether it counts units, such as heads, instead of channels.
    """

    path: str
    attribute: str
    place: int | None
    full: int
    dimension: Dimension
    units: bool = False
    _values: dict[tuple[int, ...], int] = field(init=False, default_factory=dict, repr=False, compare=False)

    def value(self, units: tuple[int, ...]) -> int:
        """The number if each group keeps so many units."""
        if units not in self._values:
            kept = self.dimension.kept(units)
            self._values[units] = (
                self.full * self.dimension.count_units(kept) // self.dimension.count_units()
                if self.units
                else len(kept) * self.full // len(self.dimension.group)
            )
        return self._values[units]

    def attribute_value(self, module: nn.Module, units: tuple[int, ...]) -> Any:
        """The value of the whole attribute if each group keeps so many units."""
        value = self.value(units)
        if self.place is None:
            return value
        before = getattr(module, self.attribute)
        return type(before)(value if place == self.place else old for place, old in enumerate(before))


class ChannelGroups:
    """The channel groups of a network, and which of them each dimension of each tensor has.

    Attributes:
        groups: the groups.
        tensors: by path of a module and name of its parameter or buffer, the dimensions with channels.
        foreign: paths of modules whose tensors other modules use.
        keeps_outputs: whether all subnets have the outputs of the full network.
        numbers: attributes of modules that count channels.
        ties: indices of groups that have as many channels as another one at every width, and the index of that group.
        inputs: the inputs that were traced: shape and dtype of tensors, other values themselves.
        caches: path of a module and attribute of every dictionary in which evaluation keeps tensors.
        stages: blocks that repeat, of which a subnet runs the first ones.
        fixed_blocks: why other blocks that repeat cannot be left out.
    """

    def __init__(self, groups: Sequence[ChannelGroup], tensors: dict[str, dict[str, list[Dimension]]]) -> None:
        self.groups = tuple(groups)
        self.tensors = tensors
        self.foreign: set[str] = set()
        self.keeps_outputs = False
        self.numbers: list[Number] = []
        self.ties: dict[int, int] = {}
        self.inputs: list[Any] = []
        self.caches: list[tuple[str, str]] = []
        self.stages: tuple[Stage, ...] = ()
        self.fixed_blocks: tuple[str, ...] = ()
        self._sizes: dict[tuple[int, ...], dict[str, int | None]] = {}
        self._selections: dict[tuple[Any, ...], dict[str, Positions]] = {}

    def __deepcopy__(self, memo: Any) -> ChannelGroups:
        return self  # copies of the network have the same groups

    def reduced(self, units: tuple[int, ...], depths: Sequence[int]) -> ChannelGroups:
        """The groups of the network of which each group has kept so many units, and each stage so many blocks."""
        removed = tuple(removed_blocks(self.stages, depths))

        def remains(path: str) -> bool:
            return not any(path == block or path.startswith(f"{block}.") for block in removed)

        def cut(dimension: Dimension) -> Dimension:
            kept = dimension.kept(units)
            return Dimension(dimension.dim, dimension.group[kept], dimension.unit[kept])

        tensors = {
            path: {name: [cut(d) for d in dimensions] for name, dimensions in of.items()}
            for path, of in self.tensors.items()
            if remains(path)
        }
        made = ChannelGroups([replace(g, units=n) for g, n in zip(self.groups, units, strict=True)], tensors)
        for name in ("foreign", "keeps_outputs", "ties", "inputs"):
            setattr(made, name, getattr(self, name))
        numbers = [number for number in self.numbers if remains(number.path)]
        made.numbers = [replace(n, full=n.value(units), dimension=cut(n.dimension)) for n in numbers]
        stages = [replace(stage, blocks=stage.blocks[:depth]) for stage, depth in zip(self.stages, depths, strict=True)]
        made.stages = tuple(stages)
        made.caches = [cache for cache in self.caches if remains(cache[0])]
        return made

    def full(self) -> tuple[int, ...]:
        """Units of the full network."""
        return tuple(group.units for group in self.groups)

    def full_depths(self) -> tuple[int, ...]:
        """Blocks of the full network's stages."""
        return tuple(len(stage.blocks) for stage in self.stages)

    def at(self, width: float) -> tuple[int, ...]:
        """Units of every group at a width."""
        units = [group.units_at(width) for group in self.groups]
        for follower, leader in self.ties.items():
            units[follower] = units[leader] * self.groups[follower].units // self.groups[leader].units
        return tuple(units)

    def sizes(self, units: Sequence[int]) -> dict[str, int]:
        """Channels by name of the group."""
        return {g.name: count * g.unit_size for g, count in zip(self.groups, units, strict=True)}

    def of_sizes(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], dict[str, int]]:
        """Units of every group for channels by module path, and the entries that name no group.

        Raises:
            ValueError: if a number of channels is not a whole number of units, or above that of the full network.
        """
        units, left = list(self.full()), dict(sizes)
        for index, group in enumerate(self.groups):
            size = left.pop(group.name, None)
            if size is None:
                continue
            count, rest = divmod(size, group.unit_size)
            if rest or not 1 <= count <= group.units:
                raise ValueError(
                    f"{group.name} has {group.full_size} channels in units of {group.unit_size}: it cannot have {size}"
                )
            units[index] = count
        return tuple(units), left

    def count(self, path: str, name: str, dim: int, units: Sequence[int]) -> int | None:
        """Number of positions of a dimension of a tensor that are kept; None if all are."""
        for dimension in self.tensors[path].get(name, ()):
            if dimension.dim == dim:
                count = len(dimension.kept(units))
                return count if count < len(dimension.group) else None
        return None

    def layer_sizes(self, units: tuple[int, ...]) -> Mapping[str, int | None]:
        """By path, how many of the first dimension's positions of each module's weight are kept; None if all are."""
        if units not in self._sizes:
            self._sizes[units] = {path: self.count(path, "weight", 0, units) for path in self.tensors}
        return self._sizes[units]

    def selection(self, path: str, units: tuple[int, ...], module: nn.Module) -> dict[str, Positions]:
        """The kept positions of every tensor of a module of which some are dropped, on the module's device."""
        device = _device(module)
        key = path, units, device
        if key not in self._selections:
            found = {}
            for name, dimensions in self.tensors[path].items():
                kept = [(d.dim, d.kept(units), len(d.group)) for d in dimensions]
                positions = tuple((dim, _compact(at, device)) for dim, at, size in kept if len(at) < size)
                if positions:
                    found[name] = positions
            self._selections[key] = found
        return self._selections[key]

    def labels(self, tensors: Mapping[tuple[str, str], Tensor]) -> tuple[Labels, list[tuple[Tensor, Axes]]]:
        """Labels that do not grow any more, one for every unit, and those of all tensors."""
        starts = np.cumsum([1, *self.full()])
        labels = Labels()
        labels.new(int(starts[-1]))
        labels.frozen = True
        sources = []
        for (path, name), tensor in tensors.items():
            axes = []
            for d in self.tensors.get(path, {}).get(name, ()):
                of = torch.from_numpy(np.where(d.group < 0, FIXED, starts[d.group] + d.unit))
                axes.append(of.view([-1 if dim == d.dim else 1 for dim in range(tensor.ndim)]))
            sources.append((tensor, axes))
        return labels, sources


def _device(module: nn.Module) -> torch.device:
    """The device of a module's own tensors."""
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                return tensor.device
    raise TypeError(f"{type(module).__name__} has no tensors")


def _compact(kept: np.ndarray, device: torch.device) -> int | Tensor:
    """The length of a prefix, or the positions."""
    return len(kept) if kept[-1] == len(kept) - 1 else torch.as_tensor(kept, device=device)


def caches_of(model: nn.Module) -> list[tuple[str, str]]:
    """Path of a module and attribute of every dictionary that is a cache, such as timm's `attention_bias_cache`."""
    return [
        (path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name.endswith("cache") and isinstance(value, dict)
    ]


def owned_tensors(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Parameters and floating-point buffers by path of their module and name, each tensor once."""
    found: dict[tuple[str, str], Tensor] = {}
    known: set[int] = set()
    for path, module in model.named_modules():
        own = (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
        for name, tensor in own:
            if id(tensor) not in known and tensor.is_floating_point() and tensor.ndim:
                known.add(id(tensor))
                found[path, name] = tensor
    return found


def find_groups(model: nn.Module, runs: Sequence[tuple[nn.Module, Any]], keep: Iterable[str]) -> ChannelGroups:
    """Trace a network and group its channels.

    Args:
        model: the network.
        runs: the network, or a copy that shares its parameters, in each mode to trace, with the inputs.
        keep: paths of modules whose channels are kept, and `OUTPUTS`.
    """
    tensors = owned_tensors(model)
    labels = Labels()
    axes = {key: labels.of_dimensions(tensor.shape) for key, tensor in tensors.items()}
    seen: set[int] = set()
    foreign: set[str] = set()
    keep = set(keep)
    returned: dict[nn.Module, str] = {}
    for network, inputs in runs:
        own = owned_tensors(network)
        sources = [(own[key], of) for key, of in axes.items() if key in own]
        tracer = Tracer(labels, sources, {module: path for path, module in network.named_modules()})
        if network is model:
            tracer.blocks = {model.get_submodule(path) for _, blocks in repeated_blocks(model) for path in blocks}
        outputs = tracer.run(network, inputs)
        returned |= tracer.returned
        if OUTPUTS in keep:
            for _, of in outputs:
                labels.fix(of)
        used = {key: tracer.users.get(id(tensor), set()) for key, tensor in own.items()}
        seen |= {index for index, key in enumerate(tensors) if used.get(key)}
        foreign |= {key[0] for key, users in used.items() if users - {key[0]}}
    recurrent = {path for path, module in model.named_modules() if isinstance(module, nn.RNNBase)}  # of _flat_weights
    for index, ((path, _), of) in enumerate(axes.items()):
        kept = path in recurrent or any(path == name or path.startswith(f"{name}.") for name in keep)
        if kept or index not in seen:
            labels.fix(of)
    groups = _grouped(labels, tensors, axes)
    owners = {id(tensor): key for key, tensor in tensors.items()}
    for path, module in model.named_modules():  # which may share a tensor of another one
        for name, parameter in module.named_parameters(recurse=False):
            owner, own = owners.get(id(parameter), (path, name))
            if owner != path and own in groups.tensors.get(owner, {}):
                groups.tensors.setdefault(path, {})[name] = groups.tensors[owner][own]
    groups.foreign = foreign | _read_by_fast_paths(model)
    groups.keeps_outputs = OUTPUTS in keep
    groups.stages, groups.fixed_blocks = stages_of(model, returned, {group.name for group in groups.groups})
    return groups


def _read_by_fast_paths(model: nn.Module) -> set[str]:
    """Paths of layers whose tensors torch's encoder layer reads itself, in evaluation without gradients."""
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return {f"{path}.{name}".lstrip(".") for path in layers for name in ("linear1", "linear2", "norm1", "norm2")}


def _grouped(labels: Labels, tensors: Mapping[tuple[str, str], Tensor], axes: Mapping[Any, Axes]) -> ChannelGroups:
    """Group the sets of labels that occur in the same dimensions."""
    roots: dict[tuple[tuple[str, str], int], np.ndarray] = {}
    for key, of in axes.items():
        for axis in of:
            dim = next(index for index, size in enumerate(axis.shape) if size > 1)
            roots[key, dim] = labels.roots(axis.flatten()).numpy()
    places: dict[int, list[tuple[tuple[str, str], int]]] = {}
    for place, found in roots.items():
        for root in dict.fromkeys(found.tolist()):
            if root != FIXED:
                places.setdefault(root, []).append(place)
    by_places: dict[tuple, list[int]] = {}
    for root, where in places.items():
        by_places.setdefault(tuple(where), []).append(root)
    groups: list[ChannelGroup] = []
    group_of, unit_of = np.full(len(labels), -1), np.zeros(len(labels), dtype=np.int64)
    names: set[str] = set()
    for found_in, members in by_places.items():
        # A tensor with one value per head may come before the layer that computes the heads' channels.
        producers = [place for place in found_in if place[1] == 0 and tensors[place[0]].ndim > 1]
        producers = producers or [place for place in found_in if place[1] == 0] or [found_in[0]]
        sizes = {place: int(np.isin(roots[place], members).sum()) for place in producers}
        producer = max(sizes, key=lambda place: sizes[place])
        size = sizes[producer]
        name, count = producer[0][0] or producer[0][1], 1
        while name in names:
            count += 1
            name = f"{producer[0][0] or producer[0][1]}:{count}"
        names.add(name)
        group_of[members] = len(groups)
        unit_of[members] = np.arange(len(members))
        groups.append(ChannelGroup(name, len(members), max(1, size // len(members))))
    dimensions: dict[str, dict[str, list[Dimension]]] = {}
    for ((path, name), dim), found in roots.items():
        if (found != FIXED).any():
            made = Dimension(dim, group_of[found], unit_of[found])
            dimensions.setdefault(path, {}).setdefault(name, []).append(made)
    return ChannelGroups(groups, dimensions)
