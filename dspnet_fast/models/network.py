"""What the slimmable networks have in common."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..nn.activate import Sizes
from ..subnets import Subnet


class Network(nn.Module, ABC):
    """An encoder of images [N, 3, H, W] to pooled features [N, F], of which every subnet is a prefix.

    Attributes:
        name: what `dspnet_fast.models.build` knows it by.
        head_name: what timm calls the linear layer of a classifier.
        full: the largest subnet, for which weights are allocated.
        small_stem: whether the stem keeps the resolution, for images below about 64 px.
        stages: names of the modules that follow the stem one after another, each given what the one before gives.
    """

    name: str
    head_name: str
    stages: tuple[str, ...]

    def __init__(self, full: Subnet, small_stem: bool = False) -> None:
        super().__init__()
        self.full = full
        self.small_stem = small_stem

    @property
    def num_features(self) -> int:
        """Features of the full network's representation."""
        return self.full.channels[-1]

    @staticmethod
    @abstractmethod
    def subnet(name: str) -> Subnet:
        """The subnet of that name; InputError if the name says nothing to this network."""

    @abstractmethod
    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        """Name of the subnet and the size of each of its slimmable modules."""

    @property
    @abstractmethod
    def map_channels(self) -> tuple[int, int, int, int]:
        """Channels of the full network's feature maps."""

    @abstractmethod
    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """What a feature pyramid is built on: [N, C, H/r, W/r] for r = 4, 8, 16, 32, smaller r with a small stem.

        Each is the last of its resolution; the representation is the last one's mean over H and W.
        """
