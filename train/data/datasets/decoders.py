"""Errors and warnings of image decoders: errors name the fault of a file, warnings are gathered and printed once."""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
import warnings
from typing import Any

from PIL import Image, ImageFile

from dspnet_fast.errors import InputError

from .depth import jpeg_bits

LFS = b"version https://git-lfs"
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
HEIC = re.compile(rb"ftyp(heic|heix|heim|heis|hevc|hevx|hevm|hevs|mif1|msf1)")  # after 4 bytes
# Start of other files, after offset, and what they are. Phones and editors write them with the ending .jpg too.
KINDS = (
    (4, HEIC, "HEIC, damaged" if HAS_HEIF else "HEIC: pip install pillow-heif"),
    (4, re.compile(rb"ftypavif"), "AVIF, which this Pillow cannot read: pip install --upgrade pillow"),
    (4, re.compile(rb"ftyp"), "a video: take it out"),
    (0, re.compile(rb"RIFF....AVI ", re.DOTALL), "a video: take it out"),
    (0, re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "JPEG XL: convert it to JPEG or PNG"),
    (0, re.compile(rb"8BPS"), "a file of Photoshop: export it as PNG"),
    (0, re.compile(rb"%PDF"), "PDF: export its pages as PNG"),
    (128, re.compile(rb"DICM"), "DICOM: let its name end in .dcm, and pip install 'dspnet-fast[dicom]'"),
    (0, re.compile(rb"\x93NUMPY"), "an array of numpy: let its name end in .npy"),
    (0, re.compile(rb"\x00\x05\x16[\x00\x07]"), "macOS's attributes of another file: take it out"),
    (
        0,
        re.compile(rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd"),
        "an archive: unpack it",
    ),
)
PACKAGES = re.compile(r"[/\\](PIL|tifffile|imagecodecs|pydicom|pillow_heif)[/\\]")  # in the path of a module

_gathered: list[tuple[str, str]] = []  # file and text, of this process
_reading = threading.local()  # .file: the file that this thread decodes


def unreadable(file: str, content: bytes, error: Exception) -> InputError:
    """The error for an image that a decoder refuses."""
    own = content.startswith(b"\x93NUMPY") if file.lower().endswith(".npy") else file.lower().endswith(".dcm")
    if not own and (what := describe_content(content)):
        return InputError(f"cannot read the image {file}: it is {what}")
    reason = re.sub(r" ?<_io.BytesIO object at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
    return InputError(f"cannot read the image {file}: repair it or take it out ({reason})")


def describe_content(content: bytes) -> str:
    """Description of the content of a file that is not an image, with the remedy; empty if unknown."""
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not content:
        return "empty: copy it again, or take it out"
    if content.startswith(LFS):
        return "a pointer of Git LFS: git lfs pull fetches the image"
    if not content.strip(b"\0"):
        return "all zeros, as an interrupted copy leaves: copy it again"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, as a failed download leaves: download it again"
    if b"<svg" in start:
        return "SVG, which has no pixels: convert it"
    if start.startswith((b"<?xml", b"{", b"<error")):
        return "XML or JSON, as a failed download leaves: download it again, or take it out"
    for offset, kind, what in KINDS:
        if kind.match(content, offset):
            return what
    if (bits := jpeg_bits(content)) != 8:
        return f"a JPEG of {bits} bits, and JPEG is read with 8: convert it to PNG or TIFF of 16 bits"
    text = start.strip()
    if len(content) < 512 and text.isascii() and text.decode().isprintable() and not text.startswith((b"gif", b"bm")):
        return f"a text, as a failed download leaves: {content.decode(errors='replace').strip()[:40]!r}"
    return ""


def _open_heic(file: Any, name: Any = None) -> ImageFile.ImageFile:
    """Open HEIC by pillow-heif, which is imported with the first such file: not every process reads one."""
    return importlib.import_module("pillow_heif").HeifImageFile(file, name)


if HAS_HEIF:
    Image.register_open("HEIF", _open_heic, lambda start: HEIC.match(start, 4) is not None)


def gather_warnings() -> None:
    """Keep the warnings of decoders in this process for `new_warnings`; others are shown as before."""
    show = warnings.showwarning
    if getattr(show, "gathers", False):
        return

    def gather(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if PACKAGES.search(filename):
            note(str(message))
        else:
            show(message, category, filename, lineno, *rest)

    gather.gathers = True  # type: ignore[attr-defined]
    warnings.showwarning = gather  # type: ignore[assignment]
    for package in ("PIL", "tifffile", "pydicom"):
        logger = logging.getLogger(package)
        logger.addHandler(_Gather(logging.WARNING))
        logger.propagate = False


class _Gather(logging.Handler):
    """Keeps the warnings that decoders log."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def note(text: str) -> None:
    """Keep a warning about the file that this thread decodes."""
    _gathered.append((getattr(_reading, "file", ""), " ".join(text.split())))


def reading(file: str) -> None:
    """Name the file that this thread decodes next, for its warnings."""
    _reading.file = file


def new_warnings() -> list[tuple[str, str]]:
    """File and text of each warning since the last call. Python warns once of each text."""
    found = _gathered.copy()
    del _gathered[: len(found)]
    return found
