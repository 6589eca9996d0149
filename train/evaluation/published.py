"""A network that others have trained, evaluated with the protocols of a pretrained family."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.models import Network
from dspnet_fast.nn.activate import Sizes
from dspnet_fast.subnets import Family, Subnet

from ..costs.flops import NetworkCost
from ..data.datasets.images import ImageDataset
from ..data.normalization import MEAN, STD
from ..distributed.process_group import SINGLE_PROCESS, World
from ..run import fingerprint
from ..run.options import Workers
from ..teachers.sources import Source, dense, feature_count, load_source, pooled, published_name
from .pretrained import EvaluatedFamily


class PublishedEncoder(nn.Module):
    """Images as this project normalises them to features; has one size.

    Args:
        source: the network, and the normalisation of its images.
        features: number of features.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: Source, features: int) -> None:
        super().__init__()
        self.network = source.network
        self.num_features = features
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
            for values in (MEAN, STD, source.mean, source.std)
        )
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        """The network's name; it has no slimmable modules."""
        return str(dn), {}

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, F] of images [N, 3, S, S]."""
        return pooled(self.network(torch.addcmul(self.shift, images, self.scale)))

    def forward_dense(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the feature map [N, C, h, w] before the pooling; InputError if the network has none."""
        return dense(self.network, torch.addcmul(self.shift, images, self.scale))


class PublishedNetwork(EvaluatedFamily):
    """A network of timm, torchvision or a function, as a family of one with its own running statistics.

    Args:
        out: folder for features and results.
        device: device of the model.
        source: the network, in a form of `train.teachers.sources`.
        image_size: height and width of the views, in pixels [those of the network's training].
        world: the ranks that share the computation of features.

    Raises:
        InputError: if there is no such network, or it does not take such images.
    """

    def __init__(
        self, out: Path, device: torch.device, source: str, image_size: int | None, world: World = SINGLE_PROCESS
    ) -> None:
        loaded = load_source(source, image_size, option="--weights")
        size = image_size or loaded.image_size
        features = feature_count(loaded.network, size, f"--weights {source}")
        family = Family([Subnet(published_name(*source.split("=", 1)), (features,), (1,))])
        super().__init__(out, device, family, PublishedEncoder(loaded, features), size, step=0)
        self.world, self.source, self.note = world, source, loaded.note

    @cached_property
    def weights(self) -> str:
        """A digest of the model's parameters, running statistics and normalisation."""
        return fingerprint.digest(*self.model.state_dict().values())

    def cost(self, subnet: Subnet) -> NetworkCost:
        """Cost of the network."""
        return NetworkCost(parameter_count(self.model), mac_count(self.model, self.image_size), subnet.channels[-1])

    def cut(self, subnet: Subnet) -> Network:
        """A copy of the network on the CPU."""
        return cast(Network, copy.deepcopy(self.model).cpu())  # has what a Classifier uses of a Network

    def measure_statistics(
        self, subnets: Sequence[Subnet], images: ImageDataset, data: str, workers: Workers = "auto", prefix: str = ""
    ) -> None:
        """Nothing: the network keeps the running statistics of its training."""
