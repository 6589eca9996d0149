"""Open an image dataset by name or path."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dspnet_fast.errors import InputError

from . import cifar10, fashion_mnist, folder, webdataset
from .images import ImageDataset, require_labels


@dataclass(frozen=True)
class DatasetSize:
    """The size of a dataset.

    Attributes:
        train: images of the training split.
        test: images of the test split.
        local: whether the images were counted on this machine; otherwise the numbers are the published ones.
    """

    train: int
    test: int
    local: bool = False


NAMED_DATASETS = {fashion_mnist.NAME: fashion_mnist.open_dataset, cifar10.NAME: cifar10.open_dataset}
# for dry runs without the images; a folder is looked up by its last component
PUBLISHED_SIZES = {
    fashion_mnist.NAME: DatasetSize(60_000, 10_000),
    cifar10.NAME: DatasetSize(50_000, 10_000),
    "imagenet": DatasetSize(1_281_167, 50_000),
}


def data_folder() -> Path:
    """Return the folder of the named datasets: the environment variable DSPNET_DATA, else ./data."""
    return Path(os.environ.get("DSPNET_DATA") or "data")


def open_images(
    name: str, split: Literal["train", "test"], download: bool = True, unlabelled: bool = False
) -> ImageDataset:
    """Open one split of an image dataset.

    An image folder has one of three layouts. Hidden files are ignored, and images are in sorted order.

    - `DIR/train/<class>/*` and `DIR/test/<class>/*`, or `DIR/train/*` without classes. Other usual names of splits,
      such as Training, train2017, val, valid or test_set, are recognised. Without a test split, the training folder is
      split as in the next layout.
    - `DIR/<class>/*`: every 10th image of each class, at most a tenth of them, is the test split, the others are the
      training split.
    - `DIR/*`, images without classes: labels are None and the training split has all images. The test split is every
      10th of the same images, as no accuracy can be measured without labels.

    Datasets with annotations (VOC, YOLO, Roboflow) are opened as images without classes. A list is a text file with an
    image or a folder per line.

    Shards are WebDataset tar files, given by a pattern such as `DIR/{000..015}.tar` or by their folder. The shards in
    the subfolder `test` are the test split, or shards whose names or folders mean one, such as `val-000.tar`; without
    them the images are split as in folders, by their labels.

    Args:
        name: `fashion-mnist`, `cifar10`, the path of an image folder or of a list `*.txt`, or shards.
        split: which split to open.
        download: whether to download a named dataset that is not on this machine into the data folder.
        unlabelled: take the images of a folder at any depth, whose subfolders are no classes.

    Raises:
        InputError: the dataset does not exist or has another layout.
    """
    if name in NAMED_DATASETS:
        return NAMED_DATASETS[name](split, data_folder(), download)
    if name.endswith(".tar"):
        return webdataset.open_shards(name, split)
    if name.endswith((".tar.gz", ".tgz")):
        raise InputError(f"{name} is compressed with gzip: decompress it, images in shards are read by offset")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        return folder.open_list(path, split)
    if path.is_file():
        raise InputError(
            f"{path} is a file: give a folder of images, a list LIST.txt of images and folders, or shards *.tar "
            "(unpack other archives, and export tables that contain images as files)"
        )
    if not path.is_dir():
        raise InputError(
            f"no image dataset {name!r}: give {', '.join(NAMED_DATASETS)}, shards or an existing folder "
            f"(looked for {path.absolute()})"
        )
    if (shards := webdataset.open_folder_of_shards(path, split)) is not None:
        return shards
    return folder.open_folder(path, split, unlabelled)


def exists_locally(name: str) -> bool:
    """Whether the folder of a dataset exists on this machine; its layout may still be wrong."""
    path = Path(name).expanduser()
    return (path.parent if name.endswith(".tar") else path).exists()


def dataset_size(name: str, labelled: bool = True) -> DatasetSize:
    """Return the size of a dataset: counted if it is on this machine, else the published one.

    Args:
        name: as in `open_images`.
        labelled: whether a dataset without labels is an error.

    Raises:
        InputError: the dataset is neither on this machine nor in `PUBLISHED_SIZES`, or lacks labels.
    """
    try:
        train, test = open_images(name, "train", download=False), open_images(name, "test", download=False)
    except InputError:
        published = PUBLISHED_SIZES.get(Path(name).name)
        if published is None or exists_locally(name):
            raise
        return published
    if labelled:
        require_labels(train)
    return DatasetSize(len(train), len(test), local=True)
