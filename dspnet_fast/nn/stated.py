"""Numbers of channels that networks of timm state: `num_features`, `head_hidden_size`, `feature_info`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .activate import activate
from .attributes import evaluation

ENTRIES = ("forward", "forward_features", "forward_intermediates")  # methods by which other models call such networks
NUMBERS = ("num_features", "head_hidden_size", "embed_dim", "hidden_size", "in_features")


def state_features(model: nn.Module, plain: nn.Module, inputs: Sequence[Any]) -> None:
    """Set the numbers in a network that was cut out, and in the networks of timm within it.

    Args:
        model: the slimmable model.
        plain: the network, in evaluation mode; changed in place.
        inputs: inputs of both.
    """
    with activate(model, None), evaluation(model):
        before = _inputs(model, inputs)
        for path, received in _inputs(plain, inputs).items():
            network = plain.get_submodule(path)
            if _returns_features(network):
                _state_returned_features(network, network(*received))
            else:
                _state_numbers(model.get_submodule(path), network, before[path], received)


def _returns_features(network: nn.Module) -> bool:
    """Whether timm made a network with `features_only`."""
    return isinstance(getattr(getattr(network, "feature_info", None), "out_indices", None), tuple | list)


def _inputs(model: nn.Module, inputs: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """The inputs of each network of timm by its path, from a run of the model."""
    received: dict[str, tuple[Any, ...]] = {}
    networks = {
        path: network
        for path, network in model.named_modules()
        if _returns_features(network)
        or all(hasattr(network, name) for name in ("num_features", "forward_features", "forward_head"))
    }
    if not networks.keys() - {""}:
        return dict.fromkeys(networks, tuple(inputs))
    with _recorded(networks, received):
        model(*inputs)
    return received


@contextmanager
def _recorded(networks: dict[str, nn.Module], received: dict[str, tuple[Any, ...]]) -> Iterator[None]:
    """Record the first input of each network, whichever of its methods receives it."""

    def recording(path: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args:
                received.setdefault(path, args[:1])
            return method(*args, **kwargs)

        return call

    changed = [
        (path, network, name) for path, network in networks.items() for name in ENTRIES if hasattr(network, name)
    ]
    own = [vars(network).get(name) for _, network, name in changed]
    for path, network, name in changed:
        vars(network)[name] = recording(path, getattr(network, name))
    try:
        yield
    finally:
        for (_, network, name), method in zip(changed, own, strict=True):
            del vars(network)[name]
            if method is not None:
                vars(network)[name] = method


def _state_returned_features(network: nn.Module, outputs: Any) -> None:
    """Set the channels that a network with `features_only` states of the feature maps that it returns."""
    stated: Any = network.feature_info
    if isinstance(outputs, tuple | list) and len(stated.out_indices) == len(outputs):
        channels_last = str(getattr(network, "output_fmt", "")).endswith("NHWC")
        for index, output in zip(stated.out_indices, outputs, strict=True):
            stated.info[index]["num_chs"] = output.shape[-1 if channels_last else 1]


def _state_numbers(model: nn.Module, plain: nn.Module, before: Sequence[Any], after: Sequence[Any]) -> None:
    """Set the numbers in a network, from runs of the full one and of itself on inputs of theirs."""
    entries = getattr(plain, "feature_info", None)
    entries = entries if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) else []
    remaining = {name for name, _ in plain.named_modules()}
    entries[:] = [entry for entry in entries if entry.get("module") in remaining | {None}]
    names = [entry.get("module") for entry in entries]
    full, cut = _feature_shapes(model, before, names), _feature_shapes(plain, after, names)

    def number(key: str | None, before: int) -> int:
        """What a number of channels of the full network has become."""
        pairs = zip(full.get(key, ()), cut.get(key, ()), strict=True)
        return next((now for old, now in pairs if old == before), before)

    for entry in entries:
        entry["num_chs"] = number(entry["module"], entry["num_chs"])
    features: Any = model.num_features
    hidden: Any = getattr(model, "head_hidden_size", features)
    now = {hidden: number("hidden", hidden), features: number("features", features)}
    heads = [module for name, module in plain.named_modules() if name.startswith("head")]
    for module in (plain, *heads):
        for name in NUMBERS:
            value = vars(module).get(name)
            if isinstance(value, int) and not isinstance(module, nn.Linear):
                setattr(module, name, now.get(value, value))


def _feature_shapes(network: nn.Module, inputs: Sequence[Any], names: Sequence[Any]) -> dict[str | None, torch.Size]:
    """Shapes of the outputs of named modules, of the features, and of the input of the classifier."""
    shapes: dict[str | None, torch.Size] = {}
    modules = dict(network.named_modules())
    hooks = [
        modules[name].register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: getattr(output, "shape", torch.Size())})
        )
        for name in names
        if name in modules
    ]
    try:
        features = network.forward_features(*inputs)  # type: ignore[operator]
        shapes["features"] = features.shape
        shapes["hidden"] = network.forward_head(features, pre_logits=True).shape  # type: ignore[operator]
    except Exception:  # without a tensor of features, without `pre_logits`, or without a head
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
