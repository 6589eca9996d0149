"""A classifier: an encoder with a linear layer on its features."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import SlimLinear
from ..nn.activate import Sizes
from ..subnets import Subnet
from .network import Network


class Classifier(nn.Module):
    """Images [N, C, H, W] to logits [N, classes]. Its subnets are those of the encoder.

    Args:
        encoder: a slimmable network.
        classes: number of classes. The linear layer uses as many of its columns as the active subnet has features.
    """

    def __init__(self, encoder: Network, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = SlimLinear(encoder.num_features, classes)

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        """The subnet's name, and the size of each slimmable module."""
        name, sizes = self.encoder.layer_sizes(dn)
        return name, {f"encoder.{path}": size for path, size in sizes.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return self.head(self.encoder(images))


def encoder_of(model: Network | Classifier) -> Network:
    """The encoder of a classifier, or the network itself."""
    return model.encoder if isinstance(model, Classifier) else model


def image_channels(model: nn.Module) -> int:
    """The channels of the images that a network or classifier takes; 3 for other modules."""
    return encoder_of(model).in_channels if isinstance(model, Network | Classifier) else 3
