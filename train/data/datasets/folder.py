"""Image folders in all usual layouts, which `open_images` describes.

Pretraining needs no labels, so an image folder is refused only if it has no images, or if its splits contradict each
other. Everything that is left out is counted in the dataset's `note`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from dspnet_fast.errors import InputError

from .folder_files import EXTENSIONS, Walk, describe_left_out, entries, folders, is_image, split_of, without_arrays
from .images import decode, held_out

# Folders of annotated datasets (VOC, YOLO, Roboflow), in lower case.
IMAGE_FOLDERS = ("images", "jpegimages", "imgs")
ANNOTATION_FOLDERS = ("labels", "annotations", "imagesets", "masks", "segmentationclass", "segmentationobject")

Split = Literal["train", "test"]


class FolderDataset:
    """A dataset of image files, read and decoded on access.

    Args:
        name: of the dataset.
        files: paths of the images.
        labels: the class of each image, or None.
        classes: names of the classes.
        note: left-out files with the reason, or an empty string.
    """

    def __init__(
        self, name: str, files: list[str], labels: list[int] | None, classes: list[str], note: str = ""
    ) -> None:
        self.name = name
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        self.classes = classes
        self.note = note
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def load(self, i: int) -> Image.Image:
        return decode(self.encoded(i), self._files[i])

    def encoded(self, i: int) -> bytes:
        path = self._files[i]
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise InputError(f"cannot read the image {path}: {error.strerror}") from error

    def file(self, i: int) -> str:
        return self._files[i]


@dataclass
class Listing:
    """Image files of a folder, by class or without classes, and notes about them."""

    by_class: dict[str, list[str]]
    files: list[str]
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.by_class or self.files)


def open_folder(path: Path, split: Split, unlabelled: bool = False) -> FolderDataset:
    """Open one split of an image folder.

    Raises:
        InputError: there are no images, no training split, or the classes of the splits differ.
    """
    root = _content(path)
    splits, others = _splits(root)
    train, test = splits.get("train"), splits.get("test") or splits.get("val")
    if train is None and test is not None:
        raise InputError(f"{root} has a folder {test.name} but no folder train: add {root / 'train'}")
    if train is None:
        return _part(path, _list(root, unlabelled), split)
    unlabelled = unlabelled or _content(train) != train
    listing = _list(_content(train), unlabelled)
    unused = [folder.name for folder in (*others, *splits.values()) if folder not in (train, test)]
    if unused:
        listing.notes.append(f"not used: {', '.join(unused[:3])}{' and others' if unused[3:] else ''}")
    if test is None:
        return _part(path, listing, split)
    if split == "train":
        return _dataset(path, listing)
    testing = _list(_content(test), unlabelled)
    _check_classes(train, listing, test, testing)
    return _dataset(path, testing)


def open_files(paths: Sequence[str | os.PathLike[str]], split: Split = "train") -> FolderDataset:
    """Open images without labels: image files, and folders, of which all images at any depth are taken by path.

    Args:
        paths: files and folders.
        split: "train" for all images, "test" for every tenth of them.

    Raises:
        InputError: a path does not exist, or there are no images.
    """
    walk = Walk()
    files: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist: give images, or a folder of images")
        files += walk.files(path) if path.is_dir() else [str(path)]
    if not files:
        raise InputError(f"no images in {', '.join(map(str, paths))} (image files end in {' '.join(EXTENSIONS)})")
    listing = Listing({}, files, _left_out(walk))
    return _part(Path("the given images"), listing, split)


def open_list(path: Path, split: Split) -> FolderDataset:
    """Open the images of a list: a text file with one image or folder per line, relative to the list's folder."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise InputError(f"{path} is empty: write one image or folder per line")
    return open_files([path.parent / name for name in names], split)


def _list(root: Path, unlabelled: bool) -> Listing:
    """Image files by class folder; in one list if there are no classes, or `unlabelled`."""
    loose = sorted(entry.path for entry in entries(root) if entry.is_file() and is_image(entry.name))
    classes = folders(root)
    if unlabelled or not classes:
        walk = Walk()
        files = walk.files(root)
        if not files:
            raise _no_images(root)
        return Listing({}, files, _left_out(walk))
    walk = Walk(root)
    by_class = dict(zip((folder.name for folder in classes), walk.lists(classes), strict=True))
    notes = []
    if loose:
        if not any(by_class.values()):
            (loose,) = without_arrays([loose], walk.left_out)
            return Listing({}, loose, _left_out(walk))
        notes.append(f"{len(loose)} images beside the class folders are left out (--unlabelled takes them)")
    if empty := [name for name, files in by_class.items() if not files]:
        notes.append(f"{', '.join(empty[:3])}{' and others' if empty[3:] else ''}: folder without images, no class")
    by_class = {name: files for name, files in by_class.items() if files}
    if not by_class:
        raise _no_images(root)
    return Listing(by_class, [], notes + _left_out(walk))


def _part(path: Path, listing: Listing, split: Split) -> FolderDataset:
    """A split of a folder without splits, see `held_out`.

    Without classes, all images are training images, and every tenth of the same is a test image: no accuracy can be
    measured without labels.
    """
    files, notes = listing.files, listing.notes
    if len(listing.by_class) > 1 and all(len(files) == 1 for files in listing.by_class.values()):
        files = [file for files in listing.by_class.values() for file in files]
        notes = [*notes, "every folder has one image, so folders are no classes"]
    if files:
        return _dataset(path, Listing({}, files if split == "train" else files[::10], notes))
    rare = [name for name, files in listing.by_class.items() if len(files) < 2]
    notes = [*notes, *(f"the class {name} has one image, which is a training image" for name in rare[:3])]
    by_class = {}
    for name, files in listing.by_class.items():
        test = held_out(len(files))
        by_class[name] = [file for i, file in enumerate(files) if (i in test) == (split == "test")]
    return _dataset(path, Listing(by_class, [], notes))


def _dataset(path: Path, listing: Listing) -> FolderDataset:
    note = "; ".join(listing.notes)
    if not listing.by_class:
        return FolderDataset(str(path), listing.files, None, [], note)
    classes = list(listing.by_class)
    labels = [label for label, name in enumerate(classes) for _ in listing.by_class[name]]
    files = [file for name in classes for file in listing.by_class[name]]
    return FolderDataset(str(path), files, labels, classes, note)


def _splits(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """Folders of splits by name, and all other folders. A lone `train` among other folders is a class."""
    inside = folders(root)
    found: dict[str, list[Path]] = {}
    for folder in inside:
        if (name := split_of(folder.name)) is not None:
            found.setdefault(name, []).append(folder)
    others = [folder for folder in inside if split_of(folder.name) is None]
    if others and len(found) == 1:
        return {}, inside
    for several in found.values():
        if len(several) > 1:
            names = " and ".join(folder.name for folder in several)
            raise InputError(f"{root} has the folders {names}: give one of them, or a list of folders, as --data")
    return {name: several[0] for name, several in found.items()}, others


def _content(path: Path) -> Path:
    """The folder of the images: in an annotated dataset its folder `images`, otherwise the folder itself.

    Also inside a single subfolder, as archives make it.
    """
    inside = folders(path)
    if len(inside) == 1 and not any(is_image(entry.name) for entry in entries(path)):
        inner = _content(inside[0])
        if inner != inside[0] or any(split_of(folder.name) for folder in folders(inner)):
            return inner
    images = [folder for folder in inside if folder.name.lower() in IMAGE_FOLDERS]
    others = [folder for folder in inside if folder not in images and folder.name.lower() not in ANNOTATION_FOLDERS]
    return images[0] if len(images) == 1 and len(inside) > 1 and not others else path


def _check_classes(train: Path, training: Listing, test: Path, testing: Listing) -> None:
    """Raise InputError if the test split has other classes than the training split."""
    expected, found = set(training.by_class), set(testing.by_class)
    for here, there, names in ((train, test, expected - found), (test, train, found - expected)):
        if names:
            raise InputError(f"the class {min(names)!r} is in {here} but not in {there}: give both the same classes")


def _left_out(walk: Walk) -> list[str]:
    phrases = list(describe_left_out(walk.left_out.items()))
    return [f"left out: {', '.join(phrases)}"] if phrases else []


def _no_images(path: Path) -> InputError:
    return InputError(f"{path} holds no images: image files end in {' '.join(EXTENSIONS)}")
