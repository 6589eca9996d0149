"""Image files as arrays of the values that they store, without conversion to 8 bits or three channels."""

from __future__ import annotations

import importlib
import importlib.util
import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .decoders import reading, unreadable
from .depth import PNM, TIFF_BITS, bits_per_sample

ARRAYS = (".npy",) + (".dcm",) * (importlib.util.find_spec("pydicom") is not None)  # endings
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PHOTOMETRIC, ORIENTATION, SAMPLES_PER_PIXEL, EXTRA_SAMPLES, SAMPLE_FORMAT = 262, 274, 277, 338, 339  # TIFF's tags
UNSIGNED, SIGNED = 1, 2  # values of SAMPLE_FORMAT
DECODERS = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode", "AVIF": "avif_decode"}  # functions of imagecodecs

Decoded = tuple[np.ndarray, int]  # values [H, W, C], and the number of channels that are not transparency


def is_array(file: str) -> bool:
    """Whether a file holds values without a colour model, by its ending."""
    return file.lower().endswith(ARRAYS)


def is_eight_bit(content: bytes, file: str) -> bool:
    """Whether an image is 8-bit grey or colour, by its header; also for a damaged file, which is reported later."""
    if is_array(file):
        return False
    try:
        with Image.open(io.BytesIO(content)) as image:
            if bits_per_sample(image, content) > 8:
                return False
            if image.format == "TIFF":
                pages_are_channels = getattr(image, "n_frames", 1) > 1 and len(image.getbands()) == 1
                return image.mode != "RGBX" and not pages_are_channels and not _pillow_misreads(image)
            return image.mode[0] not in "IF"
    except UnidentifiedImageError:
        return not content.startswith(TIFF)
    except Exception:  # decoders raise many types of exceptions for broken files
        return True


def decode_array(content: bytes, file: str) -> Decoded:
    """Decode an image.

    Args:
        content: of the file: an image of any depth, TIFF pages or .npy with one channel each, or DICOM.
        file: the name of the file, which tells .npy and DICOM from images, and for the error message.

    Returns:
        The values, [H, W, C] in the file's dtype, and the number of channels without transparency.

    Raises:
        InputError: the file is no image, is damaged, or has values that are not finite.
    """
    reading(file)
    try:
        values, colours = _decode(content, file)
        if values.dtype.kind not in "uif" or values.ndim != 3 or not values.size:
            raise ValueError(f"{values.dtype} of shape {list(values.shape)} is no image")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
        return values.astype(values.dtype.newbyteorder("="), copy=False), colours
    except Exception as error:  # decoders raise many types of exceptions for broken files
        raise unreadable(file, content, error) from error


def _decode(content: bytes, file: str) -> Decoded:
    if file.lower().endswith(".npy"):
        return _npy(content)
    if is_array(file):
        return _dicom(content)
    if content.startswith(TIFF):
        return _tiff(content)
    with Image.open(io.BytesIO(content)) as image:
        # Pillow keeps all bits of a single grey channel, and 8 of others.
        deep = bits_per_sample(image, content) > 8 and image.mode[0] != "I"
        return _deep_colours(image, content) if deep else _of_pillow(image)


def _deep_colours(image: Image.Image, content: bytes) -> Decoded:
    """Colours, or grey with transparency, of more than 8 bits."""
    if image.format == "PPM":
        header = PNM.match(content)
        assert header is not None
        width, height, stored = int(header[2]), int(header[3]), content[header.end() :]
        if header[1] == b"3":  # numbers as text
            return np.array([int(number) for number in stored.split()], np.uint16).reshape(height, width, 3), 3
        return np.frombuffer(stored, ">u2", height * width * 3).reshape(height, width, 3), 3
    if image.format == "HEIF":  # already turned
        opened = _package("pillow_heif").open_heif(io.BytesIO(content), convert_hdr_to_8bit=False, hdr_to_16bit=False)
        values = np.asarray(opened)
    else:
        decoded = getattr(_package("imagecodecs"), DECODERS[image.format or ""])(content)
        values = _turned(decoded, image.getexif().get(ORIENTATION, 1))
    values = values[..., None] if values.ndim == 2 else values
    return values, values.shape[-1] - (values.shape[-1] % 2 == 0)


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Values [H, W, ...] turned and mirrored as EXIF's orientation says."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    values = values[::-1] if orientation in (3, 4, 7, 8) else values
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            "its colours have more than 8 bits, or it has more than 4 samples: pip install 'dspnet-fast[images]'"
        ) from error


def _npy(content: bytes) -> Decoded:
    """[H, W], [H, W, C] or [C, H, W]: the smaller of the first and the last axis is the channels."""
    values = np.load(io.BytesIO(content), allow_pickle=False)
    if values.ndim not in (2, 3):
        raise ValueError(f"{values.dtype} of shape {list(values.shape)} is no image")
    if values.ndim == 3 and values.shape[0] < values.shape[2]:
        values = values.transpose(1, 2, 0)
    values = values[..., None] if values.ndim == 2 else values
    return values.astype(np.uint8) if values.dtype == bool else values, values.shape[-1]


def _dicom(content: bytes) -> Decoded:
    """The stored values by the file's modality function (Hounsfield units in CT), bright where the image is bright."""
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(content))
    values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = values.max() + values.min() - values
    if int(dataset.get("NumberOfFrames", 1)) > 1:
        raise ValueError("it has several frames")
    values = values[..., None] if values.ndim == 2 else values
    return values, values.shape[-1]


def _tiff(content: bytes) -> Decoded:
    """All pages of one grey channel and one size, or the first page."""
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        return _by_tifffile(content)
    with image:
        samples = image.tag_v2.get(SAMPLES_PER_PIXEL, 1)  # type: ignore[attr-defined]
        bits = bits_per_sample(image, content)
        if samples > 4 or (samples > 1 and bits > 8) or _pillow_misreads(image):
            return _by_tifffile(content)
        first, *others = (_page(image, page) for page in range(getattr(image, "n_frames", 1)))
        if others and all(values.shape == first[0].shape and colours == 1 for values, colours in (first, *others)):
            values = np.concatenate([first[0], *(values for values, _ in others)], axis=-1)
            return values, values.shape[-1]
        return first


def _pillow_misreads(image: Any) -> bool:
    """Whether Pillow would wrap signed 8-bit or unsigned 32-bit values, or drop a second channel as transparency."""
    tags = image.tag_v2
    bits, kind = max(tags.get(TIFF_BITS, (1,))), max(tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
    two_channels = tags.get(SAMPLES_PER_PIXEL, 1) == 2 and tags.get(EXTRA_SAMPLES, (0,))[0] == 0
    return two_channels or (bits, kind) in ((8, SIGNED), (32, UNSIGNED))


def _page(image: Image.Image, page: int) -> Decoded:
    image.seek(page)
    values, colours = _of_pillow(image)
    white_is_zero = image.tag_v2.get(PHOTOMETRIC) == 0  # type: ignore[attr-defined]
    if white_is_zero and values.dtype == np.uint16:  # Pillow inverts 8 bits itself
        values = np.iinfo(values.dtype).max - values
    return values, colours


def _by_tifffile(content: bytes) -> Decoded:
    """Several samples above 8 bits, and other layouts that Pillow cannot read."""
    with _package("tifffile").TiffFile(io.BytesIO(content)) as tiff:
        series, extra = tiff.series[0], tiff.pages[0].extrasamples
        values, axes = series.asarray(), series.axes
        orientation = int(tiff.pages[0].tags.valueof(ORIENTATION, 1))
    if not {"Y", "X"} <= set(axes):
        raise ValueError(f"its axes are {axes}, not height and width")
    values = np.moveaxis(values, (axes.index("Y"), axes.index("X")), (0, 1))
    values = _turned(values.reshape(*values.shape[:2], -1), orientation)
    return values, values.shape[-1] - sum(kind != 0 for kind in extra)  # 0: no transparency


def _of_pillow(image: Image.Image) -> Decoded:
    image = ImageOps.exif_transpose(image)
    transparent = image.mode in ("LA", "La", "RGBA", "RGBa")
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode[0] not in "IFL" and image.mode not in ("RGB", "RGBX") and not transparent:
        image = image.convert("RGB")
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    return values, values.shape[-1] - transparent
