"""Errors and warnings of image decoders: errors name the fault of a file, warnings are gathered and printed once."""

from __future__ import annotations

import re
import threading
import warnings
from typing import Any

from dspnet_fast.errors import InputError

LFS = b"version https://git-lfs"
PACKAGES = re.compile(r"[/\\](PIL|tifffile|imagecodecs|pydicom|pillow_heif)[/\\]")  # in the path of a module

_gathered: list[tuple[str, str]] = []  # file and text, of this process
_reading = threading.local()  # .file: the file that this thread decodes


def unreadable(file: str, content: bytes, error: Exception) -> InputError:
    """The error for an image that a decoder refuses."""
    if what := _other_content(content):
        return InputError(f"cannot read the image {file}: it is {what}")
    reason = re.sub(r" ?<_io.BytesIO object at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
    return InputError(f"cannot read the image {file}: repair it or take it out ({reason})")


def _other_content(content: bytes) -> str:
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
    if start.startswith((b"pk\x03\x04", b"\x1f\x8b")):
        return "an archive: unpack it"
    return ""


def gather_warnings() -> None:
    """Keep the warnings of decoders in this process for `new_warnings`; others are shown as before."""
    show = warnings.showwarning
    if getattr(show, "gathers", False):
        return

    def gather(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if PACKAGES.search(filename):
            _gathered.append((getattr(_reading, "file", ""), " ".join(str(message).split())))
        else:
            show(message, category, filename, lineno, *rest)

    gather.gathers = True  # type: ignore[attr-defined]
    warnings.showwarning = gather  # type: ignore[assignment]


def reading(file: str) -> None:
    """Name the file that this thread decodes next, for its warnings."""
    _reading.file = file


def new_warnings() -> list[tuple[str, str]]:
    """File and text of each warning since the last call. Python warns once of each text."""
    found = _gathered.copy()
    del _gathered[: len(found)]
    return found
