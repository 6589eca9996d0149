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
    """Turn every convolution, linear layer and batch normalisation of `model` into its slimmable kind.

    Parameters, buffers, hooks and names stay what they are, so an optimizer that holds the parameters goes on holding
    them, and as long as nothing is activated the model computes what it did, up to rounding.

    Returns:
        The model itself.

    Raises:
        TypeError: for a layer with weights per channel that has no slimmable kind; nothing is changed then.
    """
    layers = [module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear | _BatchNorm)]
    layers = [module for module in layers if not isinstance(module, Sized | SlimBatchNorm)]
    unknown = sorted({type(module).__name__ for module in layers if type(module) not in SLIMMABLE})
    if unknown:
        known = ", ".join(kind.__name__ for kind in SLIMMABLE)
        raise TypeError(f"no slimmable kind of {', '.join(unknown)}: there are those of {known}")
    for module in layers:
        kind = SLIMMABLE[type(module)]
        module.__class__ = kind  # type: ignore[assignment]  # the same attributes, another forward
        if isinstance(module, SlimBatchNorm):
            module.measured = {}
    return model
