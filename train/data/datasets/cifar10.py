"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 RGB images of 32 x 32 pixels, 10 classes.

Its "python version" is a folder of pickles. A pickle can run any code when it is loaded, so these are read by an
unpickler that knows nothing but numpy arrays.
"""

import io
import logging
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from dspnet_fast.errors import InputError

from .folder import FolderImages, open_folder
from .images import ArrayImages

NAME = "cifar10"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_RECONSTRUCT = np.empty(0).__reduce__()[0]
ARRAYS_NEED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # its name in the published files
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # its name since numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
MD5 = {"train": dict(CIFAR10.train_list), "test": dict(CIFAR10.test_list)}


def open_set(split: Literal["train", "test"], data: Path, download: bool) -> ArrayImages | FolderImages:
    """One split from the data folder (the published batches, or an image folder `cifar10`), else downloaded."""
    batches = data / CIFAR10.base_folder
    for folder in (batches, data / NAME / CIFAR10.base_folder):
        if folder.is_dir():
            return _open_batches(folder, split)
    if (data / NAME).is_dir():
        return open_folder(data / NAME, split)
    if not download:
        raise _nowhere(data, "not found, and downloading is off")
    logging.getLogger(__name__).info("downloading %s into %s", NAME, data)
    try:
        download_and_extract_archive(CIFAR10.url, str(data), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise _nowhere(data, " ".join(str(error).split())) from error
    return _open_batches(batches, split)


def _nowhere(data: Path, reason: str) -> InputError:
    return InputError(
        f"no {NAME} ({reason}): put the folder {CIFAR10.base_folder}, or an image folder called {NAME}, into {data}, "
        "or allow the download on a machine with a network"
    )


def _open_batches(folder: Path, split: str) -> ArrayImages:
    for name, md5 in MD5[split].items():
        if not check_integrity(str(folder / name), md5):
            raise InputError(f"{folder / name} is missing or not the published file: delete {folder} to get it anew")
    batches = [read_batch(folder / name) for name in MD5[split]]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    labels = torch.tensor([label for _, labels in batches for label in labels], dtype=torch.int64)
    return ArrayImages(NAME, f"{NAME}'s {split} split", pixels, labels, list(CLASSES))


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Pixels, uint8 [N, 32, 32, 3], and N labels of one batch file. InputError for anything else, code included."""
    try:
        # latin1: the files come from Python 2, whose strings hold the arrays' bytes
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        pixels, labels = batch["data"], batch["labels"]
        if pixels.dtype != np.uint8 or len(pixels) != len(labels) or not set(labels) <= set(range(len(CLASSES))):
            raise ValueError("not bytes with as many labels from 0 to 9")
        return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels
    except Exception as error:  # what a damaged pickle raises is not specified
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no batch of {NAME} ({reason}): delete {path.parent} to get it anew") from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS_NEED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return ARRAYS_NEED[module, name]
