"""Export of fine-tuned networks: they include the classifier and compute the evaluated logits."""

import json
import shutil

import onnxruntime
import pytest
import torch

from dspnet_fast import exported
from dspnet_fast.nn import activate
from dspnet_fast.switchable import Switchable
from tests.commands import run
from train import detect, evaluate, export, finetune, report
from train.cli import DONE, WRONG_INPUT
from train.data.datasets import open_images
from train.evaluation.finetuned import FinetunedFamily

DNS = ("c8-d1111", "c8-d1121", "c16-d2121")
SHORT = ("--epochs=1", "--batch-size=16", "--lr=0.5", "--warmup-epochs=0", "--workers=0")


@pytest.fixture(scope="module")
def finetuned(finished, tmp_path_factory):
    """A fine-tuned family, exported in all formats."""
    out = tmp_path_factory.mktemp("finetuned") / "run"
    assert run(finetune, "--from", finished, "--out", out, "--subnets-per-step=3", *SHORT) == DONE
    assert run(export, out, "--switchable", "--threads", 1) == DONE
    assert run(export, out, "--dn", DNS[1], "--onnx", "--threads", 1) == DONE
    return out


@pytest.fixture
def out(finetuned, tmp_path):
    """A copy of the fine-tuned run without exports."""
    ignored = shutil.ignore_patterns("exported", "post_statistics*")
    return shutil.copytree(finetuned, tmp_path / "run", ignore=ignored)


@pytest.fixture(scope="module")
def tested(finetuned, images):
    """The trained family with its statistics, and views [40, 3, 12, 12] of the test images with their labels."""
    trained = FinetunedFamily(finetuned, torch.device("cpu"))
    assert set(trained.restore_statistics(list(trained.family))) == set(DNS), "the export saved the statistics"
    test = open_images(str(images), "test")
    return trained, torch.cat(list(trained.batches(test, "test", 0))).contiguous(), test.labels


@pytest.mark.parametrize("dn", DNS)
@torch.no_grad()
def test_exported_subnet_computes_the_evaluated_logits(finetuned, tested, images, dn):
    trained, pixels, labels = tested
    folder = finetuned / "exported" / dn
    logits = exported.load(folder)(pixels)
    with activate(trained.model, dn):
        torch.testing.assert_close(logits, trained.model(pixels), rtol=1e-4, atol=1e-4)
    report = json.loads((finetuned / "evaluation" / "finetune.json").read_text())
    assert (logits.argmax(1) == labels).double().mean() == report["networks"][dn]["finetuned"]["top1"]

    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["num_classes"], manifest["class_names"]) == (2, ["blobs", "stripes"])
    assert manifest["parameters"] == sum(p.numel() for p in exported.load(folder).parameters())
    assert manifest["finetuning"]["steps"] == 5 and manifest["finetuning"]["data"] == str(images)
    assert manifest["finetuning"]["family"] == list(DNS) and "pretraining" not in manifest
    assert manifest["layers"][-1]["name"] == "fc" and manifest["layers"][-1]["out_features"] == 2


@torch.no_grad()
def test_onnx_computes_logits(finetuned, tested):
    folder = finetuned / "exported" / DNS[1]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits"]
    (logits,) = session.run(None, {"images": tested[1].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), exported.load(folder)(tested[1]), rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "manifest.json").read_text())["onnx"]["largest_difference"] <= 1e-4


@torch.no_grad()
def test_switchable_file_contains_all_classifiers(finetuned, tested):
    runtime = Switchable.load(finetuned / "exported" / "switchable.safetensors")
    assert runtime.names == DNS and runtime.class_names == ("blobs", "stripes")
    for name in DNS:
        expected = exported.load(finetuned / "exported" / name)(tested[1])
        torch.testing.assert_close(runtime.use(name)(tested[1]), expected, rtol=0, atol=1e-5)
    again = finetuned.parent / "again.safetensors"
    runtime.save(again)
    assert torch.equal(Switchable.load(again)(tested[1]), runtime.use(DNS[-1])(tested[1]))


def test_network_finetuned_alone_is_exported(finished, images, tmp_path):
    out = tmp_path / "alone"
    assert run(finetune, "--from", finished, "--dn", "c8-d1121", "--out", out, *SHORT) == DONE
    assert run(export, out) == DONE
    trained = FinetunedFamily(out, torch.device("cpu"))
    trained.restore_statistics(list(trained.family))
    pixels = torch.cat(list(trained.batches(open_images(str(images), "test"), "test", 0)))
    with torch.no_grad(), activate(trained.model, "c8-d1121"):
        logits = exported.load(out / "exported" / "c8-d1121")(pixels)
        torch.testing.assert_close(logits, trained.model(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "/nowhere"}, "no image dataset '/nowhere'"),
        ({"data": "three classes"}, "has other classes than the 3 of"),
        ({"stem": "standard"}, "of another network"),
        ({"surprise": 1}, "not a configuration of this version"),
    ],
)
def test_export_refuses_changed_runs(out, images, tmp_path, capsys, change, message):
    if change.get("data") == "three classes":
        change = {"data": str(tmp_path / "images")}
        shutil.copytree(images, tmp_path / "images")
        for split in ("train", "test"):
            shutil.copytree(images / split / "blobs", tmp_path / "images" / split / "dots")
    config = out / "config.yaml"
    lines = [line for line in config.read_text().splitlines() if line.split(":")[0] not in change]
    config.write_text("\n".join([*lines, *(f"{name}: {value}" for name, value in change.items())]))
    assert run(export, out) == WRONG_INPUT
    assert message in capsys.readouterr().err and not (out / "exported").exists()


@pytest.mark.parametrize("command", [evaluate, report, detect], ids=["evaluate", "report", "detect"])
def test_other_commands_refuse_a_finetuned_run(out, capsys, command):
    before = sorted(out.rglob("*"))
    options = {evaluate: ["knn", out], report: [out], detect: [out, "--dn", DNS[0]]}
    assert run(command, *options[command]) == WRONG_INPUT
    assert f"{out} is a run of dspnet-finetune; this command needs one of dspnet-pretrain" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_export_refuses_a_network_outside_the_family(out, capsys):
    assert run(export, out, "--dn", "c32-d1111") == WRONG_INPUT
    assert "no part of c16-d2121" in capsys.readouterr().err
