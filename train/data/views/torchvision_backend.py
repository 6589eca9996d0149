"""Views computed by torchvision and Pillow: one uint8 image at a time."""

import functools
from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .augmentation import ViewParameters, ViewSpec, check_image_size

View = Callable[[Image.Image], torch.Tensor]


def augment(view: ViewSpec, parameters: ViewParameters, image: Image.Image) -> torch.Tensor:
    """Apply sampled parameters to an image.

    Args:
        view: the distribution that the parameters are from.
        parameters: the sampled parameters.
        image: in mode "L" or "RGB".

    Returns:
        uint8 [1 or 3, image_size, image_size].
    """
    image = _resized_crop(image, parameters.box, (view.image_size, view.image_size))
    if parameters.flip:
        image = F.horizontal_flip(image)
    for name, factor in parameters.jitter:
        if image.mode == "RGB" or name in ("brightness", "contrast"):  # saturation and hue do not change grey
            image = getattr(F, f"adjust_{name}")(image, factor)
    if parameters.grey and image.mode == "RGB":
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    pixels = F.pil_to_tensor(image)
    if parameters.sigma:
        pixels = _gaussian_blur(pixels, view.blur_kernel, parameters.sigma)
    if parameters.solarize:
        pixels = F.solarize(pixels, view.solarize_threshold)
    return pixels


def evaluation_view(image_size: int) -> View:
    """Return the deterministic view for evaluation: resize the shorter side to 8/7 `image_size`, then crop the centre.

    An image whose shorter side is at most `image_size` is resized to exactly that instead, as a crop would lose a
    margin that it does not have.

    Returns:
        A function from an image in mode "L" or "RGB" to uint8 [1 or 3, image_size, image_size].

    Raises:
        InputError: `image_size` is too small.
    """
    check_image_size(image_size)
    return functools.partial(_evaluate, image_size)


def _evaluate(image_size: int, image: Image.Image) -> torch.Tensor:
    size = evaluation_size(image_size, image.height, image.width)
    image = _resized_crop(image, (0, 0, image.height, image.width), size)
    return F.pil_to_tensor(F.center_crop(image, [image_size, image_size]))


def evaluation_size(image_size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image after the resize of `evaluation_view`."""
    shorter = min(height, width)
    target = round(image_size * 8 / 7) if shorter > image_size else image_size
    return round(height * target / shorter), round(width * target / shorter)


def _resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """Crop to (top, left, height, width), then resize to (height, width), bicubic with antialiasing.

    torch resizes uint8 photographs 2 to 4 times as fast as Pillow. On small images converting to a tensor and back
    costs more than Pillow's resize. Their results differ by one grey level at most.
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
    """Convolve uint8 [C, S, S] with a Gaussian of `kernel` pixels; the image is mirrored at its borders.

    A Gaussian is separable: with the banded matrix A of its weights the result is A X A^T. On a CPU this is 6 times as
    fast as a two-dimensional convolution at 224 pixels.
    """
    band = blur_matrix(pixels.shape[-1], kernel, sigma)
    return (band @ pixels.float() @ band.T).round_().to(torch.uint8)


def blur_matrix(size: int, kernel: int, sigma: float) -> torch.Tensor:
    """Return the banded matrix, float32 [size, size], that blurs one axis of `size` pixels."""
    weights = torch.exp(-0.5 * ((torch.arange(kernel) - kernel // 2) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(size, kernel)
    return torch.zeros(size, size).scatter_add_(1, _mirrored_columns(size, kernel), weights)


@functools.lru_cache
def _mirrored_columns(size: int, kernel: int) -> torch.Tensor:
    """int64 [size, kernel]: for each output pixel the input pixels under the kernel, mirrored at both borders."""
    columns = (torch.arange(size).unsqueeze(1) + torch.arange(kernel) - kernel // 2).abs()
    return torch.where(columns > size - 1, 2 * (size - 1) - columns, columns)
