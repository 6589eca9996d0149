"""BYOL's augmentation as data, and torchvision's way of carrying it out.

Grill et al. 2020, "Bootstrap Your Own Latent", appendix B: a random resized crop, a flip, colour jitter, greyscale,
Gaussian blur and solarisation, the last two more or less often in one view than in the other. A ViewSpec says what is
drawn; `build` makes the function that draws it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dspnet_fast.errors import InputError

View = Callable[[Image.Image], torch.Tensor]

SMALLEST = 8  # pixels; a crop of fewer shows nothing
CROP_TRIES = 10
DRAWS = 2 * CROP_TRIES + 2 + 6 + 4 + 4  # uniform numbers per view: see _augment


@dataclass(frozen=True)
class ViewSpec:
    """One view's distribution. Probabilities and scales are fractions, sizes and sigmas pixels of the finished view.

    The operations follow the order of the fields. Factors of brightness, contrast and saturation are uniform in
    1 +- the value, hue's shift in +- the value (1 is the full circle), and the four are applied in random order.
    """

    image_size: int
    min_scale: float
    blur_probability: float
    blur_kernel: int  # odd; below 3 there is no blur
    blur_sigma: tuple[float, float]
    solarize_probability: float
    max_scale: float = 1.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey_probability: float = 0.2
    solarize_threshold: int = 128  # pixels of this value and brighter are inverted


def byol(image_size: int, min_scale: float = 0.08) -> tuple[ViewSpec, ViewSpec]:
    """The two views of BYOL for square crops of `image_size` pixels; `min_scale` is the smallest share of the area.

    BYOL blurs 224 pixels with sigma 0.1 to 2 and a kernel of 23. Both shrink with the image, so that the same detail is
    lost at every size: at 96 pixels sigma is at most 0.86, and below 30 the kernel is one pixel and nothing is blurred.
    """
    _check_size(image_size)
    if not 0 < min_scale <= 1:
        raise InputError(f"the smallest crop is {min_scale} of the image's area: give a number above 0, at most 1")
    scale = image_size / 224
    kernel = max(1, (int(23 * scale) - 1) // 2 * 2 + 1)

    def view(blur: float, solarize: float) -> ViewSpec:
        return ViewSpec(image_size, min_scale, blur, kernel, (0.1 * scale, 2.0 * scale), solarize)

    return view(blur=1.0, solarize=0.0), view(blur=0.1, solarize=0.2)


def build(view: ViewSpec) -> View:
    """The function that draws this view of an image: "L" or "RGB" to uint8 [1 or 3, image_size, image_size].

    It takes one vector of DRAWS numbers from torch's global generator, whatever the image and the outcome.
    """
    return functools.partial(_augment, view)


def evaluation_view(image_size: int) -> View:
    """The view without chance, uint8 [1 or 3, image_size, image_size]: the shorter side to 8/7 of that, centre crop.

    Images whose shorter side is not above `image_size` are resized to it exactly: they have no margin to cut away.
    """
    _check_size(image_size)
    return functools.partial(_evaluate, image_size)


def _check_size(image_size: int) -> None:
    if image_size < SMALLEST:
        raise InputError(f"views of {image_size} pixels are too small: give an image size of at least {SMALLEST}")


def _evaluate(image_size: int, image: Image.Image) -> torch.Tensor:
    shorter = min(image.size)
    target = round(image_size * 8 / 7) if shorter > image_size else image_size
    height, width = (round(side * target / shorter) for side in (image.height, image.width))
    image = _resized_crop(image, (0, 0, image.height, image.width), (height, width))
    return F.pil_to_tensor(F.center_crop(image, [image_size, image_size]))


def _augment(view: ViewSpec, image: Image.Image) -> torch.Tensor:
    draws = torch.rand(DRAWS).tolist()  # one call: separate ones would cost more than a small image's operations
    crop, order, factors = draws[: 2 * CROP_TRIES + 2], draws[-8:-4], draws[-4:]
    flip, jitter, grey, blur, sigma, solarize = draws[2 * CROP_TRIES + 2 : -8]
    box = _crop_box(view, image.height, image.width, crop)
    image = _resized_crop(image, box, (view.image_size, view.image_size))
    if flip < view.flip_probability:
        image = F.horizontal_flip(image)
    if jitter < view.jitter_probability:
        image = _jitter(view, image, factors, order)
    if grey < view.grey_probability and image.mode == "RGB":
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    pixels = F.pil_to_tensor(image)
    if blur < view.blur_probability and view.blur_kernel >= 3:
        low, high = view.blur_sigma
        pixels = _gaussian_blur(pixels, view.blur_kernel, low + (high - low) * sigma)
    if solarize < view.solarize_probability:
        pixels = F.solarize(pixels, view.solarize_threshold)
    return pixels


def _crop_box(view: ViewSpec, height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """Top, left, height, width by the rule of torchvision's RandomResizedCrop: area uniform, ratio log-uniform.

    The first of ten tries that fits inside the image is taken, else the largest centred box of an admitted ratio.
    """
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    down, right = draws[-2:]
    for i in range(CROP_TRIES):
        area = height * width * (view.min_scale + (view.max_scale - view.min_scale) * draws[2 * i])
        ratio = math.exp(low + (high - low) * draws[2 * i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w = max(1, min(width, round(height * view.ratio[1])))
    h = max(1, min(height, round(width / view.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """Crop to (top, left, height, width), then resize to (height, width), bicubic with antialiasing.

    torch's resize of bytes is 2 to 4 times as fast as Pillow's on photographs, but the way there and back costs more
    than all of Pillow's on small images. The two differ by one grey level at most.
    """
    top, left, height, width = box
    image = image.crop((left, top, left + width, top + height))
    if (height, width) == size:
        return image
    bicubic = InterpolationMode.BICUBIC
    if height * width <= 128 * 128:
        return F.resize(image, list(size), bicubic)
    return F.to_pil_image(F.resize(F.pil_to_tensor(image), list(size), bicubic, antialias=True))


def _jitter(view: ViewSpec, image: Image.Image, factors: Sequence[float], order: Sequence[float]) -> Image.Image:
    operations = (
        (F.adjust_brightness, 1.0, view.brightness),
        (F.adjust_contrast, 1.0, view.contrast),
        (F.adjust_saturation, 1.0, view.saturation),
        (F.adjust_hue, 0.0, view.hue),
    )
    greyscale = 2  # of these, only brightness and contrast change an image without colours
    for i in sorted(range(len(operations)), key=order.__getitem__):
        if i < greyscale or image.mode == "RGB":
            adjust, centre, strength = operations[i]
            image = adjust(image, centre + strength * (2 * factors[i] - 1))
    return image


def _gaussian_blur(pixels: torch.Tensor, kernel: int, sigma: float) -> torch.Tensor:
    """uint8 [C, S, S] convolved with a Gaussian cut off at `kernel` pixels, the image mirrored at its borders.

    A Gaussian is separable: with the banded matrix A of its weights the result is A X A^T, faster on a CPU than a
    two-dimensional convolution, by 6 times at 224 pixels.
    """
    size = pixels.shape[-1]
    weights = torch.exp(-0.5 * ((torch.arange(kernel) - kernel // 2) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(size, kernel)
    band = torch.zeros(size, size).scatter_add_(1, _mirrored_columns(size, kernel), weights)
    return (band @ pixels.float() @ band.T).round_().to(torch.uint8)


@functools.lru_cache
def _mirrored_columns(size: int, kernel: int) -> torch.Tensor:
    """int64 [size, kernel]: for each output pixel the input pixels under the kernel, mirrored at both borders."""
    columns = (torch.arange(size).unsqueeze(1) + torch.arange(kernel) - kernel // 2).abs()
    return torch.where(columns > size - 1, 2 * (size - 1) - columns, columns)
