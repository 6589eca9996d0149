"""Records of COCO's format as annotation tools write them, converted to the types of the format.

Numbers may be texts or floats (ids 1.0 or "1", iscrowd "0", area "360"), areas may be null, a polygon may lack its
outer list (VIA), and a root category may be listed that no annotation has (Roboflow).
"""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]

IDS = {"images": ("id", "width", "height"), "categories": ("id",), "annotations": ("id", "image_id", "category_id")}


def integer(value: Any) -> Any:
    """The integer that a number or text means; other values unchanged."""
    found = number(value)
    return int(found) if isinstance(found, float) and found.is_integer() else found


def number(value: Any) -> Any:
    """The number that a text means; other values unchanged."""
    if isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            return value
        return found if math.isfinite(found) else value
    return value


def convert(records: list[Record], kind: str, crowds_as_objects: bool = False) -> None:
    """Convert the records of a kind, a key of `IDS`, in place."""
    for record in records:
        for key in IDS[kind]:
            if key in record:
                record[key] = integer(record[key])
        if kind == "categories" and isinstance(record.get("name"), int):
            record["name"] = str(record["name"])
        if kind == "annotations":
            _convert_annotation(record, crowds_as_objects)


def _convert_annotation(record: Record, crowds_as_objects: bool) -> None:
    area = number(record.get("area"))
    if isinstance(area, int | float) and not isinstance(area, bool) and math.isfinite(area) and area > 0:
        record["area"] = area
    else:
        record.pop("area", None)
    crowd = record.get("iscrowd")
    record["iscrowd"] = 0 if crowd in (None, "") or crowds_as_objects else integer(crowd)
    if isinstance(record.get("bbox"), list):
        record["bbox"] = [number(value) for value in record["bbox"]]
    shape = record.get("segmentation")
    if isinstance(shape, list) and shape and not isinstance(shape[0], list | dict):
        record["segmentation"] = [shape]
    elif shape is None or shape == [[]]:
        record["segmentation"] = []


def crowd_problem(record: Record) -> str:
    """An error message if iscrowd is neither 0 nor 1, else an empty text."""
    crowd = record["iscrowd"]
    return "" if crowd in (0, 1) else f"its iscrowd is {crowd!r}, not 0 or 1"


def unused_root(categories: list[Record], annotations: list[Record]) -> Record | None:
    """The category that others name as supercategory and no annotation has, as Roboflow adds it; else None."""
    used = {str(annotation.get("category_id")) for annotation in annotations}
    parents = {str(category.get("supercategory")) for category in categories}
    for category in categories:
        top = category.get("supercategory") in (None, "", "none")
        if top and str(category["id"]) not in used and str(category.get("name")) in parents and len(categories) > 1:
            return category
    return None
