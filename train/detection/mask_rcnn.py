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
from torch.utils.flop_counter import FlopCounterMode
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


@dataclass(frozen=True)
class DetectorCost:
    """Of a detector: parameters, and multiply-accumulates for one image in training (forward) and in evaluation."""

    parameters: int
    training: int
    evaluation: int


def detector_cost(model: MaskRCNN, training: tuple[int, int], evaluation: tuple[int, int]) -> DetectorCost:
    """Count a detector, with as many regions in an image as there may be.

    Args:
        model: on the meta device; left in evaluation mode.
        training, evaluation: height and width that images are brought to.
    """
    model.eval()
    heads = model.roi_heads
    sampler = heads.fg_bg_sampler
    rois, masks = sampler.batch_size_per_image, int(sampler.batch_size_per_image * sampler.positive_fraction)
    return DetectorCost(
        sum(parameter.numel() for parameter in model.parameters()),
        _macs(model, training, rois, masks),
        _macs(model, evaluation, model.rpn._post_nms_top_n["testing"], heads.detections_per_img),
    )


def _macs(model: MaskRCNN, size: tuple[int, int], rois: int, masks: int) -> int:
    heads = model.roi_heads
    height, width = (-(-side // 32) * 32 for side in size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        maps = model.backbone(torch.empty(1, 3, height, width))
        model.rpn.head(list(maps.values()))
        heads.box_predictor(heads.box_head(torch.empty(rois, CHANNELS, *heads.box_roi_pool.output_size)))
        heads.mask_predictor(heads.mask_head(torch.empty(masks, CHANNELS, *heads.mask_roi_pool.output_size)))
    return counter.get_total_flops() // 2
