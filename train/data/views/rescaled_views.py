"""Views of images with more than 8 bits or other channels, in float32: see `torchvision_backend` for 8-bit images."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..datasets.pixels import RescaledImage
from .augmentation import ViewParameters, ViewSpec
from .torchvision_backend import blur_matrix, evaluation_size


def augment_rescaled(view: ViewSpec, parameters: ViewParameters, image: RescaledImage) -> Tensor:
    """Apply sampled parameters to an image.

    Saturation, hue and greyscale are for three channels only. Contrast keeps the mean of the image; without three
    channels, of each channel.

    Args:
        view: the distribution that the parameters are from.
        parameters: the sampled parameters.
        image: of any number of channels.

    Returns:
        Normalised float32 [C, image_size, image_size].
    """
    values = _resized_crop(image.values, parameters.box, (view.image_size, view.image_size))
    if parameters.flip:
        values = values.flip(-1)
    rgb = len(values) == 3
    for name, factor in parameters.jitter:
        if rgb:
            values = getattr(F, f"adjust_{name}")(values, factor)
        elif name == "brightness":
            values = (values * factor).clamp_(0, 1)
        elif name == "contrast":
            mean = values.mean((1, 2), keepdim=True)
            values = torch.lerp(mean, values, factor).clamp_(0, 1)
    if parameters.grey and rgb:
        values = F.rgb_to_grayscale(values, num_output_channels=3)
    if parameters.sigma:
        band = blur_matrix(view.image_size, view.blur_kernel, parameters.sigma)
        values = band @ values @ band.T
    if parameters.solarize:
        values = torch.where(values >= view.solarize_threshold / 255, 1 - values, values)
    return image.format.normalize(values)


def evaluate_rescaled(image_size: int, image: RescaledImage) -> Tensor:
    """The view of `torchvision_backend.evaluation_view`, normalised float32 [C, image_size, image_size]."""
    size = evaluation_size(image_size, image.height, image.width)
    values = _resized_crop(image.values, (0, 0, image.height, image.width), size)
    return image.format.normalize(F.center_crop(values, [image_size, image_size]))


def _resized_crop(values: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    top, left, height, width = box
    values = values[:, top : top + height, left : left + width]
    if (height, width) == size:
        return values
    return F.resize(values, list(size), InterpolationMode.BICUBIC, antialias=True).clamp_(0, 1)
