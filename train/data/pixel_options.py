"""Resolve --channels, --pixel-range and --normalization from a sample of the images, and read images as they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from dspnet_fast.errors import InputError

from ..config import EIGHT_BIT, PixelOptions
from .datasets.arrays import decode_array, is_eight_bit
from .datasets.decoders import unreadable
from .datasets.images import ImageDataset, Subset
from .datasets.pixels import PixelFormat, RescaledImage
from .normalization import MEAN, STD

HEADERS = 200  # images whose headers are read
MEASURED = 500  # images that range, mean and std are measured on, at most
PIXELS = 4096  # of each of them
PERCENTILES = 0.1, 99.9
DEPTHS = 1, 8, 10, 12, 14, 16  # bits of masks and sensors
Options = TypeVar("Options", bound=PixelOptions)


class RescaledDataset:
    """The images of a dataset as `RescaledImage`s of a format."""

    def __init__(self, images: ImageDataset, format: PixelFormat) -> None:
        self.name, self.labels, self.classes, self.note = images.name, images.labels, images.classes, images.note
        self._images, self._format = images, format

    def __len__(self) -> int:
        return len(self._images)

    def load(self, i: int) -> RescaledImage:
        content, file = self.encoded(i), self.file(i)
        values, colours = decode_array(content, file)
        try:
            return RescaledImage(self._format.rescale(values, colours), self._format)
        except ValueError as error:
            raise unreadable(file, content, error) from error

    def encoded(self, i: int) -> bytes:
        return self._images.encoded(i)

    def file(self, i: int) -> str:
        return self._images.file(i)


def read_as(images: ImageDataset, format: PixelFormat) -> ImageDataset:
    """The images in a format: unchanged if it is 8-bit."""
    return images if format.eight_bit else RescaledDataset(images, format)


@dataclass(frozen=True)
class _Sample:
    """A few images: pixels [n, C] and number of channels without transparency of each; smallest and largest value."""

    pixels: list[np.ndarray]
    colours: list[int]
    low: float
    high: float
    dtypes: set[np.dtype]


def resolve_pixels(options: Options, images: ImageDataset, report: Callable[[str], object] = print) -> Options:
    """Fill in the options that are "auto" or to be measured.

    Args:
        options: as given.
        images: the training images, as `open_images` returns them.
        report: receives a line if a sample decided.

    Returns:
        Options with a number of channels and with numbers for the range and the normalisation, or with "8bit" and
        "imagenet" for ordinary 8-bit images.

    Raises:
        InputError: the images have no common format, or the options contradict each other or the images.
    """
    options.check_pixels()
    if options.pixel_range == EIGHT_BIT and (options.channels, options.normalization) == (3, "imagenet"):
        return options
    if (
        options.pixel_range not in ("auto", "percentile", EIGHT_BIT)
        and options.channels != "auto"
        and ";" in options.normalization
    ):
        return options
    kinds = {i: is_eight_bit(images.encoded(i), images.file(i)) for i in _readable(images, HEADERS)}
    ordinary = options.channels in ("auto", 3) and options.normalization in ("auto", "imagenet")
    eight_bit = options.pixel_range == EIGHT_BIT or (options.pixel_range == "auto" and all(kinds.values()))
    if eight_bit and ordinary:
        return replace(options, channels=3, pixel_range=EIGHT_BIT, normalization="imagenet")
    if eight_bit:
        options = replace(options, pixel_range="0,255")
    elif options.pixel_range == "auto" and any(kinds.values()):
        some, other = (images.file(next(i for i, kind in kinds.items() if kind is wanted)) for wanted in (True, False))
        raise InputError(
            f"{some} has 8 bits and {other} has more, or several pages: they have no common range. "
            "Give it, as --pixel-range MIN,MAX"
            + (f", or give --pixel-range {EIGHT_BIT} to keep the upper 8 bits of all" if ordinary else "")
        )
    sample = _read_sample(images)
    if eight_bit and not 0 <= sample.low <= sample.high <= 255:
        raise InputError(
            f"images have values from {sample.low:g} to {sample.high:g}: give their range, as --pixel-range MIN,MAX "
            f"(--pixel-range {EIGHT_BIT} keeps the upper 8 bits for three channels and ImageNet's mean and std only)"
        )
    channels = _channels(options, sample)
    low, high = _range(options.pixel_range, sample)
    made = replace(options, channels=channels, pixel_range=f"{low:.9g},{high:.9g}")
    made = replace(made, normalization=_normalization(made, sample))
    report(
        f"pixels of {len(sample.pixels)} images are {', '.join(sorted(map(str, sample.dtypes)))}, from {sample.low:g} "
        f"to {sample.high:g}; chosen: --channels {channels} --pixel-range {made.pixel_range} "
        f"--normalization '{made.normalization}'"
    )
    return made


def resumed_pixels(options: Options, saved: PixelOptions) -> Options:
    """Replace options that are chosen from images or named by a word by those that a run has resolved."""
    named = ("auto", "percentile", "measure", "imagenet", EIGHT_BIT)
    resolved = saved.pixel_options().items()
    return replace(options, **{name: value for name, value in resolved if getattr(options, name) in named})


def _readable(images: ImageDataset, count: int) -> list[int]:
    """Evenly spaced indices of files that can be read."""
    found = []
    for i in range(0, len(images), -(-len(images) // count)):
        try:
            images.encoded(i)
        except InputError:
            continue
        found.append(i)
    return found


def _read_sample(images: ImageDataset) -> _Sample:
    drawn = Subset.up_to(MEASURED, images)
    pixels, colours, extremes, dtypes, wrong = [], [], [], set(), ""
    for i in range(len(drawn)):
        try:
            values, count = decode_array(drawn.encoded(i), drawn.file(i))
        except InputError as error:
            wrong = wrong or str(error)
            continue
        rows = values.reshape(-1, values.shape[-1])
        pixels.append(rows[:: max(1, len(rows) // PIXELS)])
        colours.append(count)
        extremes.append((float(values.min()), float(values.max())))
        dtypes.add(values.dtype)
    if not pixels:
        raise InputError(f"none of {len(drawn)} images of {images.name} can be read: {wrong}")
    return _Sample(pixels, colours, min(low for low, _ in extremes), max(high for _, high in extremes), dtypes)


def _channels(options: PixelOptions, sample: _Sample) -> int:
    counts = Counter(sample.colours)
    if options.channels != "auto":
        stored = Counter(rows.shape[1] for rows in sample.pixels)
        least = min(stored)
        if least < options.channels and not (options.channels == 3 and stored.keys() <= {1, 2, 3, 4}):
            raise InputError(f"--channels {options.channels}, but images have {_listed(stored)}: give at most {least}")
        return options.channels
    if len(counts) > 1 and counts.keys() != {1, 3}:
        raise InputError(f"images have {_listed(counts)}: give --channels N to take the first N channels of each")
    return max(counts)


def _listed(counts: Counter[int]) -> str:
    return ", ".join(f"{channels} channels ({count} images)" for channels, count in sorted(counts.items()))


def _range(option: str, sample: _Sample) -> tuple[float, float]:
    low: float
    high: float
    if option == "percentile":
        low, high = np.percentile(np.concatenate([rows.ravel() for rows in sample.pixels]), PERCENTILES)
    elif option != "auto":
        low, high = map(float, option.split(","))
    elif sample.low >= 0 and all(dtype.kind != "f" for dtype in sample.dtypes):
        low, high = 0, next((2**bits - 1 for bits in DEPTHS if sample.high < 2**bits), sample.high)
    elif sample.low >= 0 and sample.high <= 1:
        low, high = 0, 1
    else:
        low, high = sample.low, sample.high
    if low >= high:
        raise InputError(f"all sampled pixels are {low:g}: give the range of the images, as --pixel-range MIN,MAX")
    return low, high


def _normalization(options: PixelOptions, sample: _Sample) -> str:
    channels = options.in_channels
    if options.normalization == "imagenet" and channels != 3:
        raise InputError(f"--normalization imagenet is for 3 channels, not {channels}: give measure, or M;S")
    if options.normalization not in ("auto", "measure"):
        mean, std = (
            (MEAN, STD) if options.normalization == "imagenet" else PixelFormat.of(options).normalization.values()
        )
        if len(mean) != channels or len(std) != channels:
            raise InputError(
                f"--normalization {options.normalization}: give {channels} means and {channels} deviations"
            )
    else:
        unit = PixelFormat.of(replace(options, normalization="auto"))
        values = torch.cat(
            [
                unit.rescale(rows[:, None], colours).flatten(1)
                for rows, colours in zip(sample.pixels, sample.colours, strict=True)
            ],
            dim=1,
        )
        values = values.double()
        deviation = values.std(dim=1, correction=0)
        mean, std = values.mean(dim=1).tolist(), torch.where(deviation > 0, deviation, 1.0).tolist()
    return ";".join(",".join(f"{value:.6g}" for value in values) for values in (mean, std))
