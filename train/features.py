"""Representations of images by every subnet of an encoder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dspnet_fast.nn import activate
from dspnet_fast.subnets import Subnet


@torch.no_grad()
def extract(encoder: nn.Module, subnets: Iterable[Subnet], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Features of every image by every subnet, each image read once.

    Args:
        encoder: a slimmable encoder with post-statistics of all `subnets`; left in evaluation mode.
        batches: images [B, 3, H, W] on the encoder's device.

    Returns:
        Features [N, F] on the CPU in float32, by subnet.
    """
    encoder.eval()
    subnets = list(subnets)
    features: dict[str, list[Tensor]] = {subnet.name: [] for subnet in subnets}
    for images in batches:
        for subnet in subnets:
            with activate(encoder, subnet):
                features[subnet.name].append(encoder(images).float().cpu())
    return {name: torch.cat(parts) for name, parts in features.items()}
