"""Choose which subnet of a slimmable model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..subnets import Subnet, make_divisible, width_name
from .batch_norm import SlimBatchNorm
from .conv import SlimConv2d
from .sized import Sized

Sizes = Mapping[str, int]


class ActiveSubnet:
    """The state that `activate` replaced; as a context manager it puts that state back on exit."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._before: list[tuple[nn.Module, str, Any]] = []

    def set(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute of a module and remember what it was."""
        self._before.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    def __enter__(self) -> ActiveSubnet:
        return self

    def __exit__(self, *exception: object) -> None:
        for module, attribute, value in self._before:
            setattr(module, attribute, value)


def activate(model: nn.Module, dn: Subnet | str | float | Sizes | None, *, views: int = 1) -> ActiveSubnet:
    """Make `model` compute as the subnet `dn` from now on; `with activate(model, dn): ...` only inside the block.

    Args:
        model: any module with slimmable layers in it.
        dn: what the model's own `layer_sizes(dn)` method takes (a `Subnet` or its name), if it has one. For other
            models a width between 0 and 1 by which every ungrouped `SlimConv2d` is scaled, or a mapping from the names
            of modules to sizes; what a mapping does not name is full. None is the full network.
        views: batches hold this many augmented views one after another; batch normalisation treats each by itself.

    Raises:
        ValueError: for a subnet that the model does not contain.
    """
    name, sizes = _resolve(model, dn)
    active = ActiveSubnet(name)
    left = dict(sizes)
    for path, module in model.named_modules():
        if isinstance(module, Sized):
            size = left.pop(path, None)
            if size is not None and not 0 <= size <= module.full_size:
                active.__exit__()
                raise ValueError(f"{name} wants {size} of the {module.full_size} units of {path}")
            active.set(module, "active_size", size)
        elif isinstance(module, SlimBatchNorm):
            active.set(module, "active_dn", name if sizes else None)
            active.set(module, "views", views)
    if left:
        active.__exit__()
        raise ValueError(f"{name} names modules that the model does not have: {', '.join(left)}")
    return active


def _resolve(model: nn.Module, dn: Subnet | str | float | Sizes | None) -> tuple[str, Sizes]:
    """Return the subnet's name and the sizes that differ from the full network's."""
    if dn is None:
        return "full", {}
    if isinstance(dn, Mapping):
        return ",".join(f"{path}={size}" for path, size in dn.items()), dn
    layer_sizes = getattr(model, "layer_sizes", None)
    if layer_sizes is not None:
        name, sizes = layer_sizes(dn)
    elif isinstance(dn, float | int):
        if not 0 < dn <= 1:
            raise ValueError(f"a width is more than 0 and at most 1, not {dn}")
        name = width_name(dn)
        sizes = {
            path: min(make_divisible(module.full_size * dn), module.full_size)
            for path, module in model.named_modules()
            if isinstance(module, SlimConv2d) and module.groups == 1
        }
    else:
        raise ValueError(
            f"{type(model).__name__} has no layer_sizes() method: give a width or a mapping instead of {dn!r}"
        )
    modules = dict(model.named_modules())
    return name, {path: size for path, size in sizes.items() if size != getattr(modules.get(path), "full_size", None)}
