"""Base class of the slimmable networks."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..nn.activate import Sizes
from ..subnets import Subnet


class Network(nn.Module, ABC):
    """An encoder of images [N, C, H, W] to pooled features [N, F], whose subnets are prefixes.

    Attributes:
        name: key in `dspnet_fast.models.NETWORKS`.
        head_name: timm's name of a classifier's linear layer.
        full: the largest subnet, for which weights are allocated.
        small_stem: whether the stem keeps the resolution, for images below about 64 px.
        in_channels: channels of the images, 3 for RGB.
        stages: names of the modules after the stem, which run one after another.
        dense: whether most convolutions are neither pointwise nor depthwise.
        prefix: first part of the names of parameters, which the exported network does not have.
        uses_autocast: whether activations in 16 bits are computed under autocast.
    """

    name: str
    head_name: str
    stages: tuple[str, ...]
    dense = False
    prefix = ""
    uses_autocast = False

    def __init__(self, full: Subnet, small_stem: bool = False, in_channels: int = 3) -> None:
        super().__init__()
        self.full = full
        self.small_stem = small_stem
        self.in_channels = in_channels

    @property
    def num_features(self) -> int:
        """Number of features of the full network."""
        return self.full.channels[-1]

    @property
    def dense_features(self) -> int:
        """Channels of the full network's map of `forward_dense`."""
        return self.num_features

    @abstractmethod
    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features [N, F] of images [N, C, H, W], and the feature map [N, F', h, w] before pooling."""

    @staticmethod
    @abstractmethod
    def subnet(name: str) -> Subnet:
        """The subnet with this name; InputError if the network has no such subnet."""

    @abstractmethod
    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        """The subnet's name, and the size of each slimmable module."""

    @property
    @abstractmethod
    def map_channels(self) -> tuple[int, int, int, int]:
        """Channels of the full network's feature maps."""

    @abstractmethod
    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The last feature map of each resolution, for feature pyramids.

        Args:
            x: images, [N, C, H, W].

        Returns:
            Maps [N, C, H/r, W/r] for r = 4, 8, 16, 32, or smaller r with a small stem. The mean of the last map over H
            and W is the network's output.
        """
