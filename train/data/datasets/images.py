"""What a set of images is to the rest of the code, and how one image in whatever mode becomes greyscale or RGB."""

import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from dspnet_fast.errors import InputError

from ...run.fingerprint import digest


class ImageSet(Protocol):
    """Images in a fixed order. `labels` is an int64 tensor [N] of indices into `classes`, or None (and no classes)."""

    name: str
    labels: torch.Tensor | None
    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, i: int) -> Image.Image:
        """Image i, in mode "L" or "RGB"; InputError if it cannot be read."""
        ...

    def encoded(self, i: int) -> bytes:
        """The file that image i is, in a format that Pillow reads; InputError if there is none."""
        ...

    def file(self, i: int) -> str:
        """Where image i comes from, for messages."""
        ...


class ArrayImages:
    """Images of one size held in memory: uint8 [N, H, W] (greyscale) or [N, H, W, 3] (RGB)."""

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
        return as_pnm(self.load(i))

    def file(self, i: int) -> str:
        return f"image {i} of {self._source}"


class Subset:
    """Some images of a set, in the given order."""

    def __init__(self, images: ImageSet, indices: Sequence[int]):
        self.name = images.name
        self.classes = images.classes
        self.labels = None if images.labels is None else images.labels[torch.as_tensor(indices)]
        self._images = images
        self._indices = list(indices)

    @classmethod
    def random(cls, images: ImageSet, count: int, seed: int) -> "Subset":
        """`count` images drawn without replacement; InputError if the set has fewer."""
        if not 1 <= count <= len(images):
            raise InputError(f"{count} images out of the {len(images)} of {images.name}: give 1 to {len(images)}")
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return cls(images, drawn[:count].tolist())

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, i: int) -> Image.Image:
        return self._images.load(self._indices[i])

    def encoded(self, i: int) -> bytes:
        return self._images.encoded(self._indices[i])

    def file(self, i: int) -> str:
        return self._images.file(self._indices[i])


def require_labels(images: ImageSet) -> torch.Tensor:
    """The labels [N], or an InputError if the set has none."""
    if images.labels is None:
        raise InputError(f"{images.name} has no labels: sort its images into one folder per class, DIR/<class>/*")
    return images.labels


def digest_of(images: ImageSet) -> str:
    """Of a set's files, in their order, and labels; not of what the files hold, which only reading them all tells."""
    labels = [] if images.labels is None else [images.labels]
    return digest(*(images.file(i) for i in range(len(images))), *labels)


def decode(content: bytes, file: str) -> Image.Image:
    """The image in a file's content as "L" or "RGB", turned the way its EXIF data says; of an animation the first one.

    InputError, which names `file`, if there is none, or one of more pixels than Pillow thinks safe.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return to_grey_or_rgb(image)
    except Exception as error:  # decoders meet broken files with a dozen types of exception
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the image {file}: repair it or take it out ({reason})") from error


def as_pnm(image: Image.Image) -> bytes:
    """An image in mode "L" or "RGB" as a PGM or PPM file: a header before its pixels."""
    kind = b"P5" if image.mode == "L" else b"P6"
    return kind + b" %d %d 255\n" % image.size + image.tobytes()


def to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """The image as "L" or "RGB", decoded.

    Single-channel modes become "L" (16 bits keep their upper 8), all others "RGB"; transparency is dropped. Raises
    ValueError for numbers without a known range: 32-bit float, and 32-bit integer beyond 16 bits.
    """
    if image.mode in ("L", "RGB"):
        image.load()
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode.startswith("I"):  # a 16-bit PNG is "I" to older Pillow, "I;16" to newer; convert("L") would clip it
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integers have no known range; convert it to 8 or 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point numbers have no known range; convert it to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when a transparent palette is converted in one go
    return image.convert("RGB")
