"""Pixel formats: channels, range, mean and standard deviation of the images that a network takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import EIGHT_BIT, PixelOptions
from ..normalization import MEAN, STD


@dataclass(frozen=True)
class PixelFormat:
    """The images of a run.

    Attributes:
        channels: channels of the network's input.
        low: value that becomes 0; smaller ones too.
        high: value that becomes 1; larger ones too.
        mean: of each channel, of values from 0 to 1.
        std: standard deviation of each channel, likewise.
        eight_bit: whether images are read as 8-bit grey or RGB by Pillow or DALI, and augmented as such.
    """

    channels: int = 3
    low: float = 0.0
    high: float = 255.0
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    eight_bit: bool = True

    @classmethod
    def of(cls, options: PixelOptions) -> PixelFormat:
        """The format of resolved options; "auto" is 8-bit RGB, as in runs of versions without these options."""
        if options.pixel_range in ("auto", EIGHT_BIT):
            return cls()
        low, high = map(float, options.pixel_range.split(","))
        channels = options.in_channels
        if options.normalization in ("auto", "imagenet"):
            return cls(channels, low, high, eight_bit=False)
        mean, std = (tuple(map(float, part.split(","))) for part in options.normalization.split(";"))
        return cls(channels, low, high, mean, std, eight_bit=False)

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> PixelFormat:
        """The format in the manifest of an exported network."""
        pixels, normalization = manifest.get("pixels"), manifest["normalization"]
        if pixels is None or pixels["eight_bit"]:
            return cls()
        mean, std = (tuple(normalization[key]) for key in ("mean", "std"))
        low, high = pixels["range"]
        return cls(pixels["channels"], low, high, mean, std, eight_bit=False)

    @property
    def pixels(self) -> dict[str, Any]:
        """The entry `pixels` of a manifest."""
        return {"channels": self.channels, "range": [self.low, self.high], "eight_bit": self.eight_bit}

    @property
    def normalization(self) -> dict[str, Any]:
        """The entry `normalization` of a manifest."""
        return {"mean": self.mean, "std": self.std}

    def describe(self) -> str:
        """A line for the log."""
        if self.eight_bit:
            return "8-bit grey or RGB, ImageNet's mean and std"
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        several = "s" if self.channels > 1 else ""
        return (
            f"{self.channels} channel{several}, values from {self.low:g} to {self.high:g}, others are clipped; "
            f"mean {mean}, std {std} of the values rescaled to 0 to 1"
        )

    def rescale(self, values: np.ndarray, colours: int) -> Tensor:
        """Take the channels and map the range to 0 to 1.

        Args:
            values: [H, W, C] in any dtype.
            colours: channels that are not transparency.

        Returns:
            float32 [channels, H, W].

        Raises:
            ValueError: the image has too few channels.
        """
        if colours == 1 < self.channels == 3:
            values = values[..., :1].repeat(3, axis=-1)
        if values.shape[-1] < self.channels:
            raise ValueError(f"it has {values.shape[-1]} channels, and the network takes {self.channels}")
        exact = np.float32 if values.dtype.itemsize <= 2 else np.float64  # float32 holds all 16-bit integers
        scaled = np.subtract(values[..., : self.channels], self.low, dtype=exact) / (self.high - self.low)
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32)).clamp_(0, 1)

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def normalize(self, values: Tensor) -> Tensor:
        """(values - mean) / std of float32 [C, H, W] from 0 to 1."""
        mean, std = self._mean_and_std
        return (values - mean) / std


@dataclass(frozen=True)
class RescaledImage:
    """An image with more than 8 bits, or other channels than grey or RGB.

    Attributes:
        values: float32 [C, H, W] from 0 to 1.
        format: normalises the values after the augmentation.
    """

    values: Tensor
    format: PixelFormat

    @property
    def height(self) -> int:
        """In pixels."""
        return self.values.shape[1]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.values.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as of a Pillow image."""
        return self.width, self.height
