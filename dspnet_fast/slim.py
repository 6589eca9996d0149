"""Cut a subnet out of a slimmable model, as an ordinary, smaller network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_iter

from .models import Classifier, Network, encoder_of, image_channels
from .nn import SlimBatchNorm1d, SlimBatchNorm2d, SlimConv2d, SlimLinear, SlimSequential, activate
from .nn.activate import Sizes, traced_networks
from .nn.attributes import evaluation
from .nn.batch_norm import MomentumBatchNorm, SlimBatchNorm
from .nn.depth import remove_block
from .nn.prefix import select
from .nn.selected import Selected, Skippable
from .nn.shrink import state_sizes
from .nn.sized import Sized
from .nn.stated import state_features
from .subnets import Subnet

PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    SlimConv2d: nn.Conv2d,
    SlimLinear: nn.Linear,
    SlimBatchNorm1d: nn.BatchNorm1d,
    SlimBatchNorm2d: nn.BatchNorm2d,
    SlimSequential: nn.Sequential,
}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the largest output; other dtypes: 0.05


def slim(model: nn.Module, dn: Subnet | str | float | Sizes | None, example: Any = None) -> nn.Module:
    """Copy the subnet `dn` of a slimmable model into a network of the original layers.

    Args:
        model: a model of slimmable layers; not changed.
        dn: the subnet, in a form that `activate` takes.
        example: an input of the model, or a tuple of its inputs, on which the copy is compared with the subnet; by
            default random values of the shape that `slimmable` ran on, or images [2, C, 64, 64], with the C of a
            network of `models`, otherwise 3.

    Returns:
        The network in evaluation mode, with only the subnet's weights. Parameter names are the model's; inactive blocks
        are left out. Batch normalisation has the statistics measured for the subnet, or for an unmeasured full network
        its running statistics. Layers that are used several times are one layer. Layers that do not run in evaluation
        are kept.

    Raises:
        RuntimeError: if no statistics were measured for the subnet (`dspnet_fast.statistics.post_statistics`), or if
            the copy computes other outputs than the subnet.
        ValueError: if the model has no slimmable layers, or one is used with different numbers of input channels.

    Example:
        >>> model = SlimConv2d(3, 16, kernel_size=1)
        >>> slim(model, 0.5)
        Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """
    if not any(isinstance(module, Sized | SlimBatchNorm | Selected) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no slimmable layers: convert it first, with slimmable(model)")
    inputs = _inputs(model, example)
    with activate(model, dn), torch.no_grad():
        with evaluation(model):
            channels, expected = _run(model, inputs)
        plain = _cut(model, channels, _idle_channels(model) | channels)
    if isinstance(plain, Network | Classifier) and isinstance(dn, Subnet | str):
        encoder = encoder_of(plain)
        encoder.full = encoder.subnet(dn) if isinstance(dn, str) else dn
    plain.eval()
    with torch.no_grad():
        _compare(plain(*inputs), expected)
        state_features(model, plain, inputs)
    return plain


def _inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """The inputs to run on, of the model's dtype and on its device."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    random = torch.Generator("cpu").manual_seed(0)
    if example is None:
        # A converted network that is a part of another model may have other inputs than the model.
        whole = isinstance(model, Network | Classifier) or "channel_groups" in vars(model)
        traced = traced_networks(dict(model.named_modules())) if whole else []
        shapes: list[Any] = traced[0][2].inputs if traced else [((2, image_channels(model), 64, 64), torch.float32)]
        example = tuple(
            torch.randn(shape, generator=random, device="cpu")
            if dtype.is_floating_point
            else torch.zeros(shape, dtype=dtype)
            for shape, dtype in shapes
        )
    inputs = example if isinstance(example, tuple) else (example,)

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    return tuple(placed(x) for x in inputs)


def _run(model: nn.Module, inputs: Sequence[Any]) -> tuple[dict[nn.Module, int], Any]:
    """Input channels of each slimmable layer that runs, and the outputs."""
    channels: dict[nn.Module, int] = {}

    def record(module: nn.Module, received: Any) -> None:
        count = received[0].shape[-1 if isinstance(module, SlimLinear) else 1]
        if isinstance(module, SlimConv2d) and len(received[0].shape) == 3:
            count = received[0].shape[0]
        if channels.setdefault(module, count) != count:
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(f"{name} is used with {channels[module]} and with {count} channels: it cannot be cut")

    hooks = [
        module.register_forward_pre_hook(record)
        for module in model.modules()
        if isinstance(module, SlimConv2d | SlimLinear | SlimBatchNorm)
    ]
    try:
        return channels, model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _idle_channels(model: nn.Module) -> dict[nn.Module, int]:
    """Input channels of the layers of traced networks, for those that do not run in evaluation."""
    channels: dict[nn.Module, int] = {}
    for _, root, groups in traced_networks(dict(model.named_modules())):
        units: Any = root.active_units
        for path in groups.tensors:
            module = root.get_submodule(path)
            if isinstance(module, SlimConv2d | SlimLinear):
                count = groups.count(path, "weight", 0 if getattr(module, "groups", 1) > 1 else 1, units)
                whole = module.weight.shape[1]
                if isinstance(module, SlimConv2d) and module.groups > 1:
                    whole = module.in_channels
                    count = None if count is None else count * module.in_channels // module.out_channels
                channels[module] = whole if count is None else count
            elif isinstance(module, SlimBatchNorm):
                count = groups.count(path, "running_mean", 0, units)
                channels[module] = module.num_features if count is None else count
    return channels


def _cut(model: nn.Module, ran: dict[nn.Module, int], channels: dict[nn.Module, int]) -> nn.Module:
    """Copy a model with the active channels of its tensors only.

    Args:
        model: the model, with the subnet active.
        ran: input channels of the layers that run in evaluation.
        channels: input channels of all layers that are known.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in _active(module, channels, module in ran).items():
            whole = module._parameters.get(name, module._buffers.get(name))
            if isinstance(whole, nn.Parameter):
                memo.setdefault(id(whole), nn.Parameter(tensor.detach().clone(), whole.requires_grad))
            elif whole is not None:
                memo[id(whole)] = tensor.detach().clone()
    originals = {path: module for path, module in model.named_modules()}
    plain = copy.deepcopy(model, memo)
    for path, module in list(plain.named_modules()):
        if isinstance(module, Skippable) and module.skipped:
            remove_block(plain, path)
        _restore(module, originals[path], channels)
    return plain


def _active(module: nn.Module, channels: dict[nn.Module, int], runs: bool) -> dict[str, Tensor]:
    """The active part of each tensor of a slimmable layer."""
    active: dict[str, Tensor] = {}
    if isinstance(module, Selected):
        for name, positions in module.active_selection.items():
            whole = module._parameters.get(name, module._buffers.get(name))
            if whole is not None:
                active[name] = select(whole, positions)
    elif isinstance(module, SlimConv2d | SlimLinear) and module in channels:
        count = channels[module]
        if isinstance(module, SlimConv2d) and module.groups > 1:
            groups, size = module._active(count)
            count = count // groups
        else:
            size = module.size
        active["weight"] = module.weight[:size, :count]
        if module.bias is not None:
            active["bias"] = module.bias[:size]
    if isinstance(module, SlimBatchNorm) and module in channels:
        for name in ("weight", "bias"):
            parameter = module._parameters[name]
            if parameter is not None and not isinstance(module, Selected):
                active[name] = parameter[: channels[module]]
        known = module.running_mean is not None or module.active_dn in module.measured
        if known and runs and not isinstance(module, MomentumBatchNorm):
            active["running_mean"], active["running_var"] = module.evaluation_statistics()
        elif module.running_mean is not None and module.running_var is not None and not isinstance(module, Selected):
            active["running_mean"] = module.running_mean[: channels[module]]
            active["running_var"] = module.running_var[: channels[module]]
    return active


def _restore(module: nn.Module, source: nn.Module, channels: dict[nn.Module, int]) -> None:
    """Give a copied layer the class and the sizes of an ordinary one."""
    vars(module).pop("channel_groups", None)
    vars(module).pop("active_units", None)
    if isinstance(module, SlimSequential):
        for name in list(module._modules)[module.size :]:
            del module._modules[name]
    if isinstance(module, Sized):
        vars(module).pop("active_size", None)
        vars(module).pop("norm", None)
    if isinstance(source, SlimConv2d) and source in channels:
        module.groups = source._active(channels[source])[0]  # type: ignore[assignment]
    if isinstance(source, SlimBatchNorm) and not isinstance(source, MomentumBatchNorm):
        for name in ("measured", "measured_with", "active_dn", "views", "view", "bn_groups", "observer"):
            vars(module).pop(name, None)
        if source.running_mean is None and source in channels and source.active_dn in source.measured:
            module.track_running_stats = True  # type: ignore[assignment]
            module.running_mean, module.running_var = (x.clone() for x in source.evaluation_statistics())
        if source.active_dn is not None and isinstance(module.num_batches_tracked, Tensor):
            module.num_batches_tracked.zero_()
    if isinstance(module, Selected):
        for name in ("active_selection", "skipped"):
            vars(module).pop(name, None)
        module.__class__ = module.original_class  # type: ignore[assignment]
    elif type(module) in PLAIN:
        module.__class__ = PLAIN[type(module)]
    if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm | SlimBatchNorm):
        vars(module).pop("process_group", None)
    state_sizes(module)


def _compare(outputs: Any, expected: Any) -> None:
    """Raise RuntimeError unless outputs are equal up to rounding."""
    for got, wanted in zip(tree_iter(outputs), tree_iter(expected), strict=True):
        if not isinstance(wanted, Tensor) or wanted.is_meta or not wanted.is_floating_point():
            continue
        if got.shape == wanted.shape and not wanted.numel():
            continue
        limit = TOLERANCE.get(wanted.dtype, 0.05) * wanted.abs().max().clamp(min=1e-6)
        if got.shape != wanted.shape or bool(((got - wanted).abs() > limit).any()):
            raise RuntimeError(
                "the network cut out computes other outputs than the subnet: its forward method does not follow the "
                "sizes of its layers, or is random; report it with the network's name"
            )
