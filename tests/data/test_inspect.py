"""train.data.inspect: the picture and the table of differences."""

import importlib.util
import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from tests.commands import run as run_command
from train.data import inspect
from train.data.views.augmentation import OPERATIONS

has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@pytest.fixture
def folder(tmp_path):
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{k}.jpg")
    return tmp_path / "images"


run = partial(run_command, inspect)


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_picture_and_table_of_two_backends(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--image-size", 32, "--images", 5, "--rows", 3)
    assert run("--data", folder, "--backends", "torchvision,dali-cpu", "--out", out, *options) == 0
    with Image.open(out / "views.png") as picture:
        assert picture.size == (4 * 32, inspect.HEADER + 3 * 32)
        pixels = np.asarray(picture.convert("RGB"))[inspect.HEADER :].astype(int)
    assert np.abs(pixels[:, :64] - pixels[:, 64:]).mean() < 3 < np.abs(pixels[:, :32] - pixels[:, 32:64]).mean()
    rows = json.loads((out / "differences.json").read_text())
    assert [row["operation"] for row in rows] == [*OPERATIONS, inspect.EVERYTHING]
    assert all(row["backend"] == "dali-cpu" and 0 <= row["mean"] <= row["largest"] for row in rows)
    assert (out / "differences.md").read_text() in capsys.readouterr().out


def test_a_backend_equals_itself(folder, tmp_path):
    out = tmp_path / "out"
    options = ("--image-size", 32, "--images", 4)
    assert run("--data", folder, "--backends", "torchvision,torchvision", "--out", out, *options) == 0
    assert all(row["largest"] == 0 for row in json.loads((out / "differences.json").read_text()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x", "--backends", "torchvision,jax"], "jax"),
        (["--backends", "torchvision,torchvision"], "--out is missing"),
        (["--out", "x", "--data", "/nowhere/at/all"], "no image dataset"),
    ],
)
def test_invalid_options_are_named(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run("--data", folder, *options) == 2
    assert message in capsys.readouterr().err
