"""BYOL's augmentation: the distribution of each view, and the sampled parameters of one view of one image.

Grill et al. 2020, "Bootstrap Your Own Latent", appendix B: random resized crop, flip, colour jitter, greyscale,
Gaussian blur and solarisation, the last two with a different probability in each view. `ViewSpec` is the distribution
of a view and `ViewParameters` one sample of it, a function of (seed, epoch, image). The backends
(`torchvision_backend`, `dali_backend`) apply ViewParameters and sample nothing, so their outputs can be compared image
by image.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspnet_fast.errors import InputError

from ...config import AugmentationOptions
from ..sampler import mix

MIN_IMAGE_SIZE = 8  # pixels
CROP_TRIES = 10
KERNEL_PER_SIGMA = 11.5  # of the largest sigma: 23 pixels for 2
FLIP = 2 * CROP_TRIES + 2  # index of the number that decides about the flip
NUMBERS_PER_VIEW = FLIP + 6 + 4 + 4  # split up in `sample_view`
JITTER = ("brightness", "contrast", "saturation", "hue")
OPERATIONS = ("resize", "flip", *JITTER, "order", "grey", "blur", "solarize")


@dataclass(frozen=True)
class ViewSpec:
    """The distribution of one view.

    The operations are applied in the order of the fields. The factors of brightness, contrast and saturation are
    uniform in 1 +- the value, the shift of the hue is uniform in +- the value (1 is the full circle), and these four
    are applied in random order.

    Attributes:
        image_size: height and width of the view in pixels.
        min_scale: smallest area of the crop, as a fraction of the image's area.
        blur_probability: fraction of views that are blurred.
        blur_kernel: width of the Gaussian in pixels of the view, odd; below 3 nothing is blurred.
        blur_sigma: smallest and largest sigma in pixels of the view.
        solarize_probability: fraction of views that are solarised.
        max_scale: largest area of the crop, as a fraction of the image's area.
        ratio: smallest and largest ratio of the crop's width to its height.
        flip_probability: fraction of views that are mirrored left to right.
        jitter_probability: fraction of views whose colours are changed.
        brightness: largest deviation of the brightness factor from 1.
        contrast: largest deviation of the contrast factor from 1.
        saturation: largest deviation of the saturation factor from 1.
        hue: largest shift of the hue.
        grey_probability: fraction of views that become greyscale.
        solarize_threshold: pixel value from which on solarisation inverts, 0 to 255.
    """

    image_size: int
    min_scale: float
    blur_probability: float
    blur_kernel: int
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
    solarize_threshold: int = 128


def byol(
    image_size: int, min_scale: float = 0.08, options: AugmentationOptions | None = None
) -> tuple[ViewSpec, ViewSpec]:
    """Return the distributions of BYOL's two views.

    BYOL blurs views of 224 pixels with sigma 0.1 to 2 and a kernel of 23 pixels. Both are scaled with `image_size`, so
    that blurring removes the same detail at every size: at 96 pixels sigma is at most 0.86; below 30 pixels the kernel
    is one pixel wide and nothing is blurred.

    Args:
        image_size: height and width of the views in pixels, at least `MIN_IMAGE_SIZE`.
        min_scale: smallest area of a crop, as a fraction of the image's area.
        options: probabilities and strengths of the operations; by default BYOL's.

    Raises:
        InputError: one of the arguments is out of range.
    """
    check_image_size(image_size)
    if not 0 < min_scale <= 1:
        raise InputError(f"a smallest crop of {min_scale} of the image's area: give a number above 0 and at most 1")
    options = options or AugmentationOptions()
    scale = image_size / 224
    low, high = options.pair("blur_sigma")
    kernel = max(1, (int(KERNEL_PER_SIGMA * high * scale) - 1) // 2 * 2 + 1)

    def view(blur: float, solarize: float) -> ViewSpec:
        return ViewSpec(
            image_size,
            min_scale,
            blur,
            kernel,
            (low * scale, high * scale),
            solarize,
            flip_probability=options.flip_probability,
            jitter_probability=options.jitter_probability,
            brightness=options.brightness,
            contrast=options.contrast,
            saturation=options.saturation,
            hue=options.hue,
            grey_probability=options.grey_probability,
            solarize_threshold=options.solarize_threshold,
        )

    first, second = map(view, options.pair("blur_probability"), options.pair("solarize_probability"))
    return first, second


def supervised(image_size: int, min_scale: float = 0.08) -> ViewSpec:
    """Return the distribution for training classifiers: random resized crop and flip (BYOL, appendix D.1).

    Arguments and errors as in `byol`.
    """
    crops, _ = byol(image_size, min_scale)
    return dataclasses.replace(
        crops, jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0, solarize_probability=0.0
    )


def check_image_size(image_size: int) -> None:
    """Raise InputError if `image_size` is below `MIN_IMAGE_SIZE`."""
    if image_size < MIN_IMAGE_SIZE:
        raise InputError(f"views of {image_size} pixels are too small: give an image size of at least {MIN_IMAGE_SIZE}")


@dataclass(frozen=True)
class ViewParameters:
    """The sampled parameters of one view of one image.

    Attributes:
        box: top, left, height and width of the crop in pixels of the image.
        flip: whether to mirror the view left to right.
        jitter: (name out of JITTER, factor) in the order of application; empty for unchanged colours.
        grey: whether to convert to greyscale.
        sigma: of the blur in pixels of the view; 0 for none.
        solarize: whether to invert bright pixels.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    sigma: float
    solarize: bool


def uniform_numbers(seed: int, epoch: int, i: int, views: int = 2) -> list[list[float]]:
    """Return the random numbers that determine the views of image i in an epoch.

    Returns:
        For each of `views` views `NUMBERS_PER_VIEW` numbers, uniform in [0, 1).
    """
    generator = torch.Generator().manual_seed(mix(seed, epoch, i))
    return torch.rand(views, NUMBERS_PER_VIEW, generator=generator).tolist()


def sample_view(view: ViewSpec, uniform: Sequence[float], height: int, width: int) -> ViewParameters:
    """Map uniform numbers to the parameters of a view.

    Args:
        view: the distribution.
        uniform: `NUMBERS_PER_VIEW` numbers in [0, 1), from `uniform_numbers`.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    crop, order, factors = uniform[:FLIP], uniform[-8:-4], uniform[-4:]
    _, jitter, grey, blur, sigma, solarize = uniform[FLIP:-8]
    low, high = view.blur_sigma
    blurred = blur < view.blur_probability and view.blur_kernel >= 3
    return ViewParameters(
        box=_crop_box(view, height, width, crop),
        flip=is_mirrored(view, uniform),
        jitter=_jitter(view, order, factors) if jitter < view.jitter_probability else (),
        grey=grey < view.grey_probability,
        sigma=low + (high - low) * sigma if blurred else 0.0,
        solarize=solarize < view.solarize_probability,
    )


def is_mirrored(view: ViewSpec, uniform: Sequence[float]) -> bool:
    """Whether `sample_view` mirrors a view, which depends on no size."""
    return uniform[FLIP] < view.flip_probability


def _jitter(view: ViewSpec, order: Sequence[float], factors: Sequence[float]) -> tuple[tuple[str, float], ...]:
    centres = (1.0, 1.0, 1.0, 0.0)
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    return tuple(
        (JITTER[k], centres[k] + strengths[k] * (2 * factors[k] - 1))
        for k in sorted(range(len(JITTER)), key=order.__getitem__)
        if strengths[k]
    )


def only(view: ViewSpec, operation: str) -> ViewSpec:
    """Return `view` with one operation, applied with probability 1, and no other.

    Args:
        view: the distribution to restrict.
        operation: one of `OPERATIONS`. "order" stands for all four of `JITTER`, "resize" for the random crop; every
            other operation applies to the largest centred square, resized.
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


def _crop_box(view: ViewSpec, height: int, width: int, uniform: Sequence[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width as in torchvision's RandomResizedCrop: area uniform, ratio log-uniform.

    The first of `CROP_TRIES` boxes that fits into the image, else the largest centred box of an allowed ratio.
    """
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    down, right = uniform[-2:]
    for i in range(CROP_TRIES):
        area = height * width * (view.min_scale + (view.max_scale - view.min_scale) * uniform[2 * i])
        ratio = math.exp(low + (high - low) * uniform[2 * i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w = max(1, min(width, round(height * view.ratio[1])))
    h = max(1, min(height, round(width / view.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w
