"""One weight initialisation for all networks."""

from torch import nn


def initialize(model: nn.Module) -> None:
    """He et al. 2015 by fan-out for convolutions, as torchvision's ResNet and MobileNetV3 have it; zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
