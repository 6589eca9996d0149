"""Mask R-CNN (He et al. 2017) with a feature pyramid (Lin et al. 2017) on one of our networks, by torchvision.

As in the paper's appendix A.4 there is batch normalisation in network and pyramid, none in the heads, and everything is
trained. The pyramid stands on the last map of each resolution, of strides 4 to 32, and has a fifth level of stride 64.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from dspnet_fast.models import Network

from ..data.normalization import MEAN, STD

CHANNELS = 256
LEVELS = 5
RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Shape:
    """Of a detector.

    Attributes:
        sizes: of an image's shorter side in pixels; training draws one, evaluation takes the last.
        max_size: of its longer side in pixels.
        anchor_size: side of the smallest anchors in pixels; each level of the pyramid doubles it.
        rois: regions of an image that the heads learn from in a step.
    """

    sizes: tuple[int, ...]
    max_size: int
    anchor_size: int
    rois: int


class Pyramid(nn.Module):
    """Images [N, 3, H, W] to maps [N, 256, H/r, W/r] by name, for r = 4, 8, 16, 32, 64.

    Args:
        network: of torch.nn layers, as `slim` or `exported.load` gives it.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.fpn = FeaturePyramidNetwork(
            list(network.map_channels), CHANNELS, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )
        self.out_channels = CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the maps."""
        return self.fpn(OrderedDict((str(i), of) for i, of in enumerate(self.network.feature_maps(images))))


def build_mask_rcnn(network: Network, classes: int, shape: Shape, seed: int) -> MaskRCNN:
    """The detector; its batch normalisation is SyncBN where torch.distributed is initialised with several processes.

    Args:
        network: of torch.nn layers.
        classes: without the background.
        seed: of the weights that are not the network's.
    """
    anchors = AnchorGenerator(tuple((shape.anchor_size << level,) for level in range(LEVELS)), (RATIOS,) * LEVELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskRCNN(
            Pyramid(network),
            classes + 1,
            min_size=shape.sizes,
            max_size=shape.max_size,
            image_mean=list(MEAN),
            image_std=list(STD),
            rpn_anchor_generator=anchors,
            box_batch_size_per_image=shape.rois,
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if _processes() > 1 else model


def normalization() -> str:
    """What the batch normalisation of a detector that is built now averages over."""
    count = _processes()
    return f"SyncBN across {count} processes" if count > 1 else "batch normalisation over the images of one process"


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
