"""Make an existing network slimmable in place."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .batch_norm import SlimBatchNorm, SlimBatchNorm1d, SlimBatchNorm2d
from .conv import SlimConv2d
from .linear import SlimLinear
from .sized import Sized

SLIMMABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SlimConv2d,
    nn.Linear: SlimLinear,
    nn.BatchNorm1d: SlimBatchNorm1d,
    nn.BatchNorm2d: SlimBatchNorm2d,
}


def slimmable(model: nn.Module) -> nn.Module:
    """Replace every convolution, linear layer and batch normalisation of `model` by its slimmable counterpart, in
    place.

    Parameters, buffers, hooks and names stay the same, so existing optimizers keep working. Until a subnet is
    activated, the model's outputs change by rounding only.

    Args:
        model: a network of torch.nn layers.

    Returns:
        The model itself.

    Raises:
        TypeError: if a layer with weights has no slimmable counterpart; the model is then unchanged.

    Example:
        >>> model = slimmable(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)))
        >>> type(model[0]).__name__
        'SlimConv2d'
    """
    layers = [module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear | _BatchNorm)]
    layers = [module for module in layers if not isinstance(module, Sized | SlimBatchNorm)]
    unknown = sorted({type(module).__name__ for module in layers if type(module) not in SLIMMABLE})
    if unknown:
        known = ", ".join(kind.__name__ for kind in SLIMMABLE)
        raise TypeError(f"no slimmable counterpart of {', '.join(unknown)}: the supported layers are {known}")
    for module in layers:
        kind = SLIMMABLE[type(module)]
        module.__class__ = kind  # type: ignore[assignment]  # only forward differs
        if isinstance(module, SlimBatchNorm):
            module.measured = {}
    return model
