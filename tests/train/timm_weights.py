"""Networks of timm for tests: random weights, with statistics as after training, in files like published ones."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def timm_network(name: str, **options) -> nn.Module:
    """A network of timm in evaluation mode."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, **options).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network


def saved(network: nn.Module, file: Path) -> Path:
    """A file of the network's weights."""
    save_file(network.state_dict(), file)
    return file
