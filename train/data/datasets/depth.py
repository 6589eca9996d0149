"""Bits per sample that image files store: of colours with more than 8, Pillow keeps the upper 8."""

from __future__ import annotations

import re

from PIL import Image

TIFF_BITS = 258  # tag
PNG_BITS = 24  # place of the bit depth
PNM = re.compile(rb"P([2356])\s+(?:#.*\s+)*(\d+)\s+(?:#.*\s+)*(\d+)\s+(?:#.*\s+)*(\d+)\s")
CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000; then come the size, and 3 bytes for each component
COMPONENTS, FIRST_COMPONENT = 40, 42  # places in it
AV1 = re.compile(rb"av1C\x81.(.)", re.DOTALL)  # the byte has two flags
HIGH, TWELVE = 0x40, 0x20
# Frames of JPEG files, of which Pillow reads those with 8 bits.
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))


def bits_per_sample(image: Image.Image, content: bytes) -> int:
    """The bits of a sample in a file, the most of all channels.

    Args:
        image: the file as Pillow opens it.
        content: of the file.

    Returns:
        The bits of PNG, PNM, TIFF, JPEG 2000, AVIF and HEIC; 8 for other formats.
    """
    if image.format == "PNG":
        return content[PNG_BITS]
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(TIFF_BITS, (1,))))  # type: ignore[attr-defined]
    if image.format == "PPM" and (header := PNM.match(content)) is not None:
        return int(header[4]).bit_length()
    if image.format == "JPEG2000":
        start = content.index(CODESTREAM)
        count = int.from_bytes(content[start + COMPONENTS : start + FIRST_COMPONENT])
        first = start + FIRST_COMPONENT
        return max(size & 0x7F for size in content[first : first + 3 * count : 3]) + 1
    if image.format == "AVIF":
        flags = [found[1][0] for found in AV1.finditer(content)]
        return max((12 if byte & TWELVE else 10 if byte & HIGH else 8 for byte in flags), default=8)
    return int(image.info.get("bit_depth", 8)) if image.format == "HEIF" else 8


def jpeg_bits(content: bytes) -> int:
    """The bits of a JPEG file, which Pillow does not open if they are not 8; 8 for other files."""
    place = 2
    while content.startswith(b"\xff\xd8\xff") and content[place : place + 1] == b"\xff" and place + 4 < len(content):
        if content[place + 1] in FRAMES:
            return content[place + 4]
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return 8
