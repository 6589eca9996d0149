"""The interface of image datasets, and the decoding of images of any mode to greyscale or RGB."""

import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from dspnet_fast.errors import InputError

from ...run.fingerprint import digest
from .decoders import note, reading, unreadable
from .depth import bits_per_sample
from .pixels import RescaledImage

UPPER_BITS = "image of more than 8 bits read with its upper 8 bits, see --pixel-range"

Loaded = Image.Image | RescaledImage


class ImageDataset(Protocol):
    """Images in a fixed order.

    Attributes:
        name: of the dataset, for messages.
        labels: int64 [N], indices into `classes`; None for a dataset without labels.
        classes: names of the classes; empty without labels.
        note: left-out files with the reason, or an empty string.
    """

    name: str
    labels: torch.Tensor | None
    classes: list[str]
    note: str

    def __len__(self) -> int: ...

    def load(self, i: int) -> Loaded:
        """Return image i, in mode "L" or "RGB" or rescaled; raise InputError if it cannot be read."""
        ...

    def encoded(self, i: int) -> bytes:
        """Return image i encoded in a format that Pillow reads; raise InputError if it cannot be read."""
        ...

    def file(self, i: int) -> str:
        """Return the path or another name of image i, for messages."""
        ...


class ArrayDataset:
    """Images of one size in memory.

    Args:
        name: of the dataset.
        source: of the images, for messages.
        pixels: uint8 [N, H, W] (greyscale) or [N, H, W, 3] (RGB).
        labels: int64 [N].
        classes: names of the classes.
    """

    note = ""

    def __init__(self, name: str, source: str, pixels: np.ndarray, labels: torch.Tensor, classes: list[str]):
        self.name = name
        self.labels: torch.Tensor | None = labels
        self.classes = classes
        self._source = source
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._pixels[i])

    def encoded(self, i: int) -> bytes:
        return encode_pnm(self.load(i))

    def file(self, i: int) -> str:
        return f"image {i} of {self._source}"


class Subset:
    """The images of a dataset at `indices`, in this order."""

    def __init__(self, images: ImageDataset, indices: Sequence[int]):
        self.name = images.name
        self.classes = images.classes
        self.note = images.note
        self.labels = None if images.labels is None else images.labels[torch.as_tensor(indices, dtype=torch.int64)]
        self._images = images
        self._indices = list(indices)

    @classmethod
    def random(cls, images: ImageDataset, count: int, seed: int) -> "Subset":
        """Choose `count` images without replacement; raise InputError if the dataset has fewer."""
        if not 1 <= count <= len(images):
            raise InputError(
                f"a subset of {count} of the {len(images)} images of {images.name}: give 1 to {len(images)}"
            )
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return cls(images, drawn[:count].tolist())

    @classmethod
    def up_to(cls, count: int, images: ImageDataset, seed: int = 0) -> "Subset":
        """Choose `count` images without replacement, or all if there are fewer."""
        return cls.random(images, min(count, len(images)), seed)

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, i: int) -> Loaded:
        return self._images.load(self._indices[i])

    def encoded(self, i: int) -> bytes:
        return self._images.encoded(self._indices[i])

    def file(self, i: int) -> str:
        return self._images.file(self._indices[i])


def held_out(count: int) -> range:
    """Indices of the test images among the images of a class: every tenth, at most a tenth of them but at least one.

    A class of one image has no test image.
    """
    return range(0, count, 10)[: max(1, count // 10) if count > 1 else 0]


def require_labels(images: ImageDataset) -> torch.Tensor:
    """Return the labels, int64 [N]; raise InputError if the dataset has none."""
    if images.labels is None:
        raise InputError(f"{images.name} has no labels: sort its images into one folder per class, DIR/<class>/*")
    return images.labels


def dataset_digest(images: ImageDataset) -> str:
    """Return a digest of the names of a dataset's files, in order, and of its labels. The files are not read."""
    labels = [] if images.labels is None else [images.labels]
    return digest(*(images.file(i) for i in range(len(images))), *labels)


def decode(content: bytes, file: str, turn: bool = True) -> Image.Image:
    """Decode an image and rotate it by its EXIF orientation; of an animation the first frame.

    Args:
        content: of the file.
        file: the name of the file, for the error message.
        turn: whether to apply the orientation.

    Returns:
        An image in mode "L" or "RGB".

    Raises:
        InputError: the file is no image, is damaged, or has more pixels than Pillow considers safe.
    """
    reading(file)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if turn:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] not in "IF" and bits_per_sample(image, content) > 8:
                note(UPPER_BITS)
            return to_grey_or_rgb(image)
    except Exception as error:  # decoders raise many types of exceptions for broken files
        raise unreadable(file, content, error) from error


def encode_pnm(image: Image.Image) -> bytes:
    """Encode an image in mode "L" or "RGB" as a PGM or PPM file, which is a header and the pixels."""
    kind = b"P5" if image.mode == "L" else b"P6"
    return kind + b" %d %d 255\n" % image.size + image.tobytes()


def to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Decode an image and convert it to mode "L" or "RGB".

    Single-channel modes become "L" (of 16 bits the upper 8), all others "RGB"; transparency is dropped.

    Raises:
        ValueError: the range of the values is unknown: 32-bit floats, and 32-bit integers above 16 bits.
    """
    if image.mode in ("L", "RGB"):
        image.load()
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode.startswith("I"):  # 16-bit PNG: "I" in older Pillow, "I;16" in newer; convert("L") would clip it
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integers have no known range; convert it to 8 or 16 bits")
        note(UPPER_BITS)
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point numbers have no known range; convert it to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # avoids a warning of Pillow about transparent palettes
    return image.convert("RGB")
