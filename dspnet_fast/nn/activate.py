"""Select the subnet that a slimmable model computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..subnets import Subnet, make_divisible, width_name
from .attributes import AttributeChanges
from .batch_norm import SlimBatchNorm
from .conv import SlimConv2d
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


def activate(model: nn.Module, dn: Subnet | str | float | Sizes | None, *, views: int = 1) -> ActiveSubnet:
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
    modules = dict(model.named_modules())
    name, sizes = _resolve(model, modules, dn)
    active = ActiveSubnet(name)
    left = dict(sizes)
    for path, module in modules.items():
        if isinstance(module, Sized):
            size = left.pop(path, None)
            if size is not None and not 0 <= size <= module.full_size:
                active.__exit__()
                raise ValueError(
                    f"subnet {name} needs {size} units of {path}, which has {module.full_size}: "
                    "choose a subnet within the full network"
                )
            active.set(module, "active_size", size)
        elif isinstance(module, SlimBatchNorm):
            active.set(module, "active_dn", name if sizes else None)
            active.set(module, "views", views)
    if left:
        active.__exit__()
        raise ValueError(f"subnet {name} has sizes for modules that the model does not have: {', '.join(left)}")
    return active


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
        if not 0 < dn <= 1:
            raise ValueError(f"a width must be more than 0 and at most 1, got {dn}")
        name = width_name(dn)
        sizes = {
            path: min(make_divisible(module.full_size * dn), module.full_size)
            for path, module in modules.items()
            if isinstance(module, SlimConv2d) and module.groups == 1
        }
    else:
        raise ValueError(
            f"{type(model).__name__} has no layer_sizes() method: give a width or a mapping instead of {dn!r}"
        )
    return name, {path: size for path, size in sizes.items() if size != getattr(modules.get(path), "full_size", None)}
