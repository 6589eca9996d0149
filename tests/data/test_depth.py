"""Images with more than 8 bits: every format keeps all bits, or a warning or an error says so."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image, features

from dspnet_fast.errors import InputError
from train.data.datasets import decoders
from train.data.datasets.arrays import _turned, decode_array, is_eight_bit
from train.data.datasets.depth import jpeg_bits
from train.data.datasets.images import decode

HEIGHT, WIDTH = 24, 16
Y, X = np.mgrid[:HEIGHT, :WIDTH]
GREY = (Y * WIDTH + X) * 170  # to 65,110
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


def values(bits, channels=3):
    """Pixels [H, W] or [H, W, channels] of which the lowest bits matter."""
    chosen = {1: GREY, 3: COLOURS, 4: np.concatenate([COLOURS, np.full((HEIGHT, WIDTH, 1), 65535)], -1)}
    return (chosen[channels] >> (16 - bits)).astype(np.uint16)


def codecs(name, pixels, **options):
    return getattr(pytest.importorskip("imagecodecs"), f"{name}_encode")(pixels, **options)


def tiff(pixels, **options):
    content = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(content, pixels, **options)
    return content.getvalue()


def pnm(kind, bits, pixels):
    header = b"%s\n# by a camera\n%d %d\n%d\n" % (kind, WIDTH, HEIGHT, 2**bits - 1)
    if kind in (b"P2", b"P3"):
        return header + b" ".join(b"%d" % value for value in pixels.ravel().tolist()) + b"\n"
    return header + pixels.astype(">u2").tobytes()


def heic(pixels):
    heif, content = pytest.importorskip("pillow_heif"), io.BytesIO()
    shift = 6  # pillow-heif takes 16 bits, and stores 10
    made = heif.from_bytes("RGB;16", (WIDTH, HEIGHT), (pixels << shift).tobytes())
    made.save(content, quality=-1, chroma=444, matrix_coefficients=0)
    return content.getvalue()


def avif(bits):
    if not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    return codecs("avif", values(bits), level=100, bitspersample=bits)


# Name, content, expected values or None if the format is lossy, and the tolerance.
FILES = {
    "grey png": lambda: (codecs("png", values(16, 1)), "a.png", values(16, 1)),
    "rgb png": lambda: (codecs("png", values(16)), "a.png", values(16)),
    "rgba png": lambda: (codecs("png", values(16, 4)), "a.png", values(16, 4)),
    "grey tiff": lambda: (tiff(values(16, 1)), "a.tif", values(16, 1)),
    "rgb tiff": lambda: (tiff(values(16), photometric="rgb"), "a.tif", values(16)),
    "pgm": lambda: (pnm(b"P5", 16, values(16, 1)), "a.pgm", values(16, 1)),
    "ppm": lambda: (pnm(b"P6", 12, values(12)), "a.ppm", values(12)),
    "pgm as text": lambda: (pnm(b"P2", 16, values(16, 1)), "a.pgm", values(16, 1)),
    "ppm as text": lambda: (pnm(b"P3", 12, values(12)), "a.ppm", values(12)),
    "grey jpeg 2000": lambda: (codecs("jpeg2k", values(16, 1), level=0), "a.jp2", values(16, 1)),
    "rgb jpeg 2000": lambda: (codecs("jpeg2k", values(16), level=0), "a.jp2", values(16)),
    "rgb codestream of jpeg 2000": lambda: (
        codecs("jpeg2k", values(12), level=0, codecformat="j2k", bitspersample=12),
        "a.j2k",
        values(12),
    ),
    "rgba jpeg 2000": lambda: (codecs("jpeg2k", values(16, 4), level=0), "a.jp2", values(16, 4)),
    "10-bit avif": lambda: (avif(10), "a.avif", values(10)),
    "12-bit avif": lambda: (avif(12), "a.avif", values(12)),
    "10-bit heic": lambda: (heic(values(10)), "a.heic", values(10)),
}


@pytest.fixture
def warned():
    """The decoders' warnings since the last call."""
    decoders.new_warnings()
    return decoders.new_warnings


@pytest.mark.parametrize("kind", FILES)
def test_all_bits_are_kept_or_the_loss_is_named(kind, warned):
    content, file, expected = FILES[kind]()
    assert not is_eight_bit(content, file)
    found, colours = decode_array(content, file)
    expected = expected[..., None] if expected.ndim == 2 else expected
    assert colours == (3 if expected.shape[-1] == 4 else expected.shape[-1])
    np.testing.assert_allclose(
        found.astype(int), expected.astype(int), atol=8 if "heic" in kind or "avif" in kind else 0
    )
    assert warned() == []
    image = decode(content, file)
    scale = 255 / expected.max()
    assert np.abs(np.asarray(image).reshape(HEIGHT, WIDTH, -1) - expected[..., :3] * scale).max() < 8
    ((named, text),) = warned()
    assert named == file and "upper 8 bits" in text


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpeg2000", "webp", "avif", "heif", "ppm", "tiff"])
def test_ordinary_colours_have_eight_bits(kind, warned):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    if kind == "heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    content = io.BytesIO()
    Image.fromarray((COLOURS >> 8).astype(np.uint8)).save(content, kind)
    assert is_eight_bit(content.getvalue(), "a")
    decode(content.getvalue(), "a")
    assert warned() == []


def test_jpeg_of_12_bits_is_named():
    content = codecs("jpeg8", values(12, 1), bitspersample=12)
    assert jpeg_bits(content) == 12
    for read in (decode, decode_array):
        with pytest.raises(InputError, match="it is a JPEG of 12 bits, and JPEG is read with 8: convert it to PNG"):
            read(content, "a.jpg")
    assert jpeg_bits(content[:40]) == jpeg_bits(b"") == 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Image.fromarray(values(16, 1) // 256).convert("L").save(content, "png", exif=exif)
    expected = np.asarray(decode(content.getvalue(), "a.png"))
    np.testing.assert_array_equal(_turned((values(16, 1) // 256).astype(np.uint8), orientation), expected)
    deep = tiff(values(16), photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    np.testing.assert_array_equal(decode_array(deep, "a.tif")[0], _turned(values(16), orientation))


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="pillow-heif is not installed")
def test_heic_is_imported_with_the_first_such_file(run_python):
    program = """
import io, sys
import train.data.loader
assert "pillow_heif" not in sys.modules
from PIL import Image
import pillow_heif
content = io.BytesIO()
pillow_heif.from_pillow(Image.new("RGB", (64, 48), (9, 99, 200))).save(content)
from train.data.datasets.images import decode
print(decode(content.getvalue(), "a.heic").size)
"""
    assert run_python("-c", program) == "(64, 48)\n"
