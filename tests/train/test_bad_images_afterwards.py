"""Images that a pretraining could not read, in the commands that follow it."""

import json
import shutil

import pytest

from train import evaluate, finetune
from train.cli import DONE, WRONG_INPUT
from train.export import ExportOptions, export
from train.pretraining.run import PretrainRun
from train.run.run_directory import BAD_IMAGES


@pytest.fixture(scope="module")
def damaged(images, tmp_path_factory):
    """An image folder of which two training images are unreadable, and a run that has left them out."""
    root = shutil.copytree(images, tmp_path_factory.mktemp("damaged") / "images")
    for name in ("blobs/003.png", "stripes/017.png"):
        (root / "train" / name).write_bytes(b"no image")
    return root


@pytest.fixture
def run(small, damaged, tmp_path):
    PretrainRun(small(data=str(damaged), max_bad_images=2, epochs=3, probe_epochs=0), resume=False).run()
    assert len(json.loads((tmp_path / "run" / BAD_IMAGES).read_text())) == 2
    return tmp_path / "run"


def code(command, *argv):
    with pytest.raises(SystemExit) as end:
        command.main([*map(str, argv), "--workers=0", "--device=cpu"])
    return end.value.code


def test_they_are_left_out_and_counted(run, tmp_path, capsys):
    assert code(evaluate, "knn", run, "--k", 5) == DONE
    line = f"left out: 2 images that the run could not read, see {run / BAD_IMAGES}"
    assert capsys.readouterr().out.count(line) == 1
    assert json.loads((run / "evaluation" / "knn.json").read_text())["references"] == 78
    shutil.rmtree(run / "features")
    (run / "post_statistics.safetensors").unlink()
    export(run, ["c8-d1111"], ExportOptions(formats="onnx-int8", threads=1))
    assert capsys.readouterr().out.count(line) == 1
    manifest = json.loads((run / "exported" / "c8-d1111" / "manifest.json").read_text())
    assert manifest["formats"]["onnx-int8"]["calibrated_on"] == manifest["batch_norm"]["images"] == 78
    options = ("--epochs=1", "--batch-size=16", "--warmup-epochs=0", "--out", tmp_path / "labels")
    assert code(finetune, "--from", run, "--dn", "c8-d1111", *options) == DONE
    export(tmp_path / "labels", [], ExportOptions(threads=1))


def test_list_names_images_relative_to_the_data(run, damaged):
    found = json.loads((run / BAD_IMAGES).read_text())
    assert found.keys() == {"train/blobs/003.png", "train/stripes/017.png"}
    assert all(f"cannot read the image {name}: " in reason for name, reason in found.items())


def references(run, data, capsys):
    assert code(evaluate, "knn", run, "--k", 5, "--data", data) == DONE, capsys.readouterr().err
    return json.loads((run / "evaluation" / "knn.json").read_text())["references"]


def test_they_are_left_out_after_the_images_have_moved(run, damaged, tmp_path, capsys):
    moved = shutil.copytree(damaged, tmp_path / "elsewhere")
    assert references(run, moved, capsys) == 78
    found = json.loads((run / BAD_IMAGES).read_text())
    whole = {str(damaged / name): reason for name, reason in found.items()}  # as earlier versions wrote them
    (run / BAD_IMAGES).write_text(json.dumps(whole))
    assert references(run, damaged, capsys) == 78


def test_images_of_another_set_with_the_same_names_are_used(run, images, tmp_path, capsys):
    other = shutil.copytree(images, tmp_path / "other")
    (other / "train" / "blobs" / "003.png").rename(other / "train" / "blobs" / "new.png")
    assert references(run, other, capsys) == 80


def test_others_are_named(run, damaged, capsys):
    (run / BAD_IMAGES).unlink()
    assert code(evaluate, "knn", run, "--k", 5) == WRONG_INPUT
    assert "cannot read the image" in capsys.readouterr().err
