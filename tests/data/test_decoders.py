"""Errors describe unreadable files; warnings of decoders are gathered; names that are not UTF-8 are safe."""

import io
import json
import os
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from dspnet_fast.errors import InputError
from tests.small_run import SMALL_RUN
from train import embed
from train.config import PretrainConfig
from train.data.bad_images import BadImages
from train.data.datasets import decoders, open_images
from train.data.datasets.arrays import decode_array
from train.data.datasets.images import decode
from train.data.loader import evaluation_batches
from train.export import ExportOptions, export
from train.pretraining.run import PretrainRun
from train.run.terminal import protect_output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS: git lfs pull"),
        (b"<!DOCTYPE html><html><body>Not Found</body></html>", "an HTML page"),
        (b"\n  <HTML><head></head></HTML>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "XML or JSON"),
        (b'{"error": "rate limit"}', "XML or JSON"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"PK\x03\x04 and so on", "an archive"),
        (b"\0" * 900, "all zeros"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIC"),
        (b"\0\0\0\x14ftypqt  \0\0", "a video"),
        (b"8BPS\0\1\0\0", "Photoshop"),
        (b"%PDF-1.5", "PDF"),
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0" * 128 + b"DICM\2", "DICOM: let its name end in .dcm"),
        (b"\x93NUMPY\1\0", "an array of numpy: let its name end in .npy"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "macOS's attributes"),
        (b"Rar!\x1a\7", "an archive"),
        (b"404: Not Found\n", "a text, as a failed download leaves: '404: Not Found'"),
        (b"GIF but damaged", r"repair it or take it out \(cannot identify image file\)"),
    ],
)
def test_unreadable_files_say_what_they_are(content, message):
    for read in (decode, decode_array):
        with pytest.raises(InputError, match=f"cannot read the image a/b.jpg.*{message}"):
            read(content, "a/b.jpg")


def test_damaged_array_says_what_is_wrong_with_it():
    content = io.BytesIO()
    np.save(content, np.float32(3))
    with pytest.raises(InputError, match=r"a.npy: repair it or take it out \(float32 of shape \[\] is no image\)"):
        decode_array(content.getvalue(), "a.npy")


def test_heic_is_read_by_its_plug_in(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    for name in ("0.heic", "1.HEIF", "2.jpg"):
        Image.new("RGB", (64, 48), (9, 99, 200)).save(tmp_path / name, "HEIF")
    images = open_images(str(tmp_path), "train")
    assert [images.load(i).size for i in range(len(images))] == [(64, 48)] * 3


@pytest.fixture
def gathering(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        decoders.gather_warnings()
        decoders.new_warnings()
        yield


def warning_image():
    """A JPEG whose EXIF is cut off: Pillow warns and reads the image."""
    content = io.BytesIO()
    Image.new("L", (16, 16), 9).save(content, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01")
    return content.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
def test_warnings_of_decoders_are_one_line_for_each_kind(tmp_path, gathering, capfd, workers):
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(warning_image())
    images = open_images(str(tmp_path), "train")
    assert [len(batch) for batch in evaluation_batches(images, range(6), 16, 2, workers)] == [2, 2, 2]
    shown = capfd.readouterr()
    assert shown.err == ""
    (line,) = shown.out.splitlines()
    assert line.startswith("decoder warning: ") and f"({tmp_path}/0.jpg; further ones are not shown)" in line


@pytest.mark.parametrize("mode", ["grey", "rgb"])
def test_reading_16_bits_as_8_is_a_warning(gathering, mode):
    codecs = pytest.importorskip("imagecodecs")
    values = np.full((4, 5, 3) if mode == "rgb" else (4, 5), 999, np.uint16)
    assert decode(codecs.png_encode(values), "a.png").size == (5, 4)
    ((file, text),) = decoders.new_warnings()
    assert file == "a.png" and "upper 8 bits" in text


def test_messages_that_decoders_log_are_gathered(gathering, capfd):
    content = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(content, np.zeros((8, 9, 13), np.uint8), planarconfig="contig")
    assert decode_array(content.getvalue(), "a.tif")[0].shape == (8, 9, 13)
    assert {file for file, _ in decoders.new_warnings()} == {"a.tif"} and capfd.readouterr().err == ""


def test_other_warnings_are_shown_as_before(monkeypatch):
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: shown.append(str(message)))
        decoders.gather_warnings()
        decoders.gather_warnings()
        warnings.warn("of another module", stacklevel=1)
    assert shown == ["of another module"] and decoders.new_warnings() == []


def test_texts_that_differ_in_numbers_are_one_kind():
    bad = BadImages()
    bad.add_warnings([("a", "expected 2 bytes"), ("b", "expected 13 bytes"), ("c", "other")])
    assert [line.split(";")[0] for line in bad.new_messages()] == [
        "decoder warning: expected 2 bytes (a",
        "decoder warning: other (c",
    ]


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_names_that_are_not_utf8_are_safe_in_terminal_log_and_files(tmp_path, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "utf-8", write_through=True))
    protect_output()
    random = np.random.default_rng(0)
    for split in (b"train", b"test"):
        for name in (b"a\xff", b"b"):
            folder = os.path.join(os.fsencode(tmp_path), b"images\xfe", split, name)
            os.makedirs(folder)
            for i in range(6):
                content = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(content, "png")
                with open(os.path.join(folder, b"%d\xfd.png" % i), "wb") as file:
                    file.write(content.getvalue() if split == b"test" or i else b"")
    data = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"images\xfe"))
    out = tmp_path / "run"
    options = {"dns": "c8-d1111", "epochs": 1, "batch_size": 5, "subnets_per_step": 1, "warmup_epochs": 0}
    config = PretrainConfig(**SMALL_RUN | options, data=data, out=str(out), max_bad_images=2)
    PretrainRun(config, resume=False).run()
    assert len(json.loads((out / "bad_images.json").read_text())) == 2
    assert "it is empty" in (out / "train.log").read_text(errors="surrogateescape")
    PretrainRun(config, resume=True)
    for unreadable in json.loads((out / "bad_images.json").read_text()):
        os.remove(os.path.join(data, unreadable))
    (folder,) = export(out, [], ExportOptions(threads=1))
    assert embed.embed(folder, os.path.join(data, "test"), workers=0).shape == (12, 64)
    assert json.loads((folder / "manifest.json").read_text())["pretraining"]["data"] == data
    assert rb"images\xfe" in shown.getvalue()
