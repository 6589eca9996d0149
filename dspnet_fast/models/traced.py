"""Families of networks of timm, torchvision or a function of the user, whose channel groups are traced."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line
from ..nn.activate import Sizes
from ..nn.convert import slimmable, use_groups
from ..nn.depth import no_stages, use_stages
from ..nn.fused import fused
from ..nn.groups import ChannelGroups
from ..nn.numbers import HEADS
from ..nn.shrink import shrink
from ..subnets import Subnet
from .network import Network

FORMS = "timm:NAME, torchvision:NAME or MODULE:FUNCTION"
SIZES = (64, 224, 299)  # of the images that a network is traced with, in pixels


class TracedNetwork(Network):
    """An encoder that was made slimmable by tracing; a subclass per architecture has its name.

    Its subnets are named by their width: "w0.50" has about half of the channels of every group. Where blocks repeat,
    "w0.50-d1122" also states the number of blocks of every stage.
    """

    head_name = "head"
    stages = ()
    prefix = "body."
    uses_autocast = True

    def __init__(self, full: Subnet, small_stem: bool = False, in_channels: int = 3) -> None:
        if small_stem:
            raise InputError(f"--stem small is not available for {self.name}: choose a network with a small stem")
        super().__init__(full, in_channels=in_channels)
        self.body = make(self.name, in_channels)
        groups = reference(self.name)[1]
        width, depths = _size(self.name, full.name)
        units = groups.at(width)
        shrink(self.body, groups, units, depths)
        own = groups.reduced(units, depths)
        own.inputs = [((2, in_channels, *shape[2:]), dtype) for shape, dtype in groups.inputs]
        use_groups(self.body, own)
        use_stages(self.body, own.stages)
        fused(self.body)

    @classmethod
    def subnet(cls, name: str) -> Subnet:
        """The subnet of a width, such as "w0.50", or of a width and depths, such as "w0.50-d1122"."""
        return _subnet(cls.name, *_size(cls.name, name), name)

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        name = dn if isinstance(dn, str) else dn.name
        groups = reference(self.name)[1]
        width, depths = _size(self.name, name)
        sizes = {f"body.{group}": size for group, size in groups.sizes(groups.at(width)).items()}
        full = {stage.name: len(stage.blocks) for stage in vars(self.body)["channel_groups"].stages}
        blocks = {stage.name: depth for stage, depth in zip(groups.stages, depths, strict=True)}
        return name, sizes | {f"body.{stage}": depth for stage, depth in blocks.items() if depth != full[stage]}

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to features [N, F]."""
        return self.body(x)

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return forward_dense(self.body, x)

    @functools.cached_property
    def dense_features(self) -> int:
        (shape, _), *_ = vars(self.body)["channel_groups"].inputs
        body = copy.deepcopy(self.body).to("meta").eval()
        with torch.no_grad():
            return forward_dense(body, torch.zeros(shape, device="meta"))[1].shape[1]

    @property
    def map_channels(self) -> tuple[int, int, int, int]:
        raise InputError(f"feature maps are not available for {self.name}: use mobilenet_v3_large or resnet")

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        raise InputError(f"feature maps are not available for {self.name}: use mobilenet_v3_large or resnet")


@functools.lru_cache(maxsize=None)  # noqa: UP033
def traced(name: str) -> type[Network]:
    """The class of the networks of an architecture; InputError if its name has none of the forms `FORMS`."""
    library, colon, rest = name.partition(":")
    if not (colon and library and rest):
        raise InputError(f"unknown network {name!r}: use {FORMS}")
    return cast(type[Network], type("TracedNetwork", (TracedNetwork,), {"name": name, "__module__": __name__}))


def make(name: str, in_channels: int = 3) -> nn.Module:
    """A network of an architecture, from images to pooled features, with random weights."""
    library, _, rest = name.partition(":")
    if in_channels != 3 and library != "timm":
        raise InputError(f"--network {name} takes images of 3 channels, not {in_channels}: use a network of timm")
    try:
        if library == "timm":
            import timm

            return timm.create_model(rest, num_classes=0, in_chans=in_channels)
        if library == "torchvision":
            import torchvision

            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of GoogLeNet's and Inception's
                network = torchvision.models.get_model(rest, weights=None)
                if getattr(network, "aux_logits", False):  # which return the logits of two classifiers in training
                    network = torchvision.models.get_model(rest, weights=None, aux_logits=False)
            return _without_classifier(network, name)
        network = getattr(importlib.import_module(library), rest)()
    except ImportError as error:
        raise InputError(f"--network {name} needs a package that is not installed: {error}") from error
    except (RuntimeError, ValueError, AttributeError) as error:
        raise InputError(f"--network {name} does not exist: {error}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"--network {name} must return a torch.nn.Module, not {type(network).__name__}")
    return network


def forward_dense(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, F] and the feature map [N, C, h, w] before pooling, of a convolutional network of timm.

    Args:
        network: a network with timm's `forward_features` and `forward_head`.
        images: square images.

    Raises:
        InputError: the network has no such map.
    """
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        raise InputError("it has no feature map before its pooling, as convolutional networks of timm have")
    y = network.forward_features(images)  # type: ignore[operator]
    if not isinstance(y, Tensor) or y.ndim != 4 or y.shape[2] != y.shape[3]:  # [N, L, C] or [N, h, w, C]
        shape = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"it has {shape} before its pooling, not a feature map [N, C, h, w]: it is no CNN")
    return network.forward_head(y), y  # type: ignore[operator]


def _without_classifier(network: nn.Module, name: str) -> nn.Module:
    """Replace the last linear layer, the classifier."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"{name} has no linear classifier to remove: write a function, and name it as MODULE:FUNCTION")
    parent, _, child = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network


@functools.lru_cache(maxsize=32)
def reference(name: str) -> tuple[nn.Module, ChannelGroups, Tensor]:
    """An ordinary network of an architecture, its channel groups, and images that it runs on."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = make(name).eval()
        images = _images(plain, name)
        _check_training(plain, images, name)
        try:
            converted = slimmable(copy.deepcopy(plain), images, keep=())
        except TypeError as error:
            reason = str(error).partition("; keep its channels")[0]
            raise InputError(f"--network {name} cannot be used: {reason}") from error
    return plain, vars(converted)["channel_groups"], images


@functools.lru_cache(maxsize=32)
def check_image_size(name: str, image_size: int) -> None:
    """Raise InputError if a network does not run on images of a height and width."""
    plain, _, images = reference(name)
    usual = images.shape[-1]
    if image_size == usual:
        return
    with torch.device("cpu"), torch.no_grad():
        try:
            plain(torch.zeros(1, 3, image_size, image_size))
        except Exception as error:  # of many types
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"--network {name} does not run on images of {image_size} px: {reason.rstrip('.')}. Use --image-size "
                f"{usual}, or name a function that makes the network for other sizes as MODULE:FUNCTION"
            ) from error


@functools.lru_cache(maxsize=32)
def has_chains(name: str) -> bool:
    """Whether `fused` finds convolutions of an architecture that a batch normalisation follows."""
    plain, _, images = reference(name)
    return any("norm" in vars(module) for module in fused(copy.deepcopy(plain), images).modules())


@functools.lru_cache(maxsize=32)
def has_heads(name: str) -> bool:
    """Whether an architecture has modules with attention heads."""
    modules = reference(name)[0].modules()
    return any(isinstance(vars(module).get(attribute), int) for module in modules for attribute in HEADS)


def _images(network: nn.Module, name: str) -> Tensor:
    """Images that a network maps to pooled features."""
    config: Any = getattr(network, "default_cfg", None) or {}
    own = getattr(getattr(network, "patch_embed", None), "img_size", None)  # of timm's transformers
    usual = own[-1] if own else config.get("input_size", (3, 224, 224))[-1]
    sizes = [usual] if config.get("fixed_input_size") else [size for size in SIZES if size < usual] + [usual]
    problem: Exception | None = None
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        try:
            with torch.no_grad():
                features = network(images)
        except Exception as error:  # the size may be too small
            problem = error
            continue
        _check_features(features, f"--network {name}")
        return images
    raise InputError(f"--network {name} does not run on images of {' or '.join(map(str, sizes))} px: {problem}")


def _check_training(network: nn.Module, images: Tensor, name: str) -> None:
    """Raise InputError if a network has other outputs than features in training mode."""
    network = copy.deepcopy(network)
    network.train()
    try:
        with torch.no_grad():
            features = network(images)
    except Exception as error:  # of many types
        raise InputError(f"--network {name} does not run in training mode: {first_line(error)}") from error
    _check_features(features, f"--network {name} in training mode")


def _check_features(features: Any, network: str) -> None:
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"{network} must map images to features [N, F], but returns {shape}")


@functools.lru_cache(maxsize=None)  # noqa: UP033
def _subnet(network: str, width: float, depths: tuple[int, ...], name: str) -> Subnet:
    plain, groups, images = reference(network)
    units = groups.at(width)
    with torch.device("cpu"), torch.no_grad():
        small = copy.deepcopy(plain)
        shrink(small, groups, units, depths)
        try:
            features = small(images).shape[1]
        except Exception as error:  # of many types: the code of the network mixes channels that the trace kept apart
            raise InputError(
                f"--network {network} cannot be used: cut to {name}, it does not run: {first_line(error)}"
            ) from error
    channels = tuple(n * group.unit_size for n, group in zip(units, groups.groups, strict=True))
    return Subnet(name, (*channels, features), depths or (1,))


def _size(network: str, name: str) -> tuple[float, tuple[int, ...]]:
    """The width of a subnet, and the blocks of every stage."""
    match = re.fullmatch(r"w(0\.\d+|1(?:\.0+)?)(?:-d([\d.]+))?", name)
    if not match or float(match[1]) == 0:
        raise InputError(f"{name!r} is no width of the network: they are named w0.25, w0.50 or w1.00, for example")
    groups = reference(network)[1]
    if match[2] is None:
        return float(match[1]), groups.full_depths()
    if not groups.stages:
        raise InputError(
            f"{name!r}: {network} has no blocks that can be left out: {no_stages(groups.fixed_blocks)}; "
            f"name its networks by their width alone, for example w{match[1]}"
        )
    parts = match[2].split(".") if "." in match[2] or len(groups.stages) == 1 else list(match[2])
    depths = tuple(int(part or 0) for part in parts)
    ranges = [(stage.least, len(stage.blocks)) for stage in groups.stages]
    if len(depths) != len(ranges) or not all(low <= d <= high for d, (low, high) in zip(depths, ranges, strict=True)):
        stages = ", ".join(f"{stage.name} ({stage.least} to {len(stage.blocks)})" for stage in groups.stages)
        full = [str(high) for _, high in ranges]
        example = ("." if any(high > 9 for _, high in ranges) else "").join(full)
        raise InputError(
            f"{name!r}: {network} has blocks that can be left out in {stages}: give the number of blocks of each, for "
            f"example w{match[1]}-d{example}"
        )
    return float(match[1]), depths
