"""Boxes and masks in COCO's format: validation and conversion to pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

EDGE = 1.0  # pixels by which a box may exceed its image: published boxes are rounded

Record = dict[str, Any]


def clip_box(bbox: Sequence[float], width: int, height: int) -> list[float]:
    """Convert left, top, width, height to left, top, right, bottom and clip them to the image."""
    left, top, across, down = bbox
    return [max(left, 0.0), max(top, 0.0), min(left + across, float(width)), min(top + down, float(height))]


def encode_mask(segmentation: Any, height: int, width: int) -> Record:
    """Convert polygons or run lengths, compressed or not, to compressed run lengths."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, height, width)
    return segmentation


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Convert polygons or run lengths to a mask, uint8 [H, W]."""
    from pycocotools import mask

    return np.ascontiguousarray(mask.decode(encode_mask(segmentation, height, width)))


def box_is_relative(bbox: Any) -> bool:
    """Whether a box seems to be in fractions of its image: all numbers are from 0 to 1."""
    return _numbers(bbox) and len(bbox) == 4 and all(0 <= value <= 1 for value in bbox) and min(bbox[2:]) > 0


def box_problem(bbox: Any, height: int, width: int) -> str:
    """Return an error message for an invalid box in an image of this size, empty for a valid one."""
    if not _numbers(bbox) or len(bbox) != 4:
        return f"its box is {bbox!r}, not four numbers"
    left, top, across, down = bbox
    if across <= 0 or down <= 0:
        return f"its box {bbox} has no area"
    if min(left, top) < -EDGE or left + across > width + EDGE or top + down > height + EDGE:
        return f"its box {bbox} lies outside its image of {width} x {height} (boxes are left, top, width, height)"
    left, top, right, bottom = clip_box(bbox, width, height)
    return "" if left < right and top < bottom else f"its box {bbox} has no area in its image of {width} x {height}"


def mask_problem(segmentation: Any, height: int, width: int) -> str:
    """Return an error message for an invalid mask in an image of this size, empty for a valid one."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "it has no polygon"
        for polygon in segmentation:
            if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                return "one of its polygons is not three or more pairs of numbers"
        return ""
    if not isinstance(segmentation, dict):
        return "it has no segmentation: polygons or run lengths"
    if segmentation.get("size") != [height, width]:
        return f"its run lengths have size {segmentation.get('size')}, its image [{height}, {width}]"
    try:
        counts = segmentation.get("counts")
        lengths = _decompressed(counts) if isinstance(counts, str) else counts
    except (ValueError, IndexError):
        return "its compressed run lengths are damaged"
    if not isinstance(lengths, list) or not all(is_integer(length) and length >= 0 for length in lengths):
        return "its run lengths are not integers from 0"
    if sum(lengths) != height * width:
        return f"its run lengths add up to {sum(lengths)} pixels, its image has {height * width}"
    return ""


def _decompressed(counts: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits per character, the sixth continues the number.

    From the fourth on a number is the difference to the one two places before. Unlike pycocotools this checks for a
    truncated text.
    """
    lengths: list[int] = []
    place = 0
    while place < len(counts):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(counts[place]) - 48
            if not 0 <= bits < 64:
                raise ValueError
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            place, shift = place + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    return lengths


def is_integer(value: Any) -> bool:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
