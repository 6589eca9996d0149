"""Sets of 16-bit, four-channel and multi-page images, from pretraining to export."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast import exported
from dspnet_fast.errors import InputError
from dspnet_fast.onnx_file import Session
from dspnet_fast.switchable import Switchable
from train.config import FinetuneConfig, PretrainConfig
from train.data.datasets.pixels import PixelFormat
from train.embed import embed
from train.evaluation.protocols.knn import KnnOptions, evaluate_knn
from train.evaluation.protocols.linear import LinearOptions, evaluate_linear
from train.export import ExportOptions, export
from train.finetune import completed, finetune
from train.pretraining.run import PretrainRun
from train.run.saved_config import read_config


def write_16_bit(path, wave):
    Image.fromarray((2000 + 40 * wave).astype(np.uint16)).save(path.with_suffix(".png"))


def write_four_channels(path, wave):
    np.save(path.with_suffix(".npy"), np.stack([wave, -wave, wave**2, 0 * wave + 3], -1).astype(np.float32))


def write_pages(path, wave):
    first, *others = (Image.fromarray((scale * (wave + 1)).astype(np.uint16)) for scale in (100, 2000))
    first.save(path.with_suffix(".tif"), save_all=True, append_images=others)


@pytest.fixture
def written(tmp_path):
    """written(write): a folder of blobs and stripes between -1 and 1, as a function writes them."""

    def make(write):
        random = np.random.default_rng(0)
        for split, count in (("train", 24), ("test", 12)):
            for name in ("blobs", "stripes"):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    y, x = np.mgrid[:16, :16] + random.uniform(0, 8, (2, 1, 1))
                    wave = np.sin(y) if name == "stripes" else np.sin(y) * np.sin(x)
                    write(folder / f"{index:03}", 0.9 * wave)
        return tmp_path / "images"

    return make


@pytest.mark.parametrize(
    ("write", "options", "channels", "pixel_range"),
    [
        (write_16_bit, {"pixel_range": "percentile"}, 1, None),
        (write_four_channels, {}, 4, None),
        (write_pages, {"channels": 2}, 2, "0,4095"),
    ],
)
def test_pixels_are_the_same_from_pretraining_to_export(
    written, small, tmp_path, capsys, write, options, channels, pixel_range
):
    data = written(write)
    config = small(data=str(data), dns="c8-d1111,c16-d1111", epochs=1, **options)
    PretrainRun(config, resume=False).run()
    run = tmp_path / "run"
    saved = read_config(run, PretrainConfig)
    format = PixelFormat.of(saved)
    assert saved.channels == channels and pixel_range in (None, saved.pixel_range)
    assert format.describe() in capsys.readouterr().out
    PretrainRun(config, resume=True)
    report = evaluate_knn(run, KnnOptions(k=5, baselines=True, workers=0, device="cpu"))
    assert report["networks"]["c16-d1111"]["pretrained"]["weighted"] > 0.7
    export(run, ["c8-d1111"], ExportOptions(onnx=channels == 4, switchable=True, threads=1))
    folder = run / "exported" / "c8-d1111"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert PixelFormat.of_manifest(manifest) == format
    assert manifest["pixels"]["channels"] == channels == len(manifest["normalization"]["mean"])
    np.testing.assert_allclose(
        embed(folder, data / "test", workers=0), embed(run, data / "test", "c8-d1111", workers=0), rtol=1e-4, atol=1e-5
    )
    inputs = torch.randn(2, channels, 12, 12)
    expected = exported.load(folder)(inputs).detach()
    switchable = Switchable.load(run / "exported" / "switchable.safetensors")
    assert switchable.pixels == manifest["pixels"]
    torch.testing.assert_close(switchable(inputs), expected)
    if channels == 4:
        session = Session((folder / "model.onnx").read_bytes(), 1)
        torch.testing.assert_close(session(inputs), expected, rtol=1e-4, atol=1e-4)


def test_finetuning_and_linear_evaluation_read_images_as_pretraining_did(written, small, tmp_path):
    data, run = written(write_pages), tmp_path / "run"
    PretrainRun(small(data=str(data), dns="c8-d1111", epochs=1, subnets_per_step=1), resume=False).run()
    format = PixelFormat.of(read_config(run, PretrainConfig))
    linear = evaluate_linear(run, LinearOptions(epochs=2, augment=True, workers=0, device="cpu"))
    assert linear["networks"]["c8-d1111"]["linear"]["top1"] >= 0.5
    tuned = FinetuneConfig(
        from_=str(run), out=str(tmp_path / "tuned"), epochs=1, batch_size=12, workers=0, device="cpu"
    )
    finetune(completed(tuned), resume=False)
    export(tmp_path / "tuned", [], ExportOptions(threads=1))
    manifest = json.loads((tmp_path / "tuned" / "exported" / "c8-d1111" / "manifest.json").read_text())
    assert PixelFormat.of_manifest(manifest) == format and format.channels == 2
    scratch = completed(
        FinetuneConfig(
            from_="none",
            network="resnet",
            stem="small",
            dns="c8-d1111",
            data=str(data),
            image_size=12,
            epochs=1,
            batch_size=12,
            workers=0,
            device="cpu",
            out=str(tmp_path / "scratch"),
        )
    )
    finetune(scratch, resume=False)
    assert PixelFormat.of(read_config(tmp_path / "scratch", FinetuneConfig)) == format


def knn_accuracy(small, data, out, **options):
    config = small(data=str(data), out=str(out), dns="c16-d1111", epochs=4, subnets_per_step=2, **options)
    PretrainRun(config, resume=False).run()
    report = evaluate_knn(out, KnnOptions(k=5, workers=0, device="cpu"))
    return report["networks"]["c16-d1111"]["pretrained"]["weighted"]


def test_classes_in_the_lower_bits_survive_only_with_a_range(written, small, tmp_path):
    """Values between 1964 and 2036 of 16 bits: the upper 8 bits are the same in all pixels."""
    data = written(write_16_bit)
    whole = knn_accuracy(small, data, tmp_path / "whole", pixel_range="percentile")
    upper = knn_accuracy(small, data, tmp_path / "upper", pixel_range="8bit")
    assert upper <= 0.6 and whole >= 0.8, (whole, upper)


def test_8_bit_images_are_recorded_as_such(small, tmp_path):
    PretrainRun(small(epochs=1), resume=False)
    saved = read_config(tmp_path / "run", PretrainConfig)
    assert (saved.channels, saved.pixel_range, saved.normalization) == (3, "8bit", "imagenet")


def test_a_run_from_before_the_options_is_8_bit_and_resumes(small, tmp_path):
    config = small(epochs=1)
    PretrainRun(config, resume=False).run()
    path = tmp_path / "run" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split(":")[0] not in config.pixel_options()))
    saved = read_config(tmp_path / "run", PretrainConfig)
    assert saved.pixel_range == "auto" and PixelFormat.of(saved) == PixelFormat()
    PretrainRun(saved, resume=True)


def test_finetune_refuses_another_format_than_its_run(finished):
    with pytest.raises(InputError, match="--channels 1, but .* has 3"):
        completed(FinetuneConfig(from_=str(finished), channels=1))
