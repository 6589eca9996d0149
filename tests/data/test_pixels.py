"""Images with more than 8 bits or other than three channels: decoding, the options' resolution, and the views."""

import dataclasses
import importlib.util
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from dspnet_fast.errors import InputError
from train.config import PixelOptions, PretrainConfig
from train.data.backends import choose_backend
from train.data.datasets import open_images
from train.data.datasets.arrays import decode_array, is_eight_bit
from train.data.datasets.pixels import PixelFormat, RescaledImage
from train.data.loader import evaluation_batches, two_view_batches
from train.data.normalization import MEAN, STD, prepare
from train.data.pixel_options import read_as, resolve_pixels
from train.data.sampler import EpochSampler
from train.data.views.augmentation import ViewParameters, byol, only, sample_view, uniform_numbers
from train.data.views.rescaled_views import augment_rescaled
from train.data.views.torchvision_backend import augment

RAMP = (np.arange(12 * 10, dtype=np.uint16) * 30).reshape(12, 10)
WHOLE = ViewParameters(box=(0, 0, 12, 12), flip=False, jitter=(), grey=False, sigma=0.0, solarize=False)


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def npy(values):
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def rgb16_png():
    return pytest.importorskip("imagecodecs").png_encode(np.stack([RAMP] * 3, -1))


def tiff(values, **options):
    tifffile = pytest.importorskip("tifffile")
    content = io.BytesIO()
    tifffile.imwrite(content, values, **options)
    return content.getvalue()


def pages(*arrays):
    first, *others = (Image.fromarray(array) for array in arrays)
    return encoded(first, "tiff", save_all=True, append_images=others)


@pytest.mark.parametrize(
    ("content", "file", "expected", "colours"),
    [
        (lambda: encoded(Image.fromarray(RAMP), "png"), "a.png", RAMP[..., None], 1),
        (lambda: encoded(Image.fromarray(RAMP), "tiff"), "a.tif", RAMP[..., None], 1),
        (lambda: encoded(Image.fromarray(RAMP), "tiff", compression="tiff_lzw"), "a.tif", RAMP[..., None], 1),
        (lambda: encoded(Image.fromarray(RAMP - 0.5), "tiff"), "a.tif", (RAMP - 0.5)[..., None], 1),
        (lambda: pages(RAMP, RAMP + 7), "a.tif", np.stack([RAMP, RAMP + 7], -1), 2),
        (lambda: pages(RAMP, RAMP[:5]), "a.tif", RAMP[..., None], 1),  # the second page is a thumbnail
        (rgb16_png, "a.png", np.stack([RAMP] * 3, -1), 3),
        (lambda: npy(RAMP), "a.npy", RAMP[..., None], 1),
        (lambda: npy(np.stack([RAMP] * 4)), "a.npy", np.stack([RAMP] * 4, -1), 4),
        (lambda: npy(np.stack([RAMP] * 4, -1)), "A.NPY", np.stack([RAMP] * 4, -1), 4),
        (lambda: npy(RAMP > 9), "a.npy", (RAMP > 9)[..., None], 1),
        (lambda: encoded(Image.new("RGBA", (3, 2), (1, 2, 3, 4)), "png"), "a.png", np.full((2, 3, 4), [1, 2, 3, 4]), 3),
        (lambda: encoded(Image.new("LA", (3, 2), (1, 4)), "png"), "a.png", np.full((2, 3, 2), [1, 4]), 1),
        (lambda: encoded(Image.new("CMYK", (3, 2)), "jpeg"), "a.jpg", np.full((2, 3, 3), 255), 3),
        (
            lambda: tiff(np.stack([RAMP] * 3, -1), photometric="rgb", compression="lzw"),
            "a.tif",
            np.stack([RAMP] * 3, -1),
            3,
        ),
        (
            lambda: tiff(np.stack([RAMP] * 6), photometric="minisblack", planarconfig="separate"),
            "a.tif",
            np.stack([RAMP] * 6, -1),
            6,
        ),
        (
            lambda: tiff(np.stack([RAMP] * 4, -1), photometric="rgb", extrasamples=["unassalpha"]),
            "a.tif",
            np.stack([RAMP] * 4, -1),
            3,
        ),
    ],
)
def test_decoding_keeps_values_and_channels(content, file, expected, colours):
    values, found = decode_array(content(), file)
    assert found == colours
    np.testing.assert_array_equal(values, expected)
    assert values.dtype.isnative


SIGNED = (RAMP // 30 - 60).astype(np.int8)
LARGE = RAMP.astype(np.uint32) * 1_200_000  # above 2^31
PPM = b"P6\n# by a camera\n10 12\n4095\n" + np.stack([RAMP] * 3, -1).astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: (tiff(SIGNED), "a.tif"), SIGNED),
        (lambda: (tiff(LARGE), "a.tif"), LARGE),
        (lambda: (tiff(np.stack([RAMP.astype(np.uint8)] * 2, -1), planarconfig="contig"), "a.tif"), None),
        (lambda: (tiff(RAMP, photometric="miniswhite"), "a.tif"), 65535 - RAMP),
        (lambda: (PPM, "a.ppm"), RAMP),
    ],
    ids=["signed 8 bits", "above 31 bits", "two channels", "white is zero", "ppm"],
)
def test_values_that_pillow_would_change_are_kept(make, expected):
    content, file = make()
    values, colours = decode_array(content, file)
    assert not is_eight_bit(content, file) and values.shape[-1] == colours
    if expected is None:
        assert colours == 2
    else:
        np.testing.assert_array_equal(values[..., 0], expected)


@pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="pydicom is not installed")
def test_dicom_gives_the_values_of_its_modality():
    import pydicom
    from pydicom.dataset import FileMetaDataset

    made = pydicom.Dataset()
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 12, 10, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.RescaleSlope, made.RescaleIntercept, made.PixelData = 2, -1024, RAMP.tobytes()
    made.SOPClassUID, made.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    content = io.BytesIO()
    made.save_as(content, enforce_file_format=True)
    values, colours = decode_array(content.getvalue(), "a.dcm")
    assert colours == 1
    np.testing.assert_array_equal(values[..., 0], RAMP * 2.0 - 1024)


@pytest.mark.parametrize(
    ("content", "file", "message"),
    [
        (npy(np.array([[1, np.nan]])), "a.npy", "not finite"),
        (npy(np.array([["a"]])), "a.npy", "is no image"),
        (npy(np.zeros(3)), "a.npy", "is no image"),
        (npy(np.array([[None]], dtype=object)), "a.npy", "allow_pickle"),
        (b"no array", "a.npy", "a.npy"),
        (b"II*\0 and nothing more", "a.tif", "a.tif"),
    ],
)
def test_files_that_hold_no_image_are_named(content, file, message):
    with pytest.raises(InputError, match=message):
        decode_array(content, file)


def test_files_that_need_a_package_say_so(monkeypatch):
    contents = {"a.tif": tiff(np.stack([RAMP] * 3, -1), photometric="rgb"), "a.png": rgb16_png()}
    for package in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, package, None)
    for file, content in contents.items():
        with pytest.raises(InputError, match=r"pip install 'dspnet-fast\[images\]'"):
            decode_array(content, file)


@pytest.mark.parametrize(
    ("content", "file", "expected"),
    [
        (encoded(Image.fromarray(RAMP), "png"), "a.png", False),
        (encoded(Image.fromarray(RAMP.astype(np.uint8)), "png"), "a.png", True),
        (encoded(Image.new("RGB", (4, 4)), "jpeg"), "a.jpg", True),
        (encoded(Image.new("P", (4, 4)), "gif"), "a.gif", True),
        (encoded(Image.new("L", (4, 4)), "tiff"), "a.tif", True),
        (encoded(Image.new("F", (4, 4)), "tiff"), "a.tif", False),
        (pages(np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)), "a.tif", False),
        (b"II*\0 a layout that Pillow does not know", "a.tif", False),
        (npy(RAMP), "a.npy", False),
        (b"damaged", "a.jpg", True),
    ],
)
def test_header_tells_8_bit_images(content, file, expected):
    assert is_eight_bit(content, file) is expected


@pytest.fixture
def folder(tmp_path):
    """folder(**files): a folder of these files, opened."""

    def make(files):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return open_images(str(tmp_path), "train")

    return make


def resolved(images, **options):
    lines = []
    made = resolve_pixels(PixelOptions(**options), images, lines.append)
    return made, lines


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ([np.uint8(RAMP // 20)], {}, (3, "8bit", "imagenet")),
        ([RAMP], {}, (1, "0,4095", f"{RAMP.mean() / 4095:.6g};{RAMP.std() / 4095:.6g}")),
        ([RAMP], {"normalization": "0.5;0.25"}, (1, "0,4095", "0.5;0.25")),
        ([RAMP], {"channels": 3, "normalization": "imagenet"}, (3, "0,4095", "0.485,0.456,0.406;0.229,0.224,0.225")),
        ([RAMP * 10], {}, (1, "0,65535", f"{RAMP.mean() * 10 / 65535:.6g};{RAMP.std() * 10 / 65535:.6g}")),
        ([RAMP], {"pixel_range": "1000,2000"}, (1, "1000,2000", None)),
        ([RAMP], {"pixel_range": "percentile"}, (1, "3.57,3566.43", None)),
        ([np.float32(RAMP) / 4000], {}, (1, "0,1", None)),
        ([np.float32(RAMP) - 5], {}, (1, "-5,3565", None)),
        ([RAMP, np.uint8(RAMP // 20)], {"pixel_range": "8bit"}, (3, "8bit", "imagenet")),
        ([np.uint8(RAMP // 20)], {"channels": 1}, (1, "0,255", None)),
        ([np.uint8(RAMP // 20)], {"normalization": "measure"}, (1, "0,255", None)),
        ([np.uint8(RAMP // 20)], {"pixel_range": "8bit", "channels": 1}, (1, "0,255", None)),
        (
            [np.uint8(RAMP // 20)],
            {"pixel_range": "8bit", "channels": 3, "normalization": "0.4,0.4,0.4;0.2,0.2,0.2"},
            (3, "0,255", "0.4,0.4,0.4;0.2,0.2,0.2"),
        ),
        ([np.stack([np.uint8(RAMP // 20)] * 4, -1)], {"pixel_range": "8bit", "channels": 4}, (4, "0,255", None)),
        ([np.stack([RAMP] * 3, -1), RAMP], {}, (3, "0,4095", None)),
    ],
)
def test_options_follow_from_the_images(folder, files, options, expected):
    if any(array.ndim == 3 for array in files):
        images = folder({f"{i}.npy": npy(array) for i, array in enumerate(files)})
    else:
        images = folder({f"{i}.tif": encoded(Image.fromarray(array), "tiff") for i, array in enumerate(files)})
    made, lines = resolved(images, **options)
    channels, pixel_range, normalization = expected
    assert (made.channels, made.pixel_range) == (channels, pixel_range)
    assert normalization in (None, made.normalization)
    assert bool(lines) == (pixel_range != "8bit")
    assert resolve_pixels(made, images, lines.append) == made, "resolved options stay as they are"
    assert PixelFormat.of(made).eight_bit == (pixel_range == "8bit")


def test_measured_mean_and_std_are_those_of_the_set(folder):
    arrays = [np.random.RandomState(i).randint(0, 3000, (9, 8, 4)).astype(np.uint16) for i in range(5)]
    images = folder({f"{i}.npy": npy(array) for i, array in enumerate(arrays)})
    format = PixelFormat.of(resolved(images)[0])
    values = np.stack(arrays).reshape(-1, 4) / 4095
    np.testing.assert_allclose(format.mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(format.std, values.std(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.png": Image.fromarray(RAMP), "b.png": Image.new("L", (4, 4))}, {}, "no common range.*--pixel-range"),
        ({"a.npy": np.zeros((4, 4, 2)), "b.npy": np.zeros((4, 4))}, {}, "1 channels .*--channels N"),
        ({"a.npy": np.zeros((4, 4, 2))}, {"channels": 4}, "at most 2"),
        ({"a.npy": np.zeros((4, 4))}, {"pixel_range": "percentile"}, "all sampled pixels are 0"),
        ({"a.npy": RAMP}, {"normalization": "imagenet"}, "3 channels, not 1"),
        ({"a.npy": RAMP}, {"normalization": "0.1,0.2;0.1,0.2"}, "give 1 means"),
        ({"a.npy": RAMP}, {"channels": 1, "normalization": "0.1,0.2;0.1,0.2"}, "each of the 1 channels"),
        ({"a.npy": RAMP}, {"pixel_range": "0,9", "channels": 4, "normalization": "0.1;0.2"}, "each of the 4 channels"),
        ({"a.npy": RAMP}, {"pixel_range": "8bit", "channels": 1}, "from 0 to 3570.*give their range"),
        ({"a.npy": RAMP}, {"pixel_range": "8bit", "normalization": "measure"}, "from 0 to 3570.*give their range"),
        (
            {"a.png": Image.fromarray(RAMP), "b.png": Image.new("L", (4, 4))},
            {"channels": 1},
            "no common range. Give it, as --pixel-range MIN,MAX$",
        ),
        ({"a.npy": RAMP}, {"pixel_range": "5,1"}, "smaller value first"),
        ({"a.npy": RAMP}, {"pixel_range": "1,2,3"}, "2 numbers"),
        ({"a.npy": RAMP}, {"pixel_range": "wide"}, "'wide'"),
        ({"a.npy": RAMP}, {"normalization": "0.1;0"}, "above 0"),
        ({"a.npy": RAMP}, {"channels": 0}, "--channels 0"),
        ({"a.npy": "damaged"}, {}, "none of 1 images"),
    ],
)
def test_images_without_a_common_format_are_refused(folder, files, options, message):
    def content(value):
        if isinstance(value, str):
            return value.encode()
        return encoded(value, "png") if isinstance(value, Image.Image) else npy(value)

    images = folder({name: content(value) for name, value in files.items()})
    with pytest.raises(InputError, match=message):
        resolved(images, **options)


def test_arrays_beside_images_are_left_out(folder, tmp_path):
    images = folder({"a.png": encoded(Image.new("L", (4, 4)), "png"), "a.npy": npy(RAMP)})
    assert [images.file(i) for i in range(len(images))] == [str(tmp_path / "a.png")]
    assert "1 files ending in .npy" in images.note


def test_ranges_clip_and_grey_fills_three_channels():
    format = PixelFormat(3, 100, 300, (0.5,) * 3, (0.5,) * 3, eight_bit=False)
    values = format.rescale(np.array([[[0], [100], [200], [900]]], np.uint16), 1)
    assert values.tolist() == [[[0, 0, 0.5, 1]]] * 3
    with pytest.raises(ValueError, match="it has 2 channels, and the network takes 3"):
        format.rescale(np.zeros((2, 2, 2)), 2)


def unit(channels, values):
    """Values from 0 to 1 as an image whose normalisation changes nothing."""
    return RescaledImage(values, PixelFormat(channels, 0, 1, (0.0,) * channels, (1.0,) * channels, eight_bit=False))


@pytest.mark.parametrize(
    "operation", ["resize", "flip", "brightness", "contrast", "saturation", "hue", "grey", "blur", "solarize"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_equal_those_of_8_bit_images(operation, channels):
    """Within rounding: 8-bit images are rounded after each operation, and hue has 256 steps."""
    pixels = F.resize(torch.randint(256, (channels, 9, 9), dtype=torch.uint8), [60, 60])
    image = F.to_pil_image(pixels)
    view = only(byol(48)[0], operation)
    for i in range(4):
        parameters = sample_view(view, uniform_numbers(0, 0, i)[0], 60, 60)
        expected = augment(view, parameters, image).float()
        found = augment_rescaled(view, parameters, unit(channels, pixels / 255)) * 255
        difference = (found - expected).abs()
        if operation == "solarize":  # a rounding error at the threshold inverts a pixel
            difference = difference[(expected - 127.5).abs() > 2]
        assert difference.mean() < 1 and difference.max() < (12 if operation == "hue" else 3)


def test_contrast_keeps_the_mean_of_each_channel_and_no_operation_needs_colour():
    image = unit(5, torch.rand(5, 20, 20) * 0.2 + torch.arange(5).view(5, 1, 1) * 0.15 + 0.1)
    view = byol(20)[0]
    parameters = dataclasses.replace(WHOLE, box=(0, 0, 20, 20), jitter=(("contrast", 1.3),))
    found = augment_rescaled(view, parameters, image)
    torch.testing.assert_close(found.mean((1, 2)), image.values.mean((1, 2)))
    assert (found.std((1, 2)) > 1.2 * image.values.std((1, 2))).all()
    colour = dataclasses.replace(parameters, jitter=(("hue", 0.1), ("saturation", 0.5)), grey=True)
    torch.testing.assert_close(augment_rescaled(view, colour, image), image.values)


def test_batches_are_normalised_once(folder):
    images = folder({f"{i}.npy": npy(np.full((12, 12, 2), 1000 + 100 * i, np.uint16)) for i in range(4)})
    format = PixelFormat(2, 1000, 1400, (0.5, 0.0), (0.25, 1.0), eight_bit=False)
    images = read_as(images, format)
    (batch,) = evaluation_batches(images, range(4), 8, 4, workers=0)
    assert (batch.shape, batch.dtype) == ((4, 2, 8, 8), torch.float32)
    torch.testing.assert_close(batch[:, 0, 0, 0], torch.tensor([-2.0, -1.0, 0.0, 1.0]))
    assert torch.equal(prepare(batch, torch.device("cpu")), batch)
    views = byol(8)
    (two,) = two_view_batches(images, views, EpochSampler(4, 4, 0, 1), workers=0)
    (again,) = two_view_batches(images, views, EpochSampler(4, 4, 0, 1), workers=1)
    assert two.shape == (8, 2, 8, 8) and torch.equal(two, again)


def test_dali_refuses_other_images_with_a_reason(folder):
    images = folder({"a.npy": npy(RAMP)})
    assert choose_backend("auto", images, torch.device("cpu"), eight_bit=False) == "torchvision"
    with pytest.raises(InputError, match="dali-cpu reads 8-bit grey and RGB"):
        choose_backend("dali-cpu", images, torch.device("cpu"), eight_bit=False)


def test_augmentation_options_reach_the_views():
    config = PretrainConfig(
        hue=0.0,
        saturation=0.0,
        brightness=0.3,
        flip_probability=0.0,
        blur_probability="0.5,0.25",
        blur_sigma="1,4",
        solarize_probability="0,0",
        solarize_threshold=99,
        grey_probability=0.1,
        contrast=0.7,
        jitter_probability=1.0,
    )
    first, second = byol(112, 0.2, config)
    assert (first.hue, first.saturation, first.brightness, first.contrast) == (0, 0, 0.3, 0.7)
    assert (first.blur_probability, second.blur_probability, second.solarize_probability) == (0.5, 0.25, 0)
    assert (first.blur_sigma, first.blur_kernel) == ((0.5, 2.0), 23), "the kernel grows with the largest sigma"
    assert (first.flip_probability, first.grey_probability, first.jitter_probability) == (0, 0.1, 1)
    assert first.solarize_threshold == 99
    assert byol(112) == byol(112, 0.08, PretrainConfig()), "the defaults are BYOL's"


@pytest.mark.parametrize(
    "options",
    [
        {"hue": 0.6},
        {"brightness": -0.1},
        {"blur_probability": "1"},
        {"blur_probability": "1,2"},
        {"blur_sigma": "2,1"},
        {"solarize_threshold": 256},
        {"grey_probability": float("nan")},
    ],
)
def test_invalid_augmentation_is_refused(options):
    with pytest.raises(InputError, match="--" + next(iter(options)).replace("_", "-")):
        PretrainConfig(**options)


def test_formats_survive_a_manifest():
    format = PixelFormat(2, -5.0, 9.0, (0.5, 0.25), (0.1, 0.2), eight_bit=False)
    assert PixelFormat.of_manifest({"pixels": format.pixels, "normalization": format.normalization}) == format
    assert PixelFormat.of_manifest({"normalization": {"mean": MEAN, "std": STD}}) == PixelFormat()
