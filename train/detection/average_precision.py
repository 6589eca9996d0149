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

# in the order of pycocotools' summary
MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = {"box": "bbox", "mask": "segm"}


def average_precision(truth: CocoDataset, detections: Iterable[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Any]:
    """Average precision over IoU thresholds from 0.50 to 0.95, and pycocotools' other eleven measures.

    Args:
        truth: annotated images; crowds are ignored, as in COCO's evaluation.
        detections: id and detections of each image, as torchvision's detectors return them for n objects: boxes
            [n, 4] (left, top, right, bottom in pixels), labels [n], scores [n], and unless the dataset has boxes only
            masks [n, 1, H, W] from 0 to 1.

    Returns:
        {"box": measures from 0 to 1 by name, "mask": the same, "categories": {name: {"instances", "box", "mask"}}}.
        A measure is None if there are no annotations for it. Of boxes alone there is no "mask".
    """
    coco.require_pycocotools()
    from pycocotools.cocoeval import COCOeval

    # pycocotools treats id 0 as unmatched: renumber from 1
    annotations = [dict(annotation) for image in truth.images for annotation in truth.annotations[image["id"]]]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    found = [record for image, detected in detections for record in _records(truth, image, detected)]
    scores: dict[str, Any] = {}
    by_category: dict[str, Any] = {
        category["name"]: {"instances": sum(a["category_id"] == category["id"] for a in annotations)}
        for category in truth.categories
    }
    kinds = {kind: KINDS[kind] for kind in KINDS if kind == "box" or not truth.boxes_only}
    with Monitor("AP", len(kinds), console=Console(file=sys.stdout, highlight=False)) as monitor:
        for kind, iou_type in kinds.items():
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints progress
                evaluation = COCOeval(_index(truth, annotations), _index(truth, _of_kind(found, kind)), iou_type)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            monitor.advance()
            monitor.status(kind)
            scores[kind] = {
                name: _none_if_negative(value) for name, value in zip(MEASURES, evaluation.stats, strict=True)
            }
            precision = evaluation.eval["precision"]  # [thresholds, recalls, categories, areas, detections]
            for place, category in enumerate(truth.categories):
                values = precision[:, :, place, 0, -1]
                by_category[category["name"]][kind] = _none_if_negative(
                    values[values > -1].mean() if (values > -1).any() else -1
                )
    return {**scores, "categories": by_category}


def _none_if_negative(value: float) -> float | None:
    return None if value < 0 else float(value)


def _records(truth: CocoDataset, image: int, detected: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Detections of an image as pycocotools' results, with boxes and, unless the dataset has boxes only, masks."""
    from pycocotools import mask

    boxes = detected["boxes"].detach().double().cpu()
    corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    shapes: list[dict[str, Any]] = [{}] * len(boxes)
    if not truth.boxes_only:
        masks = (detected["masks"][:, 0] >= 0.5).cpu().numpy().astype(np.uint8)
        shapes = [{"segmentation": mask.encode(np.asfortranarray(shape))} for shape in masks]
    return [
        {
            "image_id": image,
            "category_id": truth.categories[label - 1]["id"],
            "score": score,
            "bbox": [*corner, *side],
            **shape,
            "iscrowd": 0,
        }
        for label, score, corner, side, shape in zip(
            detected["labels"].tolist(),
            detected["scores"].tolist(),
            corners.tolist(),
            sides.tolist(),
            shapes,
            strict=True,
        )
    ]


def _of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Results with ids and areas; the area of the box or of the mask decides between small, medium and large."""
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
