"""An encoder with a linear layer on its representation: images to logits."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import SlimLinear
from ..nn.activate import Sizes
from ..subnets import Subnet
from .network import Network


class Classifier(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes], by an encoder and a linear layer on as many features as it has.

    A subnet of the encoder is one of the classifier: smaller ones use a prefix of the linear layer's columns.
    """

    def __init__(self, encoder: Network, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = SlimLinear(encoder.num_features, classes)

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        """Name of the subnet and the size of each of its slimmable modules."""
        name, sizes = self.encoder.layer_sizes(dn)
        return name, {f"encoder.{path}": size for path, size in sizes.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        return self.head(self.encoder(images))


def encoder_of(model: Network | Classifier) -> Network:
    """The model itself, or what its linear layer stands on."""
    return model.encoder if isinstance(model, Classifier) else model
