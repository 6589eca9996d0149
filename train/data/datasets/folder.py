"""Image folders, with or without one subfolder per class. `open_images` describes the layouts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from dspnet_fast.errors import InputError

from .images import decode

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val")


class FolderDataset:
    """A dataset of image files, read and decoded on access.

    Args:
        name: of the dataset.
        files: paths of the images.
        labels: the class of each image, or None.
        classes: names of the classes.
    """

    def __init__(self, name: str, files: list[str], labels: list[int] | None, classes: list[str]):
        self.name = name
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        self.classes = classes
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


def open_folder(path: Path, split: Literal["train", "test"]) -> FolderDataset:
    """Open one split of an image folder; raise InputError if it has no images or none of the layouts."""
    train = path / "train"
    test = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if train.is_dir():
        if split == "train":
            return _images(path, _listing(train))
        if test is None:
            raise InputError(f"{path} has a folder train but no folder test: add {path / 'test'}")
        return _images(path, _same_classes(train, test))
    if test is not None:
        raise InputError(f"{path} has a folder {test.name} but no folder train: add {train}")
    listing = _listing(path)
    if isinstance(listing, list):
        return _images(path, listing if split == "train" else listing[::10])
    for name, files in listing.items():
        if len(files) < 2:
            raise InputError(f"the class {path / name} has one image, but both splits need one: add another")
    return _images(path, {name: _tenths(files, split) for name, files in listing.items()})


def open_files(paths: Sequence[str | os.PathLike[str]]) -> FolderDataset:
    """Open images without labels: image files, and folders, of which all images at any depth are taken by path.

    Raises InputError for a path that does not exist, and if there are no images.
    """
    files: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist: give images, or a folder of images")
        files += _walk(path) if path.is_dir() else [str(path)]
    if not files:
        raise InputError(f"no images in {', '.join(map(str, paths))} (image files end in {' '.join(EXTENSIONS)})")
    return FolderDataset("the given images", files, None, [])


def _tenths(files: list[str], split: Literal["train", "test"]) -> list[str]:
    return files[::10] if split == "test" else [file for i, file in enumerate(files) if i % 10]


def _images(path: Path, listing: dict[str, list[str]] | list[str]) -> FolderDataset:
    if isinstance(listing, list):
        return FolderDataset(str(path), listing, None, [])
    classes = list(listing)
    labels = [label for label, name in enumerate(classes) for _ in listing[name]]
    return FolderDataset(str(path), [file for name in classes for file in listing[name]], labels, classes)


def _same_classes(train: Path, test: Path) -> dict[str, list[str]] | list[str]:
    """List the test folder; raise InputError if its classes differ from those of the training split."""
    listing, expected = _listing(test), _classes(train)
    found = [] if isinstance(listing, list) else list(listing)
    for here, there, names in ((train, test, set(expected) - set(found)), (test, train, set(found) - set(expected))):
        if names:
            raise InputError(f"the class {min(names)!r} is in {here} but not in {there}: give both the same classes")
    return listing


def _listing(path: Path) -> dict[str, list[str]] | list[str]:
    """Sorted image files by class, classes sorted, or one list if there are no classes."""
    loose = sorted(entry.path for entry in os.scandir(path) if entry.is_file() and _is_image(entry.name))
    classes = _classes(path)
    if loose and classes:
        raise InputError(
            f"{path} has images ({Path(loose[0]).name}) beside class folders ({classes[0]}): keep one of the two"
        )
    if loose:
        return loose
    listing = {name: _walk(path / name) for name in classes}
    for folder in [path / name for name, files in listing.items() if not files] or ([] if listing else [path]):
        raise InputError(f"{folder} holds no images: add some or remove it (image files end in {' '.join(EXTENSIONS)})")
    return listing


def _classes(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _walk(path: Path) -> list[str]:
    """Image files in a folder and all its subfolders, sorted by path."""
    files = []
    for folder, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [os.path.join(folder, name) for name in names if _is_image(name)]
    return sorted(files)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)
