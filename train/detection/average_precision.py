"""COCO's average precision of boxes and masks, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from ..data.datasets import coco
from ..data.datasets.coco import CocoDataset
from ..run.progress import Monitor

# of pycocotools' summary, in its order
MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = {"box": "bbox", "mask": "segm"}


def average_precision(truth: CocoDataset, detections: Iterable[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Any]:
    """AP over intersections over union of 0.50 to 0.95, and pycocotools' other eleven measures.

    Args:
        truth: crowds in it are neither demanded nor forbidden.
        detections: an image's id, and of n things in it what torchvision's Mask R-CNN says: boxes [n, 4] as left, top,
            right, bottom in pixels, labels [n], scores [n], masks [n, 1, H, W] from 0 to 1.

    Returns:
        {"box": measures from 0 to 1 by name, "mask": the same, "categories": {name: {"instances", "box", "mask"}}};
        None where there is nothing to find.
    """
    coco.require_pycocotools()
    from pycocotools.cocoeval import COCOeval

    # an id of 0 is no match to pycocotools: they are counted anew, from 1 on
    annotations = [dict(annotation) for image in truth.images for annotation in truth.annotations[image["id"]]]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    found = [record for image, of in detections for record in _records(truth, image, of)]
    scores: dict[str, Any] = {}
    by_category: dict[str, Any] = {
        category["name"]: {"instances": sum(a["category_id"] == category["id"] for a in annotations)}
        for category in truth.categories
    }
    with Monitor("AP", len(KINDS), console=Console(file=sys.stdout, highlight=False)) as monitor:
        for kind, word in KINDS.items():
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
                evaluation = COCOeval(_index(truth, annotations), _index(truth, _of_kind(found, kind)), word)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            monitor.advance()
            monitor.status(kind)
            scores[kind] = {name: _known(value) for name, value in zip(MEASURES, evaluation.stats, strict=True)}
            precision = evaluation.eval["precision"]  # [thresholds, recalls, categories, areas, detections]
            for place, category in enumerate(truth.categories):
                values = precision[:, :, place, 0, -1]
                by_category[category["name"]][kind] = _known(values[values > -1].mean() if (values > -1).any() else -1)
    return {**scores, "categories": by_category}


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)


def _records(truth: CocoDataset, image: int, of: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What pycocotools takes as results, with both a box and a mask."""
    from pycocotools import mask

    boxes = of["boxes"].detach().double().cpu()
    corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    masks = (of["masks"][:, 0] >= 0.5).cpu().numpy().astype(np.uint8)
    return [
        {
            "image_id": image,
            "category_id": truth.categories[label - 1]["id"],
            "score": score,
            "bbox": [*corner, *side],
            "segmentation": mask.encode(np.asfortranarray(shape)),
            "iscrowd": 0,
        }
        for label, score, corner, side, shape in zip(
            of["labels"].tolist(), of["scores"].tolist(), corners.tolist(), sides.tolist(), masks, strict=True
        )
    ]


def _of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """With ids, and the area of the box or of the mask, by which things are small, medium or large."""
    from pycocotools import mask

    return [
        {
            **record,
            "id": number,
            "area": record["bbox"][2] * record["bbox"][3]
            if kind == "box"
            else float(mask.area(record["segmentation"])),
        }
        for number, record in enumerate(found, 1)
    ]


def _index(truth: CocoDataset, annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {"images": truth.images, "categories": truth.categories, "annotations": annotations}
    index.createIndex()
    return index
