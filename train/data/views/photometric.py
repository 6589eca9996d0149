"""Colour jitter, greyscale, blur and solarisation on float32 planes in torch, for the backend dali-cpu.

On a CPU this is several times as fast as DALI's operators, which round each byte separately and pass over memory once
for every step of an expression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .augmentation import ViewParameters, ViewSpec
from .torchvision_backend import blur_matrix

LUMA = (0.299, 0.587, 0.114)


def hue_offset(rotation: float, channel: int) -> float:
    """Return q of `rotate_hue`: ((5, 3 or 1 for red, green or blue) + 6 rotation) modulo 6, minus 5."""
    return ((5, 3, 1)[channel] + 6 * rotation) % 6 - 5


def apply_photometric(view: ViewSpec, parameters: ViewParameters, image: Tensor, out: Tensor) -> None:
    """Apply all operations that follow the resize.

    Args:
        view: the distribution that the parameters are from.
        parameters: the sampled parameters.
        image: the resized crop, uint8 [S, S, 3].
        out: receives the result, uint8 [3, S, S].
    """
    pixels = image.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    for name, factor in parameters.jitter:
        if name == "brightness":
            pixels.mul_(factor).clamp_(max=255)
        elif name == "contrast":
            mean = _luma(pixels).mean()
            pixels.mul_(factor).add_(mean, alpha=1 - factor).clamp_(0, 255)
        elif name == "saturation":
            grey = _luma(pixels)
            pixels.mul_(factor).add_(grey, alpha=1 - factor).clamp_(0, 255)
        else:
            rotate_hue(pixels, factor)
    if parameters.grey:
        pixels.copy_(_luma(pixels).expand_as(pixels))
    if parameters.sigma:
        matrix = blur_matrix(view.image_size, view.blur_kernel, parameters.sigma)
        pixels = matrix @ pixels @ matrix.T
    pixels.add_(0.5)
    out.copy_(pixels)
    if parameters.solarize:
        torch.where(out >= view.solarize_threshold, 255 - out, out, out=out)


def _luma(pixels: Tensor) -> Tensor:
    red, green, blue = pixels
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def rotate_hue(pixels: Tensor, rotation: float) -> None:
    """Rotate the hue of RGB pixels in HSV, in place.

    With V = max(R, G, B), M = min(R, G, B) and C = V - M, which rotation keeps, a channel of the result is
    V - C clamp(min(h, 4 - h), 0, 1), where h is the hue in sixths of the circle plus 5, 3 or 1 for red, green and blue,
    modulo 6. Multiplying the hue by C avoids the division, and H = C hue with q of `hue_offset` avoids the modulo:
    the channel is clamp(M - C + ||H + q C| - 3 C|, M, V).

    Args:
        pixels: float32 [3, ...].
        rotation: as a fraction of the full circle.
    """
    red, green, blue = pixels
    value = torch.maximum(red, green)
    value = torch.maximum(value, blue, out=value)
    least = torch.minimum(red, green)
    least = torch.minimum(least, blue, out=least)
    chroma = value - least
    first, second = green - blue, blue - red
    hue = (chroma * 4).sub_(first).sub_(second)
    hue = torch.where(value == green, second.add_(chroma, alpha=2), hue)
    hue = torch.where(value == red, first, hue)
    base, thrice = least - chroma, chroma * 3
    for channel in range(3):
        torch.add(hue, chroma, alpha=hue_offset(rotation, channel), out=pixels[channel])
        pixels[channel].abs_().sub_(thrice).abs_().add_(base).clamp_(least, value)
