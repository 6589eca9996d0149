"""Slimmable networks, by name. Their parameter names are timm's (and torchvision's, for ResNet)."""

from collections.abc import Sequence

from ..errors import InputError
from ..subnets import Family, Subnet
from .classifier import Classifier, encoder_of
from .heads import MLP
from .mobilenet_v3 import MobileNetV3
from .network import Network
from .resnet import ResNet

NETWORKS: dict[str, type[Network]] = {network.name: network for network in (MobileNetV3, ResNet)}
STEMS = ("standard", "small")

__all__ = [
    "MLP",
    "NETWORKS",
    "STEMS",
    "Classifier",
    "MobileNetV3",
    "Network",
    "ResNet",
    "build",
    "encoder_of",
    "family",
    "subnet",
]


def _network(name: str) -> type[Network]:
    if name not in NETWORKS:
        raise InputError(f"no network {name!r}: there are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def subnet(network: str, dn: str) -> Subnet:
    """The subnet `dn` ("w0.50", "c64-d2222") of `network`; InputError if the name says nothing to that network."""
    return _network(network).subnet(dn)


def family(network: str, dns: Sequence[str]) -> Family:
    """The family of the named subnets of `network`; InputError if one is unknown or they do not nest."""
    return Family(subnet(network, dn) for dn in dns)


def build(network: str, full: Subnet, stem: str = "standard") -> Network:
    """A slimmable network with the weights of `full`, which is active.

    Args:
        network: a key of `NETWORKS`.
        full: the largest subnet.
        stem: "standard" as published; "small" keeps the resolution in the stem, for images below about 64 px.
    """
    if stem not in STEMS:
        raise InputError(f"no stem {stem!r}: there are {', '.join(STEMS)}")
    return _network(network)(full, small_stem=stem == "small")
