"""What DALI computes: images decoded, cropped and resized, and where it shall be their colours.

The formulas are those of `colours`; the numbers in them are given for each image (dali_inputs.py).
"""

from __future__ import annotations

from typing import Any

from nvidia.dali import fn, math, pipeline_def, types

from ..normalization import MEAN, STD
from .augmentation import ViewSpec
from .dali_inputs import BRIGHTNESS, CONTRAST, SATURATION, STAGES
from .photometric import LUMA


def _given(name: str, ndim: int = 0, dtype: Any = types.FLOAT) -> Any:
    """What Python feeds under this name, a sample of `ndim` dimensions for each image."""
    return fn.external_source(name=name, ndim=ndim, dtype=dtype)


def _region(gpu: bool) -> Any:
    return fn.decoders.image_slice(
        _given("encoded", 1, types.UINT8),
        start=_given("region_start", 1, types.INT32),
        shape=_given("region_shape", 1, types.INT32),
        axis_names="HW",
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
    )


@pipeline_def
def decoding(gpu: bool) -> Any:
    """The part of each image that its crops lie in, uint8 [H, W, 3]."""
    return _region(gpu)


@pipeline_def(enable_conditionals=True)
def viewing(views: tuple[ViewSpec, ...], gpu: bool, colours: bool) -> Any:
    """Each view of the batch: its crop in uint8 [S, S, 3], or with `colours` all of it, in float32.

    That is [3, S, S] from 0 to 255, on a GPU [S, S, 3] and normalised.
    """
    image = _region(gpu)
    results = []
    for k, view in enumerate(views):
        result = _resized(image, k, view)
        if colours:
            result = _finished(result, k, view, "gpu" if gpu else "cpu")
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
        roi_start=_given(f"from{k}", 1),  # from right to left is a flip
        roi_end=_given(f"to{k}", 1),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


# Between operations pixels are float32 planes: on a CPU, DALI's way back to bytes costs more than the operations, and
# arithmetic on one channel in three is cheap where channels lie apart.


def _finished(pixels: Any, k: int, view: ViewSpec, device: str) -> Any:
    pixels = fn.transpose(fn.cast(pixels, dtype=types.FLOAT), perm=[2, 0, 1])
    for stage in range(STAGES):
        pixels = _adjust(pixels, f"{k}before{stage}", device)
    if _given(f"hued{k}", dtype=types.BOOL):
        pixels = _turn_hue(pixels, k, device)
    for stage in range(STAGES):
        pixels = _adjust(pixels, f"{k}after{stage}", device)
    if _given(f"grey{k}", dtype=types.BOOL):
        pixels = fn.cat(*[_luma(pixels)] * 3, axis=0)
    if view.blur_kernel >= 3:  # noqa: SIM102  (Python's question about the view, DALI's about each sample)
        if _given(f"blurred{k}", dtype=types.BOOL):
            pixels = fn.gaussian_blur(pixels, sigma=_given(f"sigma{k}"), window_size=view.blur_kernel)
    if _given(f"solarize{k}", dtype=types.BOOL):
        bright = pixels >= view.solarize_threshold - 0.5  # as if it were rounded
        pixels = pixels + bright * (255.0 - 2.0 * pixels)
    return pixels


def _clamped(pixels: Any) -> Any:
    return math.min(math.max(pixels, 0.0), 255.0)  # in less time than clamp


def _plane(pixels: Any, channel: int) -> Any:
    return fn.slice(pixels, channel, 1, axes=[0])


def _luma(pixels: Any) -> Any:
    """[1, S, S]"""
    red, green, blue = LUMA
    return _plane(pixels, 0) * red + _plane(pixels, 1) * green + _plane(pixels, 2) * blue


def _adjust(pixels: Any, name: str, device: str) -> Any:
    """Brightness, contrast, saturation or nothing, as each sample wants."""
    kind = _given(f"kind{name}", dtype=types.INT32)
    factor = _number(f"factor{name}", device)
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


def _number(name: str, device: str) -> Any:
    """A number for each image, where arithmetic needs it."""
    return _given(name).gpu() if device == "gpu" else _given(name)


def _turn_hue(pixels: Any, k: int, device: str) -> Any:
    """As `colours.turn_hue`, whose formula this is."""
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
        offset = math.abs(math.abs(hue + chroma * _number(f"turn{k}{channel}", device)) - thrice)
        planes.append(math.min(math.max(base + offset, least), value))
    return fn.cat(*planes, axis=0)
