"""Datasets with boxes and masks in COCO's format: DIR/annotations/NAME.json and a folder of images.

`read` validates all annotations before the training and reports each error. A dataset with missing files or with ids
that are duplicate or refer to nothing is refused. Annotations with an invalid box or mask are left out, up to a limit;
COCO's own training annotations have a few of them.
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
from PIL import Image
from torch import Tensor

from dspnet_fast.errors import InputError

from ...run.progress import Monitor
from .coco_records import convert, crowd_problem, integer, unused_root
from .coco_shapes import (
    Record,
    box_is_relative,
    box_problem,
    clip_box,
    decode_mask,
    encode_mask,
    is_integer,
    mask_problem,
)
from .decoders import describe_content, unreadable
from .images import decode

MAX_REPORTED = 10  # invalid annotations listed in a message
TRAIN, VAL = ("instances_train2017", "train2017"), ("instances_val2017", "val2017")  # COCO's annotations and images
ROBOFLOW = "_annotations.coco.json"
CHECKED_AT_ONCE = 1000


class Instances(NamedTuple):
    """An image and its annotated instances.

    Attributes:
        image: uint8 [3, H, W].
        boxes: float32 [n, 4], left, top, right, bottom in pixels.
        labels: int64 [n], from 1; 0 is the background.
        masks: uint8 [n, H, W]; None for boxes alone.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None


@dataclass(frozen=True)
class CocoDataset:
    """A validated dataset.

    Attributes:
        file: path of the annotations.
        folder: of the images.
        images: records with id, file_name, width and height, in the order of the file.
        categories: records with id and name, sorted by id; label k is the k-th of them, counted from 1.
        annotations: records with id, category_id, bbox, segmentation, area and iscrowd, by image id.
        left_out: an error message for each annotation that was left out.
        boxes_only: whether masks are ignored.
        digest: of the file's content.
    """

    file: Path
    folder: Path
    images: list[Record]
    categories: list[Record]
    annotations: dict[int, list[Record]]
    left_out: list[str]
    digest: str
    boxes_only: bool = False

    def __len__(self) -> int:
        return len(self.images)

    @property
    def instances(self) -> int:
        """The number of annotations."""
        return sum(len(records) for records in self.annotations.values())

    def annotated(self) -> CocoDataset:
        """Drop the images that have no annotation but crowds; raise InputError if none is left."""
        chosen = [image for image in self.images if any(not a["iscrowd"] for a in self.annotations[image["id"]])]
        if not self.instances:
            raise InputError(f"{self.file} has no annotations: export the set with them")
        if not chosen:
            raise InputError(
                f"{self.file} has no annotation but crowds, which are not trained on: if these are single objects, as "
                "CVAT exports masks that were drawn by brush, give --crowds-as-objects"
            )
        return replace(self, images=chosen)

    def load(self, i: int) -> Instances:
        """Load image i with its annotations except crowds; raise InputError if it is unreadable or has another size."""
        record = self.images[i]
        height, width = record["height"], record["width"]
        path = self.folder / record["file_name"]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the image {path}: {error.strerror}") from error
        image = decode(content, str(path)).convert("RGB")
        if image.size != (width, height):  # of a tool that ignores EXIF's orientation
            image = decode(content, str(path), turn=False).convert("RGB")
        if image.size != (width, height):
            raise InputError(f"{path} is no longer {width} x {height} pixels: the annotations do not match")
        annotations = [annotation for annotation in self.annotations[record["id"]] if not annotation["iscrowd"]]
        labels = {category["id"]: label for label, category in enumerate(self.categories, 1)}
        boxes = torch.tensor(
            [clip_box(annotation["bbox"], width, height) for annotation in annotations], dtype=torch.float32
        )
        masks = [decode_mask(one["segmentation"], height, width) for one in annotations if not self.boxes_only]
        return Instances(
            torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(),
            boxes.reshape(-1, 4),
            torch.tensor([labels[annotation["category_id"]] for annotation in annotations], dtype=torch.int64),
            None if self.boxes_only else _stacked(masks, height, width),
        )


def _stacked(masks: list[np.ndarray], height: int, width: int) -> Tensor:
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)


def require_pycocotools() -> None:
    """Raise InputError if pycocotools is not installed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise InputError("COCO's masks and AP need pycocotools: pip install 'dspnet-fast[detect]'")


def places(
    root: Path, train: tuple[str, str] = TRAIN, val: tuple[str, str] = VAL
) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """Annotations and folder of images of the training and of the test set, in COCO's or Roboflow's layout.

    Args:
        root: folder of the dataset.
        train: in COCO's layout, the NAME in annotations/NAME.json and the folder of the images of the training set.
        val: likewise of the test set.

    Raises:
        InputError: Roboflow's layout lacks a test set.
    """
    if not (root / "annotations").is_dir() and (root / "train" / ROBOFLOW).is_file():
        tests = [root / name for name in ("valid", "test") if (root / name / ROBOFLOW).is_file()]
        if not tests:
            raise InputError(f"{root} has train/{ROBOFLOW}, but none in valid/ or test/: export a test split too")
        return (root / "train" / ROBOFLOW, root / "train"), (tests[0] / ROBOFLOW, tests[0])
    first, second = ((root / "annotations" / f"{name}.json", root / images) for name, images in (train, val))
    return first, second


def read(
    file: Path,
    folder: Path,
    max_bad: int | None = None,
    boxes_only: bool = False,
    crowds_as_objects: bool = False,
) -> CocoDataset:
    """Read and validate a dataset.

    Args:
        file: the annotations, JSON with images, annotations and categories.
        folder: of the images; their file_name is relative to it.
        max_bad: how many annotations with an invalid box or mask may be left out; by default 1 in 1,000.
        boxes_only: ignore masks, which annotations need not have.
        crowds_as_objects: treat every annotation as a single object, whatever its iscrowd says.

    Raises:
        InputError: the dataset is damaged or has more invalid annotations; the message lists their ids.
    """
    require_pycocotools()
    content, digest = _parse(file)
    wrong: list[str] = []
    images, categories, annotations = (_records(file, content, key) for key in ("images", "categories", "annotations"))
    convert(images, "images")
    convert(categories, "categories")
    convert(annotations, "annotations", crowds_as_objects)
    if (root := unused_root(categories, annotations)) is not None:
        categories = [category for category in categories if category is not root]
        print(f"left out of {file.name}: the category {root['name']!r}, the root of others, which no annotation has")
    if annotations and not boxes_only and not any(one["segmentation"] for one in annotations):
        raise InputError(f"{file} has boxes without masks: give --boxes-only, which trains Faster R-CNN")
    for what, records in (("image", images), ("category", categories), ("annotation", annotations)):
        wrong += _repeated_ids(what, records)
    _raise_if_any(file, wrong)
    wrong += [
        f"image {image['id']}: width and height are {image.get('width')!r} and {image.get('height')!r}"
        for image in images
        if not all(is_integer(image.get(side)) and image[side] > 0 for side in ("width", "height"))
    ]
    names = Counter(str(category.get("name")) for category in categories)
    wrong += [
        f"category {category['id']} has the name {category.get('name')!r}, which is missing or not unique"
        for category in categories
        if not isinstance(category.get("name"), str) or names[category["name"]] > 1
    ]
    if not images or not categories:
        wrong.append("there is no image" if not images else "there is no category")
    _raise_if_any(file, wrong)
    _leave_out_folders(images, folder)
    _raise_if_any(file, list(_missing_files(images, folder)), f"not in {folder}: ")
    _raise_if_any(file, list(_repeated_files(images)))
    _raise_if_any(file, list(_wrong_sizes(images, folder)))
    by_id = {image["id"]: image for image in images}
    known = {category["id"] for category in categories}
    for annotation in annotations:
        if not is_integer(annotation.get("image_id")) or annotation["image_id"] not in by_id:
            wrong.append(f"annotation {annotation['id']}: image {annotation.get('image_id')!r} is not in images")
        elif not is_integer(annotation.get("category_id")) or annotation["category_id"] not in known:
            wrong.append(
                f"annotation {annotation['id']}: category {annotation.get('category_id')!r} is not in categories"
            )
    _raise_if_any(file, wrong)
    if annotations and all(box_is_relative(one.get("bbox")) for one in annotations):
        raise InputError(f"{file}: all boxes are below 1, as fractions of the image are: COCO's boxes are in pixels")
    kept, left_out = _valid_annotations(annotations, by_id, boxes_only)
    limit = len(annotations) // 1000 if max_bad is None else max_bad
    if len(left_out) > limit:
        _raise_if_any(file, left_out, f"--max-bad-annotations allows {limit:,}: ")
    return CocoDataset(
        file,
        folder,
        images,
        sorted(categories, key=lambda category: category["id"]),
        kept,
        left_out,
        digest,
        boxes_only,
    )


def _parse(file: Path) -> tuple[Record, str]:
    print(f"reading {file}", flush=True)  # takes a while for COCO
    try:
        text = file.read_bytes()
        content = json.loads(text)
    except OSError as error:
        others = ", ".join(path.stem for path in sorted(file.parent.glob("*.json"))[:5])
        hint = f"; give --train-annotations and --val-annotations, of {others}" if others else ""
        raise InputError(f"cannot read the annotations {file}: {error.strerror}{hint}") from error
    except (ValueError, RecursionError) as error:
        start = text[:512]
        what = "" if start.lstrip().startswith(b"{") else describe_content(start)
        raise InputError(f"{file} is {what or f'not JSON: {error}'}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file} is not in COCO's format: it must be an object with images, annotations and categories"
        )
    return content, hashlib.blake2b(text, digest_size=8).hexdigest()


def _records(file: Path, content: Record, key: str) -> list[Record]:
    records = content.get(key)
    wrong = ""
    if isinstance(records, list):
        if key == "annotations" and not any(isinstance(r, dict) and "id" in r for r in records):
            records = [{**r, "id": i} if isinstance(r, dict) else r for i, r in enumerate(records, 1)]
        bad = [r for r in records if not (isinstance(r, dict) and is_integer(integer(r.get("id"))))]
        if not bad:
            return records
        wrong = f", not {str(bad[0])[:80]}"
    raise InputError(f"{file} is not in COCO's format: {key} must be a list of objects, each with an integer id{wrong}")


def _repeated_ids(what: str, records: list[Record]) -> Iterator[str]:
    seen: set[int] = set()
    for record in records:
        if record["id"] in seen:
            yield f"the id of {what} {record['id']} is used more than once"
        seen.add(record["id"])


def _leave_out_folders(images: list[Record], folder: Path) -> None:
    """Take the last part of file names such as `images/0.jpg` or those of Windows, if that is unique and exists."""
    whole = [str(image.get("file_name")) for image in images]
    last = [name.replace("\\", "/").rsplit("/", 1)[-1] for name in whole]
    if last == whole or len(set(last)) < len(set(whole)) or any((folder / name).is_file() for name in whole[:1]):
        return
    if all((folder / name).is_file() for name in last):
        print(f"folders in file_name are left out, as in {whole[0]}: the images are in {folder}", flush=True)
        for image, name in zip(images, last, strict=True):
            image["file_name"] = name


def _repeated_files(images: list[Record]) -> Iterator[str]:
    first: dict[str, int] = {}
    for image in images:
        if (other := first.setdefault(image["file_name"], image["id"])) != image["id"]:
            yield f"images {other} and {image['id']} have the same file {image['file_name']}"


def _missing_files(images: list[Record], folder: Path) -> Iterator[str]:
    for image in images:
        name = image.get("file_name")
        if not isinstance(name, str) or not (folder / name).is_file():
            yield f"{name} of image {image['id']}"


def _wrong_sizes(images: list[Record], folder: Path) -> Iterator[str]:
    """Error messages for images of other sizes than their records say, with or without EXIF's orientation."""
    with Monitor("images", -(-len(images) // CHECKED_AT_ONCE)) as monitor:
        for place, record in enumerate(images, 1):
            size = record["width"], record["height"]
            try:
                with Image.open(folder / record["file_name"]) as image:
                    found = image.size
            except Exception as error:  # decoders raise many types of exceptions for broken files
                path = folder / record["file_name"]
                yield f"image {record['id']}: {unreadable(str(path), _start(path), error)}"
            else:
                if size not in (found, found[::-1]):
                    yield f"{record['file_name']} is {found[0]} x {found[1]}, but its record says {size[0]} x {size[1]}"
            if place % CHECKED_AT_ONCE == 0 or place == len(images):
                monitor.advance()
                monitor.status(f"{place:,} checked")


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _raise_if_any(file: Path, wrong: list[str], what: str = "") -> None:
    """Raise InputError if `wrong` has messages; list the first few."""
    if wrong:
        others = f"; and {len(wrong) - MAX_REPORTED:,} more" if len(wrong) > MAX_REPORTED else ""
        raise InputError(f"{file}: {len(wrong):,} errors: {what}{'; '.join(wrong[:MAX_REPORTED])}{others}")


def _valid_annotations(
    annotations: list[Record], images: dict[int, Record], boxes_only: bool
) -> tuple[dict[int, list[Record]], list[str]]:
    """Valid annotations by image id, with areas added, and an error message for each of the others."""
    kept: dict[int, list[Record]] = {image: [] for image in images}
    wrong = []
    with Monitor("annotations", -(-len(annotations) // CHECKED_AT_ONCE)) as monitor:
        for place, annotation in enumerate(annotations, 1):
            image = images[annotation["image_id"]]
            size = image["height"], image["width"]
            problem = crowd_problem(annotation) or box_problem(annotation.get("bbox"), *size)
            if not problem and not boxes_only:
                problem = mask_problem(annotation["segmentation"], *size)
            if problem:
                wrong.append(f"annotation {annotation['id']}: {problem}")
            else:
                kept[image["id"]].append(_with_area(annotation, *size, boxes_only))
            if place % CHECKED_AT_ONCE == 0 or place == len(annotations):
                monitor.advance()
                monitor.status(f"{place:,} checked")
    return kept, wrong


def _with_area(annotation: Record, height: int, width: int, boxes_only: bool) -> Record:
    from pycocotools import mask

    if "area" in annotation:
        return annotation
    left, top, right, bottom = clip_box(annotation["bbox"], width, height)
    area = (right - left) * (bottom - top)
    if not boxes_only:
        area = float(mask.area(encode_mask(annotation["segmentation"], height, width)))
    return {**annotation, "area": area}
