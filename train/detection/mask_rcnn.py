"""torchvision's Mask R-CNN (He et al. 2017) or Faster R-CNN (Ren et al. 2015) with a feature pyramid (Lin et al. 2017)
on a network of a family.

As in the paper's appendix A.4, network and pyramid have batch normalisation, the heads have none, and all parameters
are trained. The pyramid has five levels: the last feature maps of strides 4 to 32, and a level of stride 64.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from dspnet_fast.models import Network

from .backbones import Backbone, FeatureMaps

CHANNELS = 256
LEVELS = 5
RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class DetectorConfig:
    """Configuration of a detector.

    Attributes:
        sizes: shorter sides of images in pixels; training draws one, evaluation uses the last.
        max_size: largest longer side of images in pixels.
        anchor_size: side of the smallest anchors in pixels; doubled at each pyramid level.
        rois: regions per image that the heads are trained on in a step.
    """

    sizes: tuple[int, ...]
    max_size: int
    anchor_size: int
    rois: int


class PyramidBackbone(nn.Module):
    """Network and feature pyramid: images [N, 3, H, W] to maps [N, 256, H/r, W/r] for r = 4, 8, 16, 32, 64.

    Args:
        network: network of torch.nn layers with `map_channels` and `feature_maps`, as those of `Network`.
    """

    def __init__(self, network: Network | FeatureMaps) -> None:
        super().__init__()
        self.network = network
        self.fpn = FeaturePyramidNetwork(
            list(network.map_channels), CHANNELS, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )
        self.out_channels = CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps by name."""
        return self.fpn(OrderedDict((str(i), features) for i, features in enumerate(self.network.feature_maps(images))))


def build_detector(
    backbone: Backbone, classes: int, config: DetectorConfig, seed: int, masks: bool = True
) -> FasterRCNN:
    """Build a detector, with SyncBatchNorm if torch.distributed is initialised with several processes.

    Args:
        backbone: network and normalisation of its images.
        classes: number of classes without background.
        config: configuration of the detector.
        seed: seed of pyramid and head weights.
        masks: whether to build Mask R-CNN, which predicts masks too, instead of Faster R-CNN.
    """
    anchors = AnchorGenerator(tuple((config.anchor_size << level,) for level in range(LEVELS)), (RATIOS,) * LEVELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (MaskRCNN if masks else FasterRCNN)(
            PyramidBackbone(backbone.network),
            classes + 1,
            min_size=config.sizes,
            max_size=config.max_size,
            image_mean=list(backbone.mean),
            image_std=list(backbone.std),
            rpn_anchor_generator=anchors,
            box_batch_size_per_image=config.rois,
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if _processes() > 1 else model


def normalization() -> str:
    """Description of the images that batch statistics of a new detector are computed over."""
    count = _processes()
    return f"SyncBN across {count} processes" if count > 1 else "batch normalisation over the images of one process"


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
