"""Image folders in all usual layouts, which `open_images` describes.

Pretraining needs no labels, so an image folder is refused only if it has no images, or if its splits contradict each
other. Everything that is left out is counted in the dataset's `note`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from dspnet_fast.errors import InputError

from .folder_files import (
    EXTENSIONS,
    IMAGE_FOLDERS,
    Walk,
    describe_left_out,
    ending,
    entries,
    file_identity,
    folders,
    is_annotation,
    is_image,
)
from .folder_layout import (
    check_classes,
    class_names,
    class_notes,
    content,
    has_images,
    has_loose_images,
    numbered_parts,
    splits,
)
from .images import decode, held_out

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
    root = path if unlabelled else content(path)
    found, others = splits(root)
    train = found.get("train")
    if train is None and found:
        alone = next(iter(found.values()))
        raise InputError(
            f"{root} has a folder {alone.name} but no folder train: give {alone}, to train on these images"
        )
    inner = root if train is None else content(train, in_split=True)
    listing = _list(inner, unlabelled, _files_between(path, inner))
    if train is None:
        if len(listing.by_class) == 1 and not has_loose_images(inner):  # no label
            listing = Listing({}, next(iter(listing.by_class.values())), listing.notes)
        return _part(path, listing, split)
    unused = [folder.name for folder in others if has_images(folder)]
    test: Path | None = None
    for name in ("test", "val"):
        if name not in found:
            continue
        if test is not None:
            unused.append(found[name].name)
        elif reason := _unusable(found[name], listing.by_class):
            unused.append(f"{found[name].name} ({reason})")
        else:
            test = found[name]
    if unused:
        listing.notes.append(f"not used: {', '.join(unused[:3])}{' and others' if unused[3:] else ''}")
    if test is None:
        return _part(path, listing, split)
    if split == "train":
        return _dataset(path, listing)
    testing = _list(content(test, True, listing.by_class), unlabelled or not listing.by_class)
    _check_classes(train, listing, test, testing)
    return _dataset(path, testing)


def _unusable(test: Path, classes: Collection[str]) -> str:
    """Why a folder is no test split; empty if it is one. Published test images often have no labels."""
    if not has_images(test):
        return "no images"
    return "without these classes" if classes and not class_names(content(test, True, classes)) & set(classes) else ""


def _files_between(path: Path, inner: Path) -> Counter[str]:
    """What is left out in the folders from `path` down to the parent of `inner`: files by ending, and masks."""
    found: Counter[str] = Counter()
    while inner != path:
        if inner.name.lower() in IMAGE_FOLDERS:
            beside = [folder.name for folder in folders(inner.parent) if is_annotation(folder.name)]
            found.update(f"folders {name} beside images" for name in beside)
        inner = inner.parent
        found += _endings(inner)
    return found


def _endings(folder: Path) -> Counter[str]:
    """Number of files that are no images, by ending."""
    return Counter(ending(entry.name) for entry in entries(folder) if entry.is_file() and not is_image(entry.name))


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
    """Open the images of a list: a text file with one image or folder per line, relative to the list's folder.

    A label after a name is not used. Images that are listed twice are met once.

    Raises:
        InputError: a line names no image or folder, or there are no images.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    walk, files, met, labels = Walk(), [], set(), 0
    for number, line in enumerate(content.decode(encoding, errors="surrogateescape").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _listed(line.strip(), path.parent)
        if found is None:
            raise InputError(f"{path}, line {number}: {line.strip()} does not exist: give images, or folders of images")
        labels += found[1]
        if found[0].is_file() and found[0].suffix and not is_image(found[0].name):
            walk.left_out[ending(found[0].name)] += 1
            continue
        for file in walk.files(found[0]) if found[0].is_dir() else [str(found[0])]:
            if (identity := file_identity(file)) in met:
                walk.left_out["files met before"] += 1
            else:
                met.add(identity)
                files.append(file)
    if not files:
        raise InputError(f"{path} lists no images: write one image or folder per line")
    notes = _left_out(walk) + ([f"labels of {path.name} are not used"] if labels else [])
    return _part(path, Listing({}, files, notes), split)


def _listed(line: str, folder: Path) -> tuple[Path, bool] | None:
    """The path that a line of a list names, and whether a label follows it; None if it does not exist."""
    before_labels = (re.sub(r"[,\s]+[^,\s/]+$", "", line), re.split(r"[,\s]", line)[0])
    names = [(line, False), (line.replace("\\", "/"), False), *((name, True) for name in before_labels if name != line)]
    for name, labelled in [(name.strip("\"'"), labelled) for name, labelled in names]:
        path = folder / Path(name).expanduser()
        if path.exists():
            return path, labelled
    return None


def _list(root: Path, unlabelled: bool, beside: Counter[str] | None = None) -> Listing:
    """Image files by class folder; in one list if there are no classes, or `unlabelled`.

    Args:
        root: the folder.
        unlabelled: whether subfolders are no classes.
        beside: files that are left out already, by ending.
    """
    walk = Walk()
    walk.left_out.update(beside or {})
    classes = folders(root)
    if not unlabelled and numbered_parts(classes) and any(map(has_images, classes)):
        return _merged(list(filter(has_images, classes)), walk)
    check_classes(root, [] if unlabelled else classes)
    if unlabelled or not any(map(has_images, classes)):
        files = walk.files(root)
        if not files:
            raise _no_images(root, walk)
        return Listing({}, files, _left_out(walk))
    walk = Walk(root)
    walk.left_out.update((beside or Counter()) + _endings(root))
    by_class = dict(zip((folder.name for folder in classes), walk.lists(classes), strict=True))
    notes = []
    if loose := sum(is_image(entry.name) and entry.is_file() for entry in entries(root)):
        notes.append(f"{loose} images beside the class folders are left out (--unlabelled takes them)")
    if empty := [name for name, files in by_class.items() if not files]:
        notes.append(f"{', '.join(empty[:3])}{' and others' if empty[3:] else ''}: folder without images, no class")
    by_class = {name: files for name, files in by_class.items() if files}
    if not by_class:
        raise _no_images(root, walk)
    return Listing(by_class, [], notes + class_notes(by_class, classes) + _left_out(walk))


def _merged(parts: list[Path], walk: Walk) -> Listing:
    """The images of numbered parts, by the classes that all parts have together."""
    inner = [content(part, in_split=True) for part in parts]
    names = f"{parts[0].name} to {parts[-1].name} are parts, no classes"
    if any(has_loose_images(part) for part in inner):
        files = [file for found in walk.lists(inner) for file in found]
        return Listing({}, files, [names, *_left_out(walk)])
    classes = [folder for part in inner for folder in folders(part)]
    by_class: dict[str, list[str]] = {}
    for folder, files in sorted(zip(classes, walk.lists(classes), strict=True), key=lambda pair: pair[0].name):
        if files:
            by_class.setdefault(folder.name, []).extend(files)
    return Listing(by_class, [], [names, *_left_out(walk)])


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


def _check_classes(train: Path, training: Listing, test: Path, testing: Listing) -> None:
    """Raise InputError if the test split has other classes than the training split."""
    expected, found = set(training.by_class), set(testing.by_class)
    for here, there, names in ((train, test, expected - found), (test, train, found - expected)):
        if names:
            raise InputError(f"the class {min(names)!r} is in {here} but not in {there}: give both the same classes")


def _left_out(walk: Walk) -> list[str]:
    phrases = list(describe_left_out(walk.left_out.items()))
    return [f"left out: {', '.join(phrases)}"] if phrases else []


def _no_images(path: Path, walk: Walk) -> InputError:
    found = ", ".join(describe_left_out(walk.left_out.items()))
    return InputError(f"{path} holds no images{found and f', but {found}'}: image files end in {' '.join(EXTENSIONS)}")
