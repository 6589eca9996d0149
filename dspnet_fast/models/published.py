"""Weights of timm and torchvision as the initial weights of a family, with the most important channels first.

A subnet is a prefix of the channels. The order of the channels of a published network means nothing, so they are sorted
within every group that may be permuted: the channels that a residual connects, and the inner channels of a block. The
importance of a channel is the L1 norm of the weights that read it, as in Once-for-All (Cai et al. 2020). The full
network computes the same features as the published one, in another order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..nn.groups import find_groups
from ..weight_file import load_state, read_weights
from .mobilenet_v3 import FEATURE_CHANNELS, MobileNetV3
from .network import Network
from .traced import TracedNetwork

LIBRARIES = ("timm", "torchvision")
# Names of networks that have the same computation as ours. Others, such as tf_mobilenetv3, pad differently.
NAMES = {
    ("mobilenet_v3_large", "timm"): r"mobilenetv3_large_\d+(\..*)?",
    ("mobilenet_v3_large", "torchvision"): r"mobilenet_v3_large",
    ("resnet", "timm"): r"resnet(18|34)(\..*)?",
    ("resnet", "torchvision"): r"resnet(18|34)",
}
EXAMPLES = {
    "mobilenet_v3_large": "timm:mobilenetv3_large_100 or torchvision:mobilenet_v3_large",
    "resnet": "timm:resnet18 or torchvision:resnet34",
}
TORCHVISION_EPS, EPS = 1e-3, 1e-5  # of batch normalisation, in torchvision's MobileNetV3 and in ours


@dataclass(frozen=True)
class Source:
    """The origin of weights: library, name of the network, and file; without one the library downloads them."""

    library: str
    name: str
    file: Path | None

    @classmethod
    def parse(cls, text: str) -> Source | None:
        """The source `timm:NAME`, `timm:NAME=FILE`, or the same of torchvision; None for another text."""
        library, colon, rest = text.partition(":")
        if not colon or library not in LIBRARIES:
            return None
        name, _, file = rest.partition("=")
        return cls(library, name, Path(file) if file else None)

    def read(self) -> dict[str, Tensor]:
        """The network's tensors by name.

        Raises:
            InputError: if the file cannot be read, or the library is missing or cannot download the weights.
        """
        if self.file is None:
            return self._download()
        try:
            return read_weights(self.file)
        except InputError as error:
            raise InputError(f"--init-from: {error}") from error

    def _download(self) -> dict[str, Tensor]:
        try:
            if self.library == "torchvision":
                from torchvision.models import get_model

                model = get_model(self.name, weights="DEFAULT")
            else:
                import timm

                model = timm.create_model(self.name, pretrained=True)
        except Exception as error:  # of the network, the hub and the library, of many types
            raise InputError(
                f"--init-from {self.library}:{self.name}: the weights are not available here ({first_line(error)}); "
                f"download them and give --init-from {self.library}:{self.name}=FILE"
            ) from error
        return dict(model.state_dict())


@dataclass
class Group:
    """Channels that must be permuted together.

    Attributes:
        outputs: modules with these output channels: convolutions, and batch normalisation.
        inputs: convolutions with these input channels.
    """

    outputs: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


def channel_groups(network: Network) -> list[Group]:
    """The groups of channels of a network that may be permuted, found by tracing; the features last."""
    with torch.device("meta"):
        traced, images = type(network)(network.full).eval(), torch.zeros(2, 3, 64, 64)
    found = find_groups(traced, [(traced, (images,))], keep=())
    groups = [Group() for _ in found.groups]
    for path, tensors in found.tensors.items():
        for dimension in tensors.get("weight", ()):
            group = groups[dimension.group[0]]
            (group.inputs if dimension.dim else group.outputs).append(path)
    *_, last = found.tensors.values()  # the batch normalisation of the features
    groups.append(groups.pop(last["weight"][0].group[0]))
    return groups


def sort_channels(network: Network, state: dict[str, Tensor]) -> Tensor:
    """Sort the channels of every group by importance, in place of the tensors in `state`.

    Channels that no convolution reads, such as the features, are sorted by the absolute scale of their batch
    normalisation.

    Args:
        network: a network of these shapes.
        state: its tensors by name.

    Returns:
        The order of the features: feature i was feature order[i].
    """
    order = torch.empty(0)
    for group in channel_groups(network):
        if group.inputs:
            importance = sum(state[f"{name}.weight"].double().abs().sum((0, 2, 3)) for name in group.inputs)
        else:
            scales = [state[f"{name}.weight"] for name in group.outputs]
            importance = sum(scale.double().abs() for scale in scales if scale.ndim == 1)
        assert isinstance(importance, Tensor)
        order = importance.argsort(descending=True, stable=True)
        for name in group.inputs:
            state[f"{name}.weight"] = state[f"{name}.weight"][:, order]
        for name in group.outputs:
            for part in ("weight", "bias", "running_mean", "running_var"):
                if f"{name}.{part}" in state:
                    state[f"{name}.{part}"] = state[f"{name}.{part}"][order]
    return order


def load_published(network: Network, source: Source) -> Tensor:
    """Load published weights into a network, with the most important channels first.

    Args:
        network: the network, of the published one's shape.
        source: origin of the weights.

    Returns:
        The order of the features, see `sort_channels`.

    Raises:
        InputError: if the weights are not available, are of another architecture, or have other shapes.

    Example:
        >>> from dspnet_fast.models import subnet
        >>> network = build("resnet", subnet("resnet", "c64-d2222"))
        >>> load_published(network, Source.parse("torchvision:resnet18=resnet18.pth"))  # doctest: +SKIP
    """
    check_name(network.name, source)
    if network.in_channels != 3:
        raise InputError(f"--init-from: published networks take 3 channels, not {network.in_channels}: see --channels")
    if isinstance(network, TracedNetwork):
        return _load_traced(network, source)
    state = _as_timm(source, network, source.read())
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state]
    if any(name.split(".")[1] == "0" or not name.startswith(network.stages) for name in missing):  # not just a block
        raise InputError(f"--init-from: {source.name} has no tensor {missing[0]}: it is no {network.name}")
    different = [name for name in own if name in state and own[name].shape != state[name].shape]
    if different or _depths(network, state) != _depths(network, own):
        full = f"{network.full} with --stem small" if network.small_stem else str(network.full)
        raise InputError(
            f"--init-from {source.library}:{source.name} has another shape ({(different or ['depths'])[0]}) than the "
            f"family's largest network, {full}: use {_fitting(network, state)} as the largest of --dns, and --stem "
            "standard"
        )
    found = {name: state[name].to(own[name].dtype).clone() for name in own}
    if (network.name, source.library) == ("mobilenet_v3_large", "torchvision"):
        for name in own:
            if name.endswith("running_var"):  # as if computed with our eps
                found[name] += TORCHVISION_EPS - EPS
    order = sort_channels(network, found)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    return order


def _load_traced(network: TracedNetwork, source: Source) -> Tensor:
    """Load published weights into a traced network, whose channels keep their order."""
    state, own = source.read(), network.body.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            found = list(state[name].shape) if name in state else "missing"
            raise InputError(f"--init-from: {name} of {source.name} is {found}, not {list(tensor.shape)}")
    load_state(network.body, {name: state[name] for name in own})
    return torch.arange(network.num_features)


def check_name(network: str, source: Source) -> None:
    """Raise InputError if the weights are of another architecture than the network."""
    if ":" in network:
        if f"{source.library}:{source.name}" != network:
            raise InputError(
                f"--init-from {source.library}:{source.name} does not fit --network {network}: give {network} or "
                f"{network}=FILE"
            )
        return
    if not re.fullmatch(NAMES[network, source.library], source.name):
        raise InputError(
            f"--init-from {source.library}:{source.name} does not fit --network {network}: "
            f"give for example {EXAMPLES[network]}"
        )


def _as_timm(source: Source, network: Network, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names. torchvision's MobileNetV3 has the same ones in the same order."""
    if source.library != "torchvision" or not isinstance(network, MobileNetV3):
        return dict(state)
    ours, theirs = (
        [(name, tensor) for name, tensor in tensors if not name.endswith("num_batches_tracked")]
        for tensors in (network.state_dict().items(), state.items())
    )
    features = [tensor for name, tensor in theirs if name.startswith("features.")]
    if len(features) != len(ours):
        raise InputError(f"--init-from: {len(features)} tensors of features.*, and {source.name} has {len(ours)}")
    return {name: tensor for (name, _), tensor in zip(ours, features, strict=True)}


def _depths(network: Network, state: Mapping[str, Any]) -> list[int]:
    """Number of blocks of every stage."""
    return [len({name.split(".")[1] for name in state if name.startswith(f"{stage}.")}) for stage in network.stages]


def _fitting(network: Network, state: Mapping[str, Tensor]) -> str:
    """The name of the subnet with the shape of published tensors."""
    if isinstance(network, MobileNetV3):
        width = state[f"{network.stages[-1]}.0.conv.weight"].shape[0] / FEATURE_CHANNELS
        return f"w{width:.2f}"
    depths = _depths(network, state)
    return f"c{state['conv1.weight'].shape[0]}-d{''.join(map(str, depths))}"
