"""torchvision's and Pillow's way of carrying out a Draw: one image at a time, in bytes."""

import functools
from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .augmentation import Draw, ViewSpec, check_size

View = Callable[[Image.Image], torch.Tensor]


def augment(view: ViewSpec, drawn: Draw, image: Image.Image) -> torch.Tensor:
    """The view that was drawn of an image, "L" or "RGB" to uint8 [1 or 3, image_size, image_size]."""
    image = _resized_crop(image, drawn.box, (view.image_size, view.image_size))
    if drawn.flip:
        image = F.horizontal_flip(image)
    for name, factor in drawn.jitter:
        if image.mode == "RGB" or name in ("brightness", "contrast"):  # the others change nothing without colours
            image = getattr(F, f"adjust_{name}")(image, factor)
    if drawn.grey and image.mode == "RGB":
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    pixels = F.pil_to_tensor(image)
    if drawn.sigma:
        pixels = _gaussian_blur(pixels, view.blur_kernel, drawn.sigma)
    if drawn.solarize:
        pixels = F.solarize(pixels, view.solarize_threshold)
    return pixels


def evaluation_view(image_size: int) -> View:
    """The view without chance, uint8 [1 or 3, image_size, image_size]: the shorter side to 8/7 of that, centre crop.

    Images whose shorter side is not above `image_size` are resized to it exactly: they have no margin to cut away.
    """
    check_size(image_size)
    return functools.partial(_evaluate, image_size)


def _evaluate(image_size: int, image: Image.Image) -> torch.Tensor:
    shorter = min(image.size)
    target = round(image_size * 8 / 7) if shorter > image_size else image_size
    height, width = (round(side * target / shorter) for side in (image.height, image.width))
    image = _resized_crop(image, (0, 0, image.height, image.width), (height, width))
    return F.pil_to_tensor(F.center_crop(image, [image_size, image_size]))


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


def _gaussian_blur(pixels: torch.Tensor, kernel: int, sigma: float) -> torch.Tensor:
    """uint8 [C, S, S] convolved with a Gaussian cut off at `kernel` pixels, the image mirrored at its borders.

    A Gaussian is separable: with the banded matrix A of its weights the result is A X A^T, faster on a CPU than a
    two-dimensional convolution, by 6 times at 224 pixels.
    """
    band = blur_matrix(pixels.shape[-1], kernel, sigma)
    return (band @ pixels.float() @ band.T).round_().to(torch.uint8)


def blur_matrix(size: int, kernel: int, sigma: float) -> torch.Tensor:
    """The banded matrix [size, size] that blurs one axis: see `_gaussian_blur`."""
    weights = torch.exp(-0.5 * ((torch.arange(kernel) - kernel // 2) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(size, kernel)
    return torch.zeros(size, size).scatter_add_(1, _mirrored_columns(size, kernel), weights)


@functools.lru_cache
def _mirrored_columns(size: int, kernel: int) -> torch.Tensor:
    """int64 [size, kernel]: for each output pixel the input pixels under the kernel, mirrored at both borders."""
    columns = (torch.arange(size).unsqueeze(1) + torch.arange(kernel) - kernel // 2).abs()
    return torch.where(columns > size - 1, 2 * (size - 1) - columns, columns)
