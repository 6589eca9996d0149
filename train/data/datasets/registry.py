"""Find a set of images by name or path."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dspnet_fast.errors import InputError

from . import cifar10, fashion_mnist, folder, webdataset
from .images import ImageSet, require_labels


@dataclass(frozen=True)
class SetSize:
    """Images of both splits of a set; `here` if they were counted on this machine."""

    train: int
    test: int
    here: bool = False


NAMED = {fashion_mnist.NAME: fashion_mnist.open_set, cifar10.NAME: cifar10.open_set}
# as published, so that an experiment can be planned without the images; a folder is known by its own name
PUBLISHED = {
    fashion_mnist.NAME: SetSize(60_000, 10_000),
    cifar10.NAME: SetSize(50_000, 10_000),
    "imagenet": SetSize(1_281_167, 50_000),
}


def data_folder() -> Path:
    """Where named sets are looked for and downloaded to: the environment variable DSPNET_DATA, else ./data."""
    return Path(os.environ.get("DSPNET_DATA") or "data")


def open_images(name: str, split: Literal["train", "test"], download: bool = True) -> ImageSet:
    """Open one split of a set of images: `fashion-mnist`, `cifar10`, the path of an image folder, or shards.

    A folder is one of three things (hidden files are ignored, everything is in sorted order):

    - `DIR/train/<class>/*` and `DIR/test/<class>/*`, or without classes: `DIR/train/*`. `val` will do for `test`.
    - `DIR/<class>/*`: of each class every 10th image, from the first on, is the test split and the rest is train.
    - `DIR/*`, images without classes: labels are None, train is all of them. Nothing can be held out for an accuracy,
      so test is every 10th of the same images.

    Shards are WebDataset tar files, named by a pattern such as `DIR/{000..015}.tar` or by their folder. The shards in
    its subfolder `test` are the test split; without one they are split as folders are, by their labels.

    With `download`, a named set that is not on this machine is fetched into the data folder. Raises InputError when
    there is no such set, or when it is not laid out in one of these ways.
    """
    if name in NAMED:
        return NAMED[name](split, data_folder(), download)
    if name.endswith(".tar"):
        return webdataset.open_shards(name, split)
    path = Path(name).expanduser()
    if not path.is_dir():
        raise InputError(
            f"no set of images {name!r}: give {', '.join(NAMED)}, shards or an existing folder "
            f"(looked for {path.absolute()})"
        )
    if webdataset.is_folder_of_shards(path):
        return webdataset.open_shards(f"{path}/*.tar", split)
    return folder.open_folder(path, split)


def is_here(name: str) -> bool:
    """Whether the folder of such a path is on this machine: if it is and cannot be opened, it is not laid out right."""
    path = Path(name).expanduser()
    return (path.parent if name.endswith(".tar") else path).exists()


def size_of(name: str, labelled: bool = True) -> SetSize:
    """How large a set is: counted if it is on this machine, as published if it is not but has a known name.

    InputError if neither is possible, or if the set is to be `labelled` and is not.
    """
    try:
        train, test = open_images(name, "train", download=False), open_images(name, "test", download=False)
    except InputError:
        published = PUBLISHED.get(Path(name).name)
        if published is None or is_here(name):
            raise
        return published
    if labelled:
        require_labels(train)
    return SetSize(len(train), len(test), here=True)
