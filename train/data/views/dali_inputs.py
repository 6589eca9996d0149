"""Inputs of DALI's pipelines: encoded images, regions to decode, and the sampled parameters of the views.

DALI decodes each JPEG once, and only the region that contains its two crops. Pillow decodes every other format while
it is read, as in the other backends, and the pipeline gets a PPM file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .augmentation import JITTER, ViewParameters, ViewSpec
from .photometric import hue_offset

ORIENTATION = 0x0112  # EXIF tag
END_OF_JPEG = b"\xff\xd9"
STAGES = len(JITTER) - 1  # operations of the jitter that may precede, or follow, the hue
BRIGHTNESS, CONTRAST, SATURATION, IDENTITY = 0, 1, 2, 3


@dataclass(frozen=True)
class Sample:
    """An encoded image and the parameters of its views.

    Attributes:
        encoded: uint8 [n], a JPEG or PPM file.
        region: the smallest box around the crops of all views: top, left, height, width in pixels.
        views: the parameters of each view.
    """

    encoded: np.ndarray
    region: tuple[int, int, int, int]
    views: list[ViewParameters]


def plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG that DALI decodes like Pillow, None for any other file.

    Such a JPEG is complete, greyscale or YCbCr, and not rotated by EXIF's orientation.
    """
    try:
        with Image.open(io.BytesIO(content)) as header:
            plain = header.format == "JPEG" and header.mode in ("L", "RGB")
            if plain and "exif" in header.info:
                plain = header.getexif().get(ORIENTATION, 1) == 1
            size = header.height, header.width
    except Exception:  # reported when Pillow decodes the file
        return None
    return size if plain and content.rstrip(b"\0").endswith(END_OF_JPEG) else None


def bounding_box(boxes: Sequence[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """Return the smallest box (top, left, height, width) that contains all `boxes`."""
    top, left = (min(box[axis] for box in boxes) for axis in (0, 1))
    bottom, right = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return top, left, bottom - top, right - left


def decode_inputs(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the inputs of `decode_pipeline` by name."""
    regions = np.array([sample.region for sample in samples], np.int32)
    return {
        "encoded": [sample.encoded for sample in samples],
        "region_start": np.ascontiguousarray(regions[:, :2]),
        "region_shape": np.ascontiguousarray(regions[:, 2:]),
    }


def view_inputs(samples: Sequence[Sample], views: Sequence[ViewSpec], photometric: bool) -> dict[str, Any]:
    """Return the inputs of `view_pipeline` by name; those of the photometric operations only with `photometric`."""
    inputs = decode_inputs(samples)
    for k, view in enumerate(views):
        parameters = [sample.views[k] for sample in samples]
        boxes = np.array([one.box for one in parameters], np.int32)
        flip = np.array([one.flip for one in parameters])
        top, left = (boxes[:, :2] - inputs["region_start"]).T
        bottom, right = top + boxes[:, 2], left + boxes[:, 3]
        inputs[f"from{k}"] = np.stack([top, np.where(flip, right, left)], 1).astype(np.float32)
        inputs[f"to{k}"] = np.stack([bottom, np.where(flip, left, right)], 1).astype(np.float32)
        if not photometric:
            continue
        stages = [_stages(one.jitter) for one in parameters]
        for where, side in enumerate(("before", "after")):
            for stage in range(STAGES):
                chosen = [of_sample[where][stage] for of_sample in stages]
                inputs[f"kind{k}{side}{stage}"] = np.array([kind for kind, _ in chosen], np.int32)
                inputs[f"factor{k}{side}{stage}"] = np.array([factor for _, factor in chosen], np.float32)
        rotation = np.array([dict(one.jitter).get("hue", 0.0) for one in parameters])
        inputs[f"rotated{k}"] = rotation != 0
        for channel in range(3):
            inputs[f"rotation{k}{channel}"] = np.array([hue_offset(value, channel) for value in rotation], np.float32)
        inputs[f"grey{k}"] = np.array([one.grey for one in parameters])
        if view.blur_kernel >= 3:
            inputs[f"blurred{k}"] = np.array([one.sigma > 0 for one in parameters])
            inputs[f"sigma{k}"] = np.array([one.sigma or 1.0 for one in parameters], np.float32)
        inputs[f"solarize{k}"] = np.array([one.solarize for one in parameters])
    return inputs


Stage = tuple[int, float]


def _stages(jitter: Sequence[tuple[str, float]]) -> tuple[list[Stage], list[Stage]]:
    """Return (kind, factor) of the STAGES operations before the hue and of those after it."""
    names = [name for name, _ in jitter]
    middle = names.index("hue") if "hue" in names else len(names)
    before, after = (
        [(JITTER.index(name), factor) for name, factor in part] for part in (jitter[:middle], jitter[middle + 1 :])
    )
    padding = [(IDENTITY, 1.0)] * STAGES
    return (before + padding)[:STAGES], (after + padding)[:STAGES]
