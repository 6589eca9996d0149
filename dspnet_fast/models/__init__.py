"""Slimmable networks by name. Their parameters have timm's names, which for ResNet are torchvision's too."""

from collections.abc import Sequence

from ..errors import InputError
from ..subnets import Family, Subnet
from .classifier import Classifier, encoder_of, image_channels
from .heads import MLP, TeacherHead
from .mobilenet_v3 import MobileNetV3
from .network import Network
from .resnet import ResNet
from .traced import FORMS, check_image_size, has_chains, has_heads, traced

NETWORKS: dict[str, type[Network]] = {network.name: network for network in (MobileNetV3, ResNet)}
STEMS = ("standard", "small")

__all__ = [
    "FORMS",
    "MLP",
    "NETWORKS",
    "STEMS",
    "Classifier",
    "MobileNetV3",
    "Network",
    "ResNet",
    "TeacherHead",
    "build",
    "check_network",
    "encoder_of",
    "family",
    "has_attention",
    "has_fused_formulation",
    "image_channels",
    "subnet",
]


def _network(name: str) -> type[Network]:
    if ":" in name:
        return traced(name)
    if name not in NETWORKS:
        raise InputError(f"unknown network {name!r}: use one of {', '.join(NETWORKS)}, {FORMS}")
    return NETWORKS[name]


def check_network(name: str, image_size: int | None = None) -> None:
    """Check the name of a network, and the size of its images.

    Args:
        name: a key of `NETWORKS`, or a name such as "timm:resnet18" (`FORMS`).
        image_size: height and width of the images, in pixels; None: any.

    Raises:
        InputError: the name is of neither form, or the network does not run on images of this size.

    Example:
        >>> check_network("resnet", 64)
    """
    _network(name)
    if ":" in name and image_size is not None:
        check_image_size(name, image_size)


def has_attention(network: str) -> bool:
    """Whether a network has attention heads, as transformers have.

    Args:
        network: a key of `NETWORKS`, or a name such as "timm:vit_tiny_patch16_224" (`FORMS`).

    Example:
        >>> has_attention("resnet")
        False
    """
    return ":" in network and has_heads(network)


def has_fused_formulation(network: str) -> bool:
    """Whether a network has convolutions that fused operators can compute: those that a batch normalisation follows.

    Args:
        network: a key of `NETWORKS`, or a name such as "timm:resnet18" (`FORMS`).

    Example:
        >>> has_fused_formulation("resnet")
        True
    """
    return ":" not in network or has_chains(network)


def subnet(network: str, dn: str) -> Subnet:
    """The subnet of a network by name.

    Args:
        network: a key of `NETWORKS`, or a name such as "timm:resnet18" (`FORMS`).
        dn: the subnet's name, for example "w0.50" or "c64-d2222".

    Raises:
        InputError: if the network or the subnet's name is unknown.

    Example:
        >>> subnet("resnet", "c64-d2222").channels
        (64, 64, 128, 256, 512)
    """
    return _network(network).subnet(dn)


def family(network: str, dns: Sequence[str]) -> Family:
    """The family of a network's subnets by name.

    Args:
        network: a key of `NETWORKS`, or a name such as "timm:resnet18" (`FORMS`).
        dns: the subnets' names.

    Raises:
        InputError: if a name is unknown or the subnets do not nest.

    Example:
        >>> family("resnet", ["c64-d2222", "c32-d1111"]).names
        ('c32-d1111', 'c64-d2222')
    """
    return Family(subnet(network, dn) for dn in dns)


def build(network: str, full: Subnet, stem: str = "standard", in_channels: int = 3) -> Network:
    """Build a slimmable network, with the full network active.

    Args:
        network: a key of `NETWORKS`, or a name such as "timm:resnet18" (`FORMS`).
        full: the largest subnet, for which weights are allocated.
        stem: "standard" as published, or "small", which keeps the resolution, for images below about 64 px.
        in_channels: channels of the images, 3 for RGB.

    Raises:
        InputError: if the network or stem is unknown.

    Example:
        >>> network = build("resnet", subnet("resnet", "c8-d1111"), "small")
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """
    if stem not in STEMS:
        raise InputError(f"unknown stem {stem!r}: use one of {', '.join(STEMS)}")
    return _network(network)(full, small_stem=stem == "small", in_channels=in_channels)
