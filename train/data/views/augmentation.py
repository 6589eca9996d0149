"""BYOL's augmentation as data: what is drawn, and the draws themselves.

Grill et al. 2020, "Bootstrap Your Own Latent", appendix B: a random resized crop, a flip, colour jitter, greyscale,
Gaussian blur and solarisation, the last two more or less often in one view than in the other. A ViewSpec is the
distribution of a view; a Draw is one value of it, a function of (seed, epoch, image) alone. Backends (`vision`, `dali`)
carry out Draws and decide nothing, so that they can be compared image by image.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspnet_fast.errors import InputError

from ..sampler import mix

SMALLEST = 8  # pixels; a crop of fewer shows nothing
CROP_TRIES = 10
DRAWS = 2 * CROP_TRIES + 2 + 6 + 4 + 4  # uniform numbers per view: see `draw`
JITTER = ("brightness", "contrast", "saturation", "hue")
OPERATIONS = ("resize", "flip", *JITTER, "order", "grey", "blur", "solarize")


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
    check_size(image_size)
    if not 0 < min_scale <= 1:
        raise InputError(f"the smallest crop is {min_scale} of the image's area: give a number above 0, at most 1")
    scale = image_size / 224
    kernel = max(1, (int(23 * scale) - 1) // 2 * 2 + 1)

    def view(blur: float, solarize: float) -> ViewSpec:
        return ViewSpec(image_size, min_scale, blur, kernel, (0.1 * scale, 2.0 * scale), solarize)

    return view(blur=1.0, solarize=0.0), view(blur=0.1, solarize=0.2)


def supervised(image_size: int, min_scale: float = 0.08) -> ViewSpec:
    """Random resized crop and flip: the view that classifiers are trained on (BYOL, appendix D.1)."""
    crops, _ = byol(image_size, min_scale)
    return dataclasses.replace(
        crops, jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0, solarize_probability=0.0
    )


def check_size(image_size: int) -> None:
    """Raise InputError for views too small to show anything."""
    if image_size < SMALLEST:
        raise InputError(f"views of {image_size} pixels are too small: give an image size of at least {SMALLEST}")


@dataclass(frozen=True)
class Draw:
    """What chance decided for one view of one image.

    Attributes:
        box: the crop: top, left, height and width in pixels of the image.
        flip: mirror it, left to right.
        jitter: (name out of JITTER, factor) in the order of application; empty if the colours stay.
        grey: take the colours away.
        sigma: of the blur, in pixels of the view; 0 for none.
        solarize: invert what is bright.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    sigma: float
    solarize: bool


def numbers(seed: int, epoch: int, i: int, views: int = 2) -> list[list[float]]:
    """DRAWS uniform numbers for each view of image i in an epoch."""
    generator = torch.Generator().manual_seed(mix(seed, epoch, i))
    return torch.rand(views, DRAWS, generator=generator).tolist()


def draw(view: ViewSpec, uniform: Sequence[float], height: int, width: int) -> Draw:
    """The Draw of an image of this size that DRAWS uniform numbers stand for."""
    crop, order, factors = uniform[: 2 * CROP_TRIES + 2], uniform[-8:-4], uniform[-4:]
    flip, jitter, grey, blur, sigma, solarize = uniform[2 * CROP_TRIES + 2 : -8]
    low, high = view.blur_sigma
    blurred = blur < view.blur_probability and view.blur_kernel >= 3
    return Draw(
        box=_crop_box(view, height, width, crop),
        flip=flip < view.flip_probability,
        jitter=_jitter(view, order, factors) if jitter < view.jitter_probability else (),
        grey=grey < view.grey_probability,
        sigma=low + (high - low) * sigma if blurred else 0.0,
        solarize=solarize < view.solarize_probability,
    )


def _jitter(view: ViewSpec, order: Sequence[float], factors: Sequence[float]) -> tuple[tuple[str, float], ...]:
    centres = (1.0, 1.0, 1.0, 0.0)
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    return tuple(
        (JITTER[k], centres[k] + strengths[k] * (2 * factors[k] - 1))
        for k in sorted(range(len(JITTER)), key=order.__getitem__)
        if strengths[k]
    )


def only(view: ViewSpec, operation: str) -> ViewSpec:
    """`view` with one of OPERATIONS, always, and no other; "order" is the four of JITTER, "resize" the crop and resize.

    All but "resize" see the image's largest square in the middle, resized.
    """
    if operation != "resize":
        view = dataclasses.replace(view, min_scale=1.0, max_scale=1.0, ratio=(1.0, 1.0))

    def strength(name: str) -> float:
        return getattr(view, name) if operation in (name, "order") else 0.0

    return dataclasses.replace(
        view,
        brightness=strength("brightness"),
        contrast=strength("contrast"),
        saturation=strength("saturation"),
        hue=strength("hue"),
        flip_probability=float(operation == "flip"),
        jitter_probability=float(operation in (*JITTER, "order")),
        grey_probability=float(operation == "grey"),
        blur_probability=float(operation == "blur"),
        solarize_probability=float(operation == "solarize"),
    )


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
