"""DALI pipelines that decode, crop and resize images and, on a GPU, apply the photometric operations.

The formulas are those of `photometric`; `dali_inputs` computes their parameters for each image.
"""

from __future__ import annotations

from typing import Any

from nvidia.dali import fn, math, pipeline_def, types

from ..normalization import MEAN, STD
from .augmentation import ViewSpec
from .dali_inputs import BRIGHTNESS, CONTRAST, SATURATION, STAGES
from .photometric import LUMA


def _input(name: str, ndim: int = 0, dtype: Any = types.FLOAT) -> Any:
    """The external source of this name, with `ndim` dimensions for each image."""
    return fn.external_source(name=name, ndim=ndim, dtype=dtype)


def _region(gpu: bool) -> Any:
    return fn.decoders.image_slice(
        _input("encoded", 1, types.UINT8),
        start=_input("region_start", 1, types.INT32),
        shape=_input("region_shape", 1, types.INT32),
        axis_names="HW",
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
    )


@pipeline_def
def decode_pipeline(gpu: bool) -> Any:
    """Decode the region of each image that contains its crops: uint8 [H, W, 3]."""
    return _region(gpu)


@pipeline_def(enable_conditionals=True)
def view_pipeline(views: tuple[ViewSpec, ...], gpu: bool, photometric: bool) -> Any:
    """Decode a batch and compute its views.

    Args:
        views: the distribution of each view.
        gpu: whether to decode and compute on the GPU, and normalise the result.
        photometric: whether to apply the operations that follow the resize.

    Returns:
        One output for each view: without `photometric` uint8 [S, S, 3]; with it float32 [3, S, S] from 0 to 255. On a
        GPU float32 [S, S, 3], normalised.
    """
    image = _region(gpu)
    results = []
    for k, view in enumerate(views):
        result = _resized(image, k, view)
        if photometric:
            result = _photometric(result, k, view, "gpu" if gpu else "cpu")
        if gpu:
            result = fn.crop_mirror_normalize(
                result,
                dtype=types.FLOAT,
                output_layout="HWC",
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
            )
        results.append(result)
    return tuple(results)


def _resized(image: Any, k: int, view: ViewSpec) -> Any:
    return fn.resize(
        image,
        size=[view.image_size, view.image_size],
        roi_start=_input(f"from{k}", 1),  # start right of end: mirrored
        roi_end=_input(f"to{k}", 1),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


# Pixels stay float32 planes between operations: on a CPU, DALI's conversion to uint8 costs more than the operations,
# and planes make arithmetic on single channels cheap.


def _photometric(pixels: Any, k: int, view: ViewSpec, device: str) -> Any:
    pixels = fn.transpose(fn.cast(pixels, dtype=types.FLOAT), perm=[2, 0, 1])
    for stage in range(STAGES):
        pixels = _adjust(pixels, f"{k}before{stage}", device)
    if _input(f"rotated{k}", dtype=types.BOOL):
        pixels = _rotate_hue(pixels, k, device)
    for stage in range(STAGES):
        pixels = _adjust(pixels, f"{k}after{stage}", device)
    if _input(f"grey{k}", dtype=types.BOOL):
        pixels = fn.cat(*[_luma(pixels)] * 3, axis=0)
    if view.blur_kernel >= 3:  # noqa: SIM102  (a Python condition on the view, a DALI condition on each sample)
        if _input(f"blurred{k}", dtype=types.BOOL):
            pixels = fn.gaussian_blur(pixels, sigma=_input(f"sigma{k}"), window_size=view.blur_kernel)
    if _input(f"solarize{k}", dtype=types.BOOL):
        bright = pixels >= view.solarize_threshold - 0.5  # compares rounded values
        pixels = pixels + bright * (255.0 - 2.0 * pixels)
    return pixels


def _clamped(pixels: Any) -> Any:
    return math.min(math.max(pixels, 0.0), 255.0)  # faster than clamp


def _plane(pixels: Any, channel: int) -> Any:
    return fn.slice(pixels, channel, 1, axes=[0])


def _luma(pixels: Any) -> Any:
    """[1, S, S]"""
    red, green, blue = LUMA
    return _plane(pixels, 0) * red + _plane(pixels, 1) * green + _plane(pixels, 2) * blue


def _adjust(pixels: Any, name: str, device: str) -> Any:
    """Brightness, contrast, saturation or identity, chosen per sample."""
    kind = _input(f"kind{name}", dtype=types.INT32)
    factor = _scalar(f"factor{name}", device)
    if kind == BRIGHTNESS:
        result = math.min(pixels * factor, 255.0)
    elif kind == CONTRAST:
        mean = fn.reductions.mean(_luma(pixels))
        result = _clamped(pixels * factor + mean * (1.0 - factor))
    elif kind == SATURATION:
        result = _clamped(pixels * factor + _luma(pixels) * (1.0 - factor))
    else:
        result = pixels
    return result


def _scalar(name: str, device: str) -> Any:
    """One number for each image, on the device of the arithmetic."""
    return _input(name).gpu() if device == "gpu" else _input(name)


def _rotate_hue(pixels: Any, k: int, device: str) -> Any:
    """`photometric.rotate_hue` with DALI's operators."""
    red, green, blue = (_plane(pixels, channel) for channel in range(3))
    value = math.max(math.max(red, green), blue)
    least = math.min(math.min(red, green), blue)
    chroma = value - least
    twice = chroma * 2.0
    first, second = green - blue, blue - red
    last = twice * 2.0 - first - second
    hue = last + (value == green) * (twice + second - last)
    hue = hue + (value == red) * (first - hue)
    base, thrice = least - chroma, twice + chroma
    planes = []
    for channel in range(3):
        offset = math.abs(math.abs(hue + chroma * _scalar(f"rotation{k}{channel}", device)) - thrice)
        planes.append(math.min(math.max(base + offset, least), value))
    return fn.cat(*planes, axis=0)
