"""Images with masks, which give the class of every pixel: PNG files with class indices, or COCO's polygons.

`open_masked` describes the layouts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from dspnet_fast.errors import InputError

from . import coco
from .coco_shapes import decode_mask
from .decoders import unreadable
from .folder import FolderDataset
from .folder_files import IMAGE_FOLDERS, Walk, describe_left_out, folders, is_annotation
from .folder_layout import has_images, splits
from .images import ImageDataset, held_out

UNKNOWN = 255  # label of the pixels whose class is unknown
ALL = "all"  # the split of a folder without splits
INDEX_MODES = ("1", "L", "P", "I")  # first part of Pillow's modes of one channel of integers
VOC_LISTS = Path("ImageSets/Segmentation")
LAYOUT = (
    "give a folder with images/ and masks/ in train/ and val/, or with train/ and val/ in images/ and masks/, and name "
    "another folder of masks with --masks"
)
_OTHER_MASKS = re.compile(r"object|instance|depth|dispar")  # folders of other annotations, such as SegmentationObject
_LABELS = re.compile(r"[ _-](gtfine_label(train)?ids|masks?|seg(mentation)?s?|labels?|gt)([ _-]?\d+)?$", re.IGNORECASE)
_PHOTO = re.compile(r"[ _-](leftimg8bit|image|img|rgb)$", re.IGNORECASE)


class MaskedImages(Protocol):
    """Images with masks.

    Attributes:
        images: the images, without labels.
        names: names of classes by index; empty if the masks state none.
    """

    images: ImageDataset
    names: dict[int, str]

    def mask(self, i: int) -> np.ndarray:
        """Return the class indices of image i, int32 [H, W]; raise InputError if they are no mask of the image."""
        ...


class MaskFiles:
    """Images with a mask file for each of them.

    Args:
        images: the images.
        masks: paths of their masks.
    """

    def __init__(self, images: ImageDataset, masks: Sequence[str]) -> None:
        self.images, self.masks = images, list(masks)
        self.names: dict[int, str] = {}

    def mask(self, i: int) -> np.ndarray:
        """The values of the file."""
        file, (width, height) = self.masks[i], self.images.load(i).size
        values = read_mask(file)
        if values.shape != (height, width):
            raise InputError(
                f"the mask {file} is {values.shape[1]} x {values.shape[0]} pixels, and its image "
                f"{self.images.file(i)} is {width} x {height}: give masks of the size of their images"
            )
        return values


class CocoMasks:
    """The annotations of a dataset in COCO's format as masks: smaller instances cover larger ones, 0 is background."""

    def __init__(self, name: str, records: coco.CocoDataset) -> None:
        files = [str(records.folder / image["file_name"]) for image in records.images]
        self.images: ImageDataset = FolderDataset(name, files, None, [])
        self.names = {0: "background"} | {k: one["name"] for k, one in enumerate(records.categories, 1)}
        self._records = records

    def mask(self, i: int) -> np.ndarray:
        """The labels of the annotations; crowds are UNKNOWN."""
        record, instances = self._records.images[i], self._records.load(i)
        values = np.zeros((record["height"], record["width"]), np.int32)
        for one in self._records.annotations[record["id"]]:
            if one["iscrowd"]:
                values[decode_mask(one["segmentation"], *values.shape) > 0] = UNKNOWN
        assert instances.masks is not None
        shapes = instances.masks.numpy() > 0
        for k in np.argsort([-shape.sum() for shape in shapes], kind="stable"):
            values[shapes[k]] = int(instances.labels[k])
        return values


def read_mask(file: str) -> np.ndarray:
    """The class indices in a mask file, int32 [H, W].

    Raises:
        InputError: the file cannot be read, is a JPEG, or has colours.
    """
    content = b""
    try:
        content = Path(file).read_bytes()
        with Image.open(file) as image:
            kind, mode, values = image.format, image.mode, np.array(image)
    except Exception as error:  # decoders raise many types of exceptions for broken files
        raise unreadable(file, content, error) from error
    if kind in ("JPEG", "MPO"):
        raise InputError(f"the mask {file} is a JPEG, which changes the indices of classes: save masks as PNG")
    if mode.partition(";")[0] not in INDEX_MODES:
        raise InputError(
            f"the mask {file} has colours ({mode}), not the index of a class in every pixel: convert the colours to "
            "indices, and save masks as grey or palette PNG"
        )
    return values.astype(np.int32)


def open_masked(name: str, split: Literal["train", "test"], masks: str = "") -> MaskedImages:
    """Open one split of images with masks.

    A folder of images (`images`, `JPEGImages`, `leftImg8bit`, ...) lies beside a folder of masks (`masks`, `labels`,
    `annotations`, `SegmentationClass`, `gtFine`, ...); both are in folders of splits, or have folders of splits. VOC
    has lists of its splits. The validation split is the test split, because published masks of test images are empty;
    without either, every 10th image is a test image. The mask of `x.jpg` is `x.png`, or `x` with an ending such as
    `_mask` or `_gtFine_labelIds`, in the same subfolder. In COCO's layout masks are drawn from the annotations.

    Args:
        name: the folder.
        split: which split to open.
        masks: name of the folder of masks [recognised].

    Raises:
        InputError: the folder has another layout, or images lack masks.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise InputError(f"--data {name} is no folder: {LAYOUT}")
    root = path
    while not (places := _places(root, masks)):
        inside = folders(root)
        files = coco.places(root)
        if all(file.is_file() for file, _ in files):
            return CocoMasks(name, coco.read(*files[split == "test"]))
        if len(inside) != 1:
            raise InputError(f"{path} has no images beside masks: {LAYOUT}")
        root = inside[0]
    test = next((kind for kind in ("val", "test") if kind in places), None)
    chosen = places.get("train") if split == "train" or test is None else places[test]
    chosen = chosen or places.get(ALL)
    if chosen is None:
        raise InputError(f"{root} has masks of {' and '.join(places)}, and none of a training split: {LAYOUT}")
    found, note = _pairs(*chosen, _listed(root, split))
    if test is None and not _listed(root, split):
        tests = held_out(len(found))
        found = [pair for i, pair in enumerate(found) if (i in tests) == (split == "test")]
    return MaskFiles(FolderDataset(name, [image for image, _ in found], None, [], note), [mask for _, mask in found])


def _places(root: Path, name: str) -> dict[str, tuple[Path, Path]]:
    """Folders of images and of their masks by split; empty if there are none."""
    if (pair := _beside(root, name)) is not None:
        images, masks = (splits(folder)[0] for folder in pair)
        return {kind: (images[kind], masks[kind]) for kind in images if kind in masks} or {ALL: pair}
    found = {kind: _beside(folder, name) for kind, folder in splits(root)[0].items()}
    return {kind: pair for kind, pair in found.items() if pair is not None}


def _beside(folder: Path, name: str) -> tuple[Path, Path] | None:
    """The folder of images and the folder of masks in a folder."""
    inside = folders(folder)
    images = [one for one in inside if one.name.lower() in IMAGE_FOLDERS]
    masks = [
        one
        for one in inside
        if (one.name == name if name else is_annotation(one.name) and not _OTHER_MASKS.search(one.name.lower()))
        and has_images(one)
    ]
    for several in (images, masks):
        if images and masks and len(several) > 1:
            names = " and ".join(one.name for one in several)
            raise InputError(f"{folder} has the folders {names}: name the folder of masks with --masks, or move others")
    return (images[0], masks[0]) if images and masks else None


def _listed(root: Path, split: str) -> set[str]:
    """Names of the images of a split in VOC's lists; empty if there are none."""
    lists = [root / VOC_LISTS / f"{kind}.txt" for kind in ("train", "val")]
    return set(lists[split == "test"].read_text().split()) if all(file.is_file() for file in lists) else set()


def _pairs(images: Path, masks: Path, listed: set[str]) -> tuple[list[tuple[str, str]], str]:
    """Paths of the images, those in a list if it is not empty, and of their masks; and a note about files left out."""
    walk = Walk()
    photos, labels = walk.files(images), Walk().files(masks)
    if listed:
        photos = [file for file in photos if Path(file).stem in listed]
    found: dict[str, list[str]] = {}
    for parts in (True, False):  # files in the same subfolders, or in different ones
        by_name: dict[str, list[str]] = {}
        for file in labels:
            by_name.setdefault(_name(file, masks, _LABELS, parts), []).append(file)
        found = {file: by_name.get(_name(file, images, _PHOTO, parts), []) for file in photos}
        if any(found.values()):
            break
    if missing := [file for file, candidates in found.items() if not candidates]:
        raise InputError(
            f"{len(missing):,} of {len(found):,} images have no mask in {masks}, such as {missing[0]}: give each image "
            "a PNG of its name, or take it out"
        )
    if not found:
        raise InputError(f"no images in {images} are listed in {VOC_LISTS}" if listed else f"no images in {images}")
    pairs = []
    for file, candidates in found.items():
        best = [one for one in candidates if "trainids" in one.lower()] or candidates
        if len(best) > 1:
            raise InputError(f"{file} has several masks: {', '.join(best[:3])}; leave one of them")
        pairs.append((file, best[0]))
    left_out = ", ".join(describe_left_out(walk.left_out.items()))
    return pairs, f"left out: {left_out}" if left_out else ""


def _name(file: str, folder: Path, ending: re.Pattern[str], parts: bool) -> str:
    """What a file has in common with its image or mask: the path without the ending, or its last part."""
    stem = ending.sub("", os.path.splitext(os.path.relpath(file, folder))[0])
    return stem if parts else os.path.basename(stem)
