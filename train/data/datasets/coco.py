"""Sets of images with boxes and masks in COCO's format: DIR/annotations/NAME.json and a folder of images.

What is wrong with a set is said before anything is trained, annotation by annotation. A damaged set (files that are
missing, ids that are not unique or that refer to nothing) cannot be used. Annotations whose box or mask is no shape
inside their image can be left out, up to a limit; COCO's own training annotations hold a few of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspnet_fast.errors import InputError

from ...run.progress import Monitor
from .coco_shapes import Record, box_problem, clipped, decoded, encoded, is_whole, mask_problem
from .images import decode

NAMED = 10  # wrong annotations that a message names
CHECKED_AT_ONCE = 1000


class Instances(NamedTuple):
    """One image, uint8 [3, H, W], and what is in it.

    boxes: float32 [n, 4], left, top, right, bottom in pixels. labels: int64 [n], from 1 on, 0 being the background.
    masks: uint8 [n, H, W].
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor


@dataclass(frozen=True)
class CocoSet:
    """A set that was read and checked.

    Attributes:
        file: the annotations' path.
        folder: of the images.
        images: records with id, file_name, width, height, in the order of the file.
        categories: records with id, name, by id; a label is a place among them, from 1 on.
        annotations: records by the image's id: id, category_id, bbox, segmentation, area, iscrowd.
        left_out: what is wrong with each annotation that was left out.
        digest: of the file's content.
    """

    file: Path
    folder: Path
    images: list[Record]
    categories: list[Record]
    annotations: dict[int, list[Record]]
    left_out: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def instances(self) -> int:
        """Annotations in all."""
        return sum(len(of) for of in self.annotations.values())

    def annotated(self) -> CocoSet:
        """Without the images that have no annotation to learn from; crowds are none."""
        chosen = [image for image in self.images if any(not a["iscrowd"] for a in self.annotations[image["id"]])]
        if not chosen:
            raise InputError(f"{self.file} has no annotation to learn from")
        return replace(self, images=chosen)

    def load(self, i: int) -> Instances:
        """Image i with its annotations, without crowds; InputError if it cannot be read or has another size."""
        record = self.images[i]
        height, width = record["height"], record["width"]
        path = self.folder / record["file_name"]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the image {path}: {error.strerror}") from error
        image = decode(content, str(path)).convert("RGB")
        if image.size != (width, height):
            found = f"{image.width} x {image.height}"
            raise InputError(f"{path} is {found}, but {self.file} says {width} x {height}: annotations would not fit")
        things = [annotation for annotation in self.annotations[record["id"]] if not annotation["iscrowd"]]
        labels = {category["id"]: label for label, category in enumerate(self.categories, 1)}
        boxes = torch.tensor([clipped(thing["bbox"], width, height) for thing in things], dtype=torch.float32)
        masks = [decoded(thing["segmentation"], height, width) for thing in things]
        return Instances(
            torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(),
            boxes.reshape(-1, 4),
            torch.tensor([labels[thing["category_id"]] for thing in things], dtype=torch.int64),
            torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8),
        )


def require() -> None:
    """InputError if the package that this needs is missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise InputError("COCO's masks and AP need pycocotools, not installed here: pip install 'dspnet-fast[detect]'")


def read(file: Path, folder: Path, max_bad: int | None = None) -> CocoSet:
    """Read and check a set.

    Args:
        file: the annotations, JSON with images, annotations and categories.
        folder: where the images' file_name begins.
        max_bad: annotations that may be left out because their box or mask is wrong [1 in 1,000 of all].

    Raises InputError, which names what is wrong by its id, if the set is damaged or more annotations are wrong.
    """
    require()
    content, digest = _parsed(file)
    wrong: list[str] = []
    images, categories, annotations = (_records(file, content, key) for key in ("images", "categories", "annotations"))
    for what, records in (("image", images), ("category", categories), ("annotation", annotations)):
        wrong += _repeated(what, records)
    _refuse(file, wrong)
    wrong += [
        f"image {image['id']}: width and height are {image.get('width')!r} and {image.get('height')!r}"
        for image in images
        if not all(is_whole(image.get(side)) and image[side] > 0 for side in ("width", "height"))
    ]
    names = Counter(category.get("name") for category in categories)
    wrong += [
        f"category {category['id']} has the name {category.get('name')!r}, which is none or not its own"
        for category in categories
        if not isinstance(category.get("name"), str) or names[category["name"]] > 1
    ]
    if not images or not categories:
        wrong.append("there is no image" if not images else "there is no category")
    _refuse(file, wrong)
    _refuse(file, list(_missing(images, folder)), f"not in {folder}: ")
    by_id = {image["id"]: image for image in images}
    known = {category["id"] for category in categories}
    for annotation in annotations:
        if annotation.get("image_id") not in by_id:
            wrong.append(f"annotation {annotation['id']}: image {annotation.get('image_id')!r} is none of the images")
        elif annotation.get("category_id") not in known:
            wrong.append(
                f"annotation {annotation['id']}: category {annotation.get('category_id')!r} is none of the categories"
            )
    _refuse(file, wrong)
    kept, left_out = _shaped(annotations, by_id)
    limit = len(annotations) // 1000 if max_bad is None else max_bad
    if len(left_out) > limit:
        _refuse(file, left_out, f"{limit:,} wrong annotations may be left out (--max-bad-annotations): ")
    return CocoSet(
        file, folder, images, sorted(categories, key=lambda category: category["id"]), kept, left_out, digest
    )


def _parsed(file: Path) -> tuple[Record, str]:
    print(f"reading {file}", flush=True)  # COCO's own takes a while
    try:
        text = file.read_bytes()
        content = json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read the annotations {file}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not in COCO's format: it holds no object with images, annotations and categories")
    return content, hashlib.blake2b(text, digest_size=8).hexdigest()


def _records(file: Path, content: Record, key: str) -> list[Record]:
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(r, dict) and is_whole(r.get("id")) for r in records):
        raise InputError(f"{file} is not in COCO's format: {key} must be a list of objects, each with a whole id")
    return records


def _repeated(what: str, records: list[Record]) -> Iterator[str]:
    seen: set[int] = set()
    for record in records:
        if record["id"] in seen:
            yield f"the id of {what} {record['id']} is used more than once"
        seen.add(record["id"])


def _missing(images: list[Record], folder: Path) -> Iterator[str]:
    for image in images:
        name = image.get("file_name")
        if not isinstance(name, str) or not (folder / name).is_file():
            yield f"{name} of image {image['id']}"


def _refuse(file: Path, wrong: list[str], what: str = "") -> None:
    """Raise InputError if anything is wrong; names the first few."""
    if wrong:
        others = f"; and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
        raise InputError(f"{file}: {len(wrong):,} wrong: {what}{'; '.join(wrong[:NAMED])}{others}")


def _shaped(annotations: list[Record], images: dict[int, Record]) -> tuple[dict[int, list[Record]], list[str]]:
    """Annotations by image, with area and iscrowd filled in, and what is wrong with the others."""
    kept: dict[int, list[Record]] = {image: [] for image in images}
    wrong = []
    with Monitor("annotations", -(-len(annotations) // CHECKED_AT_ONCE)) as monitor:
        for place, annotation in enumerate(annotations, 1):
            image = images[annotation["image_id"]]
            size = image["height"], image["width"]
            problem = box_problem(annotation.get("bbox"), *size) or mask_problem(annotation.get("segmentation"), *size)
            if problem:
                wrong.append(f"annotation {annotation['id']}: {problem}")
            else:
                kept[image["id"]].append(_completed(annotation, *size))
            if place % CHECKED_AT_ONCE == 0 or place == len(annotations):
                monitor.advance()
                monitor.status(f"{place:,} checked")
    return kept, wrong


def _completed(annotation: Record, height: int, width: int) -> Record:
    from pycocotools import mask

    made = {"iscrowd": 0, **annotation}
    if "area" not in made:
        made["area"] = float(mask.area(encoded(made["segmentation"], height, width)))
    return made
