"""Boxes and masks as COCO writes them: what is wrong with one, and its pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

EDGE = 1.0  # pixels that a box may reach out of its image: published boxes are rounded

Record = dict[str, Any]


def clipped(bbox: Sequence[float], width: int, height: int) -> list[float]:
    """COCO's left, top, width, height as left, top, right, bottom inside the image."""
    left, top, across, down = bbox
    return [max(left, 0.0), max(top, 0.0), min(left + across, float(width)), min(top + down, float(height))]


def encoded(segmentation: Any, height: int, width: int) -> Record:
    """A mask as run lengths, from polygons or from run lengths compressed or not."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, height, width)
    return segmentation


def decoded(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask as uint8 [H, W]."""
    from pycocotools import mask

    return np.ascontiguousarray(mask.decode(encoded(segmentation, height, width)))


def box_problem(bbox: Any, height: int, width: int) -> str:
    """What is wrong with a box in an image of that size; empty if nothing is."""
    if not _numbers(bbox) or len(bbox) != 4:
        return f"its box is {bbox!r}, not four numbers"
    left, top, across, down = bbox
    if across <= 0 or down <= 0:
        return f"its box {bbox} has no area"
    if min(left, top) < -EDGE or left + across > width + EDGE or top + down > height + EDGE:
        return f"its box {bbox} lies outside its image of {width} x {height}"
    left, top, right, bottom = clipped(bbox, width, height)
    return "" if left < right and top < bottom else f"its box {bbox} has no area in its image of {width} x {height}"


def mask_problem(segmentation: Any, height: int, width: int) -> str:
    """What is wrong with a mask of an image of that size; empty if nothing is."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "it has no polygon"
        for polygon in segmentation:
            if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                return "a polygon of it is not three or more pairs of numbers"
        return ""
    if not isinstance(segmentation, dict):
        return "it has no segmentation: polygons or run lengths"
    if segmentation.get("size") != [height, width]:
        return f"its run lengths are of {segmentation.get('size')}, its image of [{height}, {width}]"
    try:
        counts = segmentation.get("counts")
        lengths = _decompressed(counts) if isinstance(counts, str) else counts
    except (ValueError, IndexError):
        return "its compressed run lengths are damaged"
    if not isinstance(lengths, list) or not all(is_whole(length) and length >= 0 for length in lengths):
        return "its run lengths are not whole numbers from 0 on"
    if sum(lengths) != height * width:
        return f"its run lengths are {sum(lengths)} pixels, its image {height * width}"
    return ""


def _decompressed(counts: str) -> list[int]:
    """Run lengths out of COCO's text: groups of 5 bits, the sixth says that more follow, from the third on differences.

    pycocotools decodes the same without looking whether the text ends where it should.
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


def is_whole(value: Any) -> bool:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
