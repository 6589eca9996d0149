"""Weight initialisation of all networks."""

from torch import nn


def initialize(model: nn.Module) -> None:
    """Initialise convolutions by fan-out (He et al. 2015), as torchvision's ResNet and MobileNetV3; zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
