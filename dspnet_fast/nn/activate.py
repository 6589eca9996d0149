"""Select the subnet that a slimmable model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from ..subnets import Subnet, make_divisible, width_name
from .attributes import AttributeChanges
from .batch_norm import SlimBatchNorm
from .conv import SlimConv2d
from .groups import ChannelGroups
from .recomputation import note
from .selected import Selected
from .sized import Sized

Sizes = Mapping[str, int]


class ActiveSubnet(AttributeChanges):
    """Result of `activate`; as a context manager it restores the previously active subnet on exit.

    Attributes:
        name: name of the active subnet.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.at_exit: Callable[[], object] | None = None

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self.at_exit is not None:
            self.at_exit()


def activate(
    model: nn.Module,
    dn: Subnet | str | float | Sizes | None,
    *,
    views: int = 1,
    modules: Mapping[str, nn.Module] | None = None,
) -> ActiveSubnet:
    """Make `model` compute as the subnet `dn`: permanently, or inside a `with` block only.

    Args:
        model: any module that contains slimmable layers.
        dn: the subnet, in one of these forms:

            - a `Subnet` or its name, for models with a method `layer_sizes(dn)` (all of `dspnet_fast.models`);
            - for other models, a width from 0 to 1 by which the output channels of every ungrouped `SlimConv2d` are
              multiplied, or a mapping from module names to sizes, where modules not in the mapping keep their full
              size;
            - None for the full network.
        views: number of augmented views, which are equal, consecutive parts of the batch. In training batch
            normalisation normalises each view separately, or each of its `bn_groups`.
        modules: `dict(model.named_modules())`, which a training loop can keep: to find the modules takes longer than to
            activate a subnet.

    Returns:
        A context manager that restores the previous subnet on exit.

    Raises:
        ValueError: if the model does not contain the subnet.

    Example:
        >>> layer = SlimConv2d(3, 16, kernel_size=1)
        >>> with activate(layer, 0.5):
        ...     layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """
    modules = dict(model.named_modules()) if modules is None else modules
    name, sizes = _resolve(model, modules, dn)
    active = ActiveSubnet(name)
    left = dict(sizes)
    managed: set[nn.Module] = set()  # layers whose channels the network's groups determine
    try:
        for path, root, groups in traced_networks(modules):
            left = _activate_groups(active, path, root, groups, modules, left, managed)
    except ValueError:
        active.__exit__()
        raise
    for path, module in modules.items():
        if isinstance(module, Sized) and module not in managed:
            size = left.pop(path, None)
            if size is not None and not 0 <= size <= module.full_size:
                active.__exit__()
                raise ValueError(
                    f"subnet {name} needs {size} units of {path}, which has {module.full_size}: "
                    "choose a subnet within the full network"
                )
            active.set(module, "active_size", size)
        if isinstance(module, SlimBatchNorm):
            active.set(module, "active_dn", name if sizes else None)
            active.set(module, "views", views)
    if left:
        active.__exit__()
        raise ValueError(f"subnet {name} has sizes for modules that the model does not have: {', '.join(left)}")
    full = partial(activate, dn=None)
    before = note(model, partial(activate, dn=dn, views=views), full)
    active.at_exit = lambda: note(model, before, full)
    return active


def check_width(width: float) -> None:
    """Raise ValueError for a width that is no share of the channels."""
    if not 0 < width <= 1:
        raise ValueError(f"a width must be more than 0 and at most 1, got {width}")


def traced_networks(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module, ChannelGroups]]:
    """The networks among modules that `slimmable` has converted: path, network and channel groups."""
    traced = [(path, module) for path, module in modules.items() if "channel_groups" in module.__dict__]
    return [(path, module, vars(module)["channel_groups"]) for path, module in traced]


def _activate_groups(
    active: ActiveSubnet,
    path: str,
    root: nn.Module,
    groups: ChannelGroups,
    modules: Mapping[str, nn.Module],
    sizes: Sizes,
    managed: set[nn.Module],
) -> dict[str, int]:
    """Activate the channels of a converted network, one of `modules`; returns the sizes of other modules."""
    start = f"{path}." if path else ""

    def named(name: str) -> nn.Module:
        module = modules.get(start + name)  # which lacks other names of a module
        return root.get_submodule(name) if module is None else module

    own = {name.removeprefix(start): size for name, size in sizes.items() if name.startswith(start)}
    units, rest = groups.of_sizes(own)
    active.set(root, "active_units", units)
    for name, size in groups.layer_sizes(units).items():
        module = named(name)
        if isinstance(module, Selected):
            active.set(module, "active_selection", groups.selection(name, units, module))
        elif isinstance(module, Sized):
            active.set(module, "active_size", size)
        elif not isinstance(module, SlimBatchNorm):
            raise ValueError(
                f"{start}{name} was replaced after slimmable(), by {type(module).__name__}: replace layers before"
            )
        managed.add(module)
    for number in groups.numbers:
        module = named(number.path)
        if not isinstance(module, Sized):  # which take the number from their input
            active.set(module, number.attribute, number.attribute_value(module, units))
    for cache, attribute in groups.caches:
        active.set(named(cache), attribute, {})
    for stage in groups.stages:
        depth = rest.pop(stage.name, len(stage.blocks))
        stage.check(depth)
        for index, block in enumerate(stage.blocks[stage.least :], stage.least):
            active.set(modules[start + block], "skipped", index >= depth)
    others = {name: size for name, size in sizes.items() if not name.startswith(start)}
    return others | {start + name: size for name, size in rest.items()}


def _resolve(
    model: nn.Module, modules: Mapping[str, nn.Module], dn: Subnet | str | float | Sizes | None
) -> tuple[str, Sizes]:
    """Return the subnet's name and the sizes that differ from the full network's."""
    if dn is None:
        return "full", {}
    if isinstance(dn, Mapping):
        return ",".join(f"{path}={size}" for path, size in dn.items()), dn
    layer_sizes = getattr(model, "layer_sizes", None)
    if layer_sizes is not None:
        name, sizes = layer_sizes(dn)
    elif isinstance(dn, float | int):
        check_width(dn)
        name = width_name(dn)
        traced = traced_networks(modules)
        sizes = {
            f"{path}.{group}" if path else group: size
            for path, _, groups in traced
            for group, size in groups.sizes(groups.at(dn)).items()
        }
        if not traced:
            sizes = {
                path: min(make_divisible(module.full_size * dn), module.full_size)
                for path, module in modules.items()
                if isinstance(module, SlimConv2d) and module.groups == 1
            }
        elif dn == 1:
            sizes = {}
    else:
        raise ValueError(
            f"{type(model).__name__} has no layer_sizes() method: give a width or a mapping instead of {dn!r}"
        )
    return name, {path: size for path, size in sizes.items() if size != getattr(modules.get(path), "full_size", None)}
