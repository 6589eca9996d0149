"""train.embed: features equal those of the exported network, in the order of the listed files."""

import json
from functools import partial

import numpy as np
import pytest

from dspnet_fast.errors import InputError
from tests.commands import run as run_command
from train import embed
from train.cli import DONE, WRONG_INPUT
from train.data.datasets.folder import open_files
from train.export import ExportOptions, export

run = partial(run_command, embed)


def test_run_and_export_give_the_same_features(trained, images):
    (folder,) = export(trained, ["c8-d1121"], ExportOptions(threads=1))
    files = [images / "test" / "blobs" / "003.png", images / "train" / "stripes" / "001.png"]
    of_run = embed.embed(trained, files, "c8-d1121", device="cpu", workers=0)
    of_export = embed.embed(folder, files, device="cpu", workers=0)
    assert of_run.shape == (2, 64) and of_run.dtype == np.float32
    np.testing.assert_allclose(of_run, of_export, rtol=1e-5, atol=1e-6)
    alone = embed.embed(folder, files[1:], device="cpu", workers=0)
    np.testing.assert_allclose(alone[0], of_export[1], rtol=1e-4, atol=1e-5)


def test_command_writes_features_and_names_of_a_folder(trained, images, tmp_path):
    out = tmp_path / "features.npy"
    assert run(trained, "--data", images / "test", "--out", out, "--workers=0", "--device=cpu") == DONE
    features, listed = np.load(out), json.loads((tmp_path / "features.json").read_text())
    opened = open_files([images / "test"])
    assert features.shape == (40, 128), "the largest network of the run has 128 features"
    assert listed["files"] == [opened.file(i) for i in range(40)] == sorted(listed["files"])
    expected = embed.embed(trained, images / "test", device="cpu", workers=0)
    np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=features.txt"], "ends in .npy"),
        (["--dn=c32-d1111"], "c32-d1111"),
        (["--data=nowhere"], "nowhere"),
    ],
)
def test_invalid_options_are_refused_in_one_line(trained, images, tmp_path, capsys, arguments, message):
    given = {"--data": images / "test", "--out": tmp_path / "features.npy"}
    given |= dict(argument.split("=") for argument in arguments)
    assert run(trained, *(f"{name}={value}" for name, value in given.items())) == WRONG_INPUT
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "features.npy").exists()


def test_dn_is_refused_with_an_exported_network(trained, images):
    (folder,) = export(trained, ["c8-d1111"], ExportOptions(threads=1))
    with pytest.raises(InputError, match="leave --dn out"):
        embed.embed(folder, images / "test", "c8-d1111")


def test_missing_network_and_missing_images_are_refused(trained, images, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        embed.embed(tmp_path, images / "test")
    with pytest.raises(InputError, match="does not exist"):
        embed.embed(trained, [tmp_path / "missing.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in"):
        embed.embed(trained, tmp_path / "empty")


def test_file_that_is_no_image_is_named(trained, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="broken.png"):
        embed.embed(trained, tmp_path / "broken.png", workers=0)
