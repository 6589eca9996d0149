"""What DALI's pipelines are given: the file of each image, the region that its crops lie in, and its Draws as numbers.

Each JPEG is decoded once, and only the region that its two crops lie in. What is no ordinary JPEG is decoded by Pillow
while it is read, as in the other backends, and reaches the pipeline as a PPM file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .augmentation import JITTER, Draw, ViewSpec
from .photometric import hue_offset

ORIENTATION = 0x0112  # EXIF's number for which way up the camera was held
END_OF_JPEG = b"\xff\xd9"
STAGES = len(JITTER) - 1  # of jitter but hue, that may come before and after it
BRIGHTNESS, CONTRAST, SATURATION, NOTHING = 0, 1, 2, 3


@dataclass(frozen=True)
class Sample:
    """An image's file, and its views.

    Attributes:
        encoded: uint8 [n], a JPEG or PPM file.
        region: of the image that the views' boxes lie in: top, left, height, width.
        draws: one for each view.
    """

    encoded: np.ndarray
    region: tuple[int, int, int, int]
    draws: list[Draw]


def plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that DALI decodes as Pillow does; None for everything else.

    That is a whole file of greyscale or YCbCr, the right way up.
    """
    try:
        with Image.open(io.BytesIO(content)) as header:
            plain = header.format == "JPEG" and header.mode in ("L", "RGB")
            if plain and "exif" in header.info:
                plain = header.getexif().get(ORIENTATION, 1) == 1
            size = header.height, header.width
    except Exception:  # Pillow will say what is wrong with it when it decodes it
        return None
    return size if plain and content.rstrip(b"\0").endswith(END_OF_JPEG) else None


def union(boxes: Sequence[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """The smallest box around all of them: top, left, height, width."""
    top, left = (min(box[axis] for box in boxes) for axis in (0, 1))
    bottom, right = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return top, left, bottom - top, right - left


def for_decoding(samples: Sequence[Sample]) -> dict[str, Any]:
    """What `decoding` is given, by name."""
    regions = np.array([sample.region for sample in samples], np.int32)
    return {
        "encoded": [sample.encoded for sample in samples],
        "region_start": np.ascontiguousarray(regions[:, :2]),
        "region_shape": np.ascontiguousarray(regions[:, 2:]),
    }


def for_viewing(samples: Sequence[Sample], views: Sequence[ViewSpec], colours: bool) -> dict[str, Any]:
    """What `viewing` is given, by name."""
    inputs = for_decoding(samples)
    for k, view in enumerate(views):
        drawn = [sample.draws[k] for sample in samples]
        boxes = np.array([one.box for one in drawn], np.int32)
        flip = np.array([one.flip for one in drawn])
        top, left = (boxes[:, :2] - inputs["region_start"]).T
        bottom, right = top + boxes[:, 2], left + boxes[:, 3]
        inputs[f"from{k}"] = np.stack([top, np.where(flip, right, left)], 1).astype(np.float32)
        inputs[f"to{k}"] = np.stack([bottom, np.where(flip, left, right)], 1).astype(np.float32)
        if not colours:
            continue
        stages = [_stages(one.jitter) for one in drawn]
        for where, side in enumerate(("before", "after")):
            for stage in range(STAGES):
                chosen = [of_sample[where][stage] for of_sample in stages]
                inputs[f"kind{k}{side}{stage}"] = np.array([kind for kind, _ in chosen], np.int32)
                inputs[f"factor{k}{side}{stage}"] = np.array([factor for _, factor in chosen], np.float32)
        turn = np.array([dict(one.jitter).get("hue", 0.0) for one in drawn])
        inputs[f"hued{k}"] = turn != 0
        for channel in range(3):
            inputs[f"turn{k}{channel}"] = np.array([hue_offset(value, channel) for value in turn], np.float32)
        inputs[f"grey{k}"] = np.array([one.grey for one in drawn])
        if view.blur_kernel >= 3:
            inputs[f"blurred{k}"] = np.array([one.sigma > 0 for one in drawn])
            inputs[f"sigma{k}"] = np.array([one.sigma or 1.0 for one in drawn], np.float32)
        inputs[f"solarize{k}"] = np.array([one.solarize for one in drawn])
    return inputs


Stage = tuple[int, float]


def _stages(jitter: Sequence[tuple[str, float]]) -> tuple[list[Stage], list[Stage]]:
    """(kind, factor) of the STAGES before hue and of those after it."""
    names = [name for name, _ in jitter]
    middle = names.index("hue") if "hue" in names else len(names)
    before, after = (
        [(JITTER.index(name), factor) for name, factor in part] for part in (jitter[:middle], jitter[middle + 1 :])
    )
    rest = [(NOTHING, 1.0)] * STAGES
    return (before + rest)[:STAGES], (after + rest)[:STAGES]
