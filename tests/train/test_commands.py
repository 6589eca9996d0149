"""The commands: files that they write, invalid input, exit codes and help."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dspnet_fast import exported
from dspnet_fast.nn import activate
from tests.commands import run
from train import evaluate, export, pretrain
from train.cli import DONE, FAILED, WRONG_INPUT
from train.data.datasets import open_images
from train.data.normalization import normalize
from train.evaluation.pretrained import PretrainedFamily
from train.pretraining.run import PretrainRun

SETUP = Path(__file__).parents[2] / "setup.py"
ENTRIES = re.findall(r'"(dspnet-\w+) = dspnet_fast\.(train[\w.]+):main"', SETUP.read_text())


def test_run_directory_has_config_metrics_log_and_tensorboard(finished):
    assert {path.name for path in finished.iterdir()} >= {"config.yaml", "metrics.jsonl", "train.log", "tensorboard"}
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    probes = [line for line in lines if "knn" in line]
    assert [line["step"] for line in probes] == [0, 10, 20]
    names = {"c8-d1111", "c8-d1121", "c16-d2121"}
    assert all(line["knn"].keys() == line["feature_std"].keys() == names for line in probes)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert {"learning_rate", "tau", "images_per_second", "data_wait", "epoch"} <= steps[0].keys()
    assert [set(line["loss"]) for line in steps[:5]] == [{"c16-d2121"}] * 5, "the warm-up trains only the full network"
    assert all(set(line["loss"]) == names for line in steps[5:])
    assert list((finished / "tensorboard").iterdir())
    assert "pretrained c8-d1111, c8-d1121, c16-d2121" in (finished / "train.log").read_text()


def test_saved_config_reproduces_the_run(finished, tmp_path):
    again = tmp_path / "again"
    assert run(pretrain, "--config", finished / "config.yaml", "--out", again) == DONE
    first, second = (yaml.safe_load((out / "config.yaml").read_text()) for out in (finished, again))
    assert {name for name in first if first[name] != second[name]} == {"out"}
    for name in ("step-00000020.pt",):
        old, new = (torch.load(out / "checkpoints" / name, weights_only=True) for out in (finished, again))
        torch.testing.assert_close(old["model"], new["model"], rtol=0, atol=0)


def test_printed_config_can_be_read_again(arguments, capsys, tmp_path):
    assert run(pretrain, *arguments(), "--fast-kernels", "--print_config") == DONE
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["fast_kernels"] is True and printed["image_size"] == 12
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(printed))
    options = pretrain.make_parser().parse_args(["--config", str(tmp_path / "c.yaml"), "--epochs", "7"])
    assert (options.epochs, options.image_size, options.fast_kernels) == (7, 12, True)


def test_init_from_copies_the_weights_of_another_run(finished, arguments, tmp_path, small):
    started = PretrainRun(small(init_from=str(finished)), resume=False).trainer
    state = torch.load(finished / "checkpoints" / "step-00000020.pt", weights_only=True)
    torch.testing.assert_close(started.model.state_dict(), state["model"], rtol=0, atol=0)
    assert started.step == 0
    code = run(pretrain, *arguments(init_from=finished, dns="c8-d1111", out=tmp_path / "other"))
    assert code == WRONG_INPUT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "/nowhere/at/all"}, "no image dataset"),
        ({"dns": "c8-d1111,w0.50"}, "named by channels and blocks"),
        ({"dns": "c8-d1122,c16-d2111"}, "does not nest"),
        ({"dns": " , "}, "--dns names no network"),
        ({"network": "vgg"}, "unknown network 'vgg': use one of mobilenet_v3_large, resnet, timm:NAME"),
        ({"batch_size": 500}, "batch of 500"),
        ({"train_images": 500}, "a subset of 500 of the 80"),
        ({"tau": 1.5}, "--tau must lie between 0 and 1"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"subnets_per_step": 1}, "at least"),
        ({"out": None}, "--out is missing"),
        ({"device": "cuda"}, "no CUDA device" if not torch.cuda.is_available() else "unused"),
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml"),
        ({"image_sizes": 3}, "image-sizes"),
    ],
)
def test_invalid_input_gives_one_line_and_exit_code_2(arguments, tmp_path, capsys, options, message):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert run(pretrain, *arguments(**options)) == WRONG_INPUT
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_empty_folders_and_unreadable_images_are_refused(arguments, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(pretrain, *arguments(data=tmp_path / "empty")) == WRONG_INPUT
    assert "empty" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for index in range(16):
        Image.new("RGB", (16, 16), (index, 9, 9)).save(broken / f"{index:02}.png")
    (broken / "07.png").write_bytes(b"no image")
    for workers in (0, 1):
        out = tmp_path / f"run{workers}"
        assert run(pretrain, *arguments(data=broken, workers=workers, probe_epochs=0, out=out)) == WRONG_INPUT
        error = capsys.readouterr().err
        assert "07.png" in error and "Traceback" not in error


def test_unreadable_image_ends_the_run_after_saving(images, arguments, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    broken = sorted(folder.glob("train/*/*.png"))[3]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    assert run(pretrain, *arguments(data=folder, probe_epochs=0)) == WRONG_INPUT
    assert broken.name in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    saved = max((tmp_path / "run" / "checkpoints").iterdir())
    assert saved.name == f"step-{len(lines):08}.pt" and len(lines) > 0
    broken.write_bytes(whole)
    assert run(pretrain, "--resume", "--out", tmp_path / "run") == DONE
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 20


def test_folder_without_classes_pretrains_without_knn(arguments, tmp_path):
    for index in range(16):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.effect_noise((20, 20), 50).save(tmp_path / "flat" / f"{index:02}.png")
    assert run(pretrain, *arguments(data=tmp_path / "flat", epochs=1)) == DONE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("feature_std" in line for line in lines) and not any("knn" in line for line in lines)


def test_existing_run_is_never_overwritten(finished, arguments, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run(pretrain, *arguments(out=finished, data="no images")) == WRONG_INPUT
    assert "holds a run already: add --resume" in capsys.readouterr().err
    assert run(pretrain, *arguments(out=finished, base_lr=9, dns="c8-d1111"), "--resume") == WRONG_INPUT
    assert "another --dns, --base-lr" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_commands_refuse_a_folder_without_a_run(tmp_path, capsys):
    nowhere = ("--data", tmp_path / "no images")  # not read before the run directory is found
    assert run(pretrain, "--resume", "--out", tmp_path / "new", *nowhere) == WRONG_INPUT
    assert "holds no run" in capsys.readouterr().err
    assert run(evaluate, "knn", tmp_path / "new") == WRONG_INPUT
    assert run(export, tmp_path / "new") == WRONG_INPUT


def test_resume_refuses_a_checkpoint_of_another_network(finished, arguments, tmp_path, capsys):
    assert run(pretrain, *arguments(dns="c8-d1111", epochs=1)) == DONE
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes((finished / "checkpoints" / "step-00000020.pt").read_bytes())
    assert run(pretrain, "--resume", "--out", tmp_path / "run") == WRONG_INPUT
    assert "checkpoint is of another network" in capsys.readouterr().err


def test_unexpected_error_gives_one_line_and_exit_code_1(arguments, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("the sky fell\nmany details")

    monkeypatch.setattr(pretrain, "PretrainRun", fail)
    assert run(pretrain, *arguments()) == FAILED
    error = capsys.readouterr().err
    assert "RuntimeError: the sky fell (--debug shows the traceback)" in error and "details" not in error
    assert run(pretrain, *arguments(), "--debug") == FAILED
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "module"), ENTRIES)
def test_help_has_usage_and_example_with_the_installed_name(name, module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(importlib.import_module(module), "--help") == DONE
    shown = capsys.readouterr().out
    assert f"usage: {name} " in shown and f"examples:\n  {name} " in shown
    assert not re.search(r"\btrain\.(?!log)|python -m", shown)
    assert "-\n" not in shown, "names of options and commands stay whole"


def test_help_names_the_folder_of_the_recipes(capsys):
    assert run(pretrain, "--help") == DONE
    (folder,) = re.findall(r"^The folder recipes/ is (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert (Path(folder) / "dspnet_mobilenet-v3_imagenet_300e.yaml").is_file()


def test_evaluate_knn_equals_scikit_learn(finished, images, capsys):
    assert run(evaluate, "knn", finished, "--baselines", "--k", "5", "--workers", "0") == DONE
    report = json.loads((finished / "evaluation" / "knn.json").read_text())
    assert list(report["networks"]) == ["c8-d1111", "c8-d1121", "c16-d2121"]
    assert (report["references"], report["queries"], report["k"], report["step"]) == (80, 40, 5, 20)
    assert {"parameters", "macs", "pretrained", "untrained"} == report["networks"]["c8-d1111"].keys()
    costs = [network["macs"] for network in report["networks"].values()]
    assert costs == sorted(costs)
    assert (finished / "evaluation" / "knn.png").stat().st_size > 1000
    assert "| raw pixels 16x16 |" in (finished / "evaluation" / "knn.md").read_text()
    assert "c16-d2121" in capsys.readouterr().out

    trained = PretrainedFamily(finished, torch.device("cpu"))
    assert trained.restore_statistics(list(trained.family)), "the statistics were saved"
    sets = {split: open_images(str(images), split) for split in ("train", "test")}
    with torch.no_grad(), activate(trained.encoder, "c8-d1121"):
        features = {
            split: torch.cat([trained.encoder(batch) for batch in trained.batches(part, split, 0)])
            for split, part in sets.items()
        }
    neighbours = KNeighborsClassifier(5, metric="cosine").fit(features["train"], sets["train"].labels)
    accuracy = neighbours.score(features["test"], sets["test"].labels)
    assert report["networks"]["c8-d1121"]["pretrained"]["majority"] == accuracy


def test_evaluate_refuses_unlabelled_images_and_too_many_neighbours(finished, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for index in range(30):
        Image.new("RGB", (16, 16), (index, 9, 9)).save(tmp_path / "flat" / f"{index:02}.png")
    assert run(evaluate, "knn", finished, "--data", tmp_path / "flat") == WRONG_INPUT
    assert "labels" in capsys.readouterr().err
    assert run(evaluate, "knn", finished, "--k", "500") == WRONG_INPUT
    assert run(evaluate) == WRONG_INPUT


def test_exported_networks_equal_the_subnets(finished, images, capsys):
    assert run(export, finished) == DONE
    assert run(export, finished, "--dn", "c8-d2121") == DONE, "a network that the run did not train"
    trained = PretrainedFamily(finished, torch.device("cpu"))
    dns = ["c8-d1111", "c8-d1121", "c8-d2121", "c16-d2121"]
    subnets = [trained.encoder.subnet(dn) for dn in dns]
    assert trained.restore_statistics(subnets)
    pixels = torch.cat(list(trained.batches(open_images(str(images), "test"), "test", 0))).double()
    for subnet in subnets:
        folder = finished / "exported" / subnet.name
        manifest = json.loads((folder / "manifest.json").read_text())
        network = exported.load(folder)
        with torch.no_grad(), activate(trained.encoder.double(), subnet):
            torch.testing.assert_close(network.double()(pixels), trained.encoder(pixels))
        assert manifest["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert manifest["batch_norm"]["images"] == 80 and manifest["batch_norm"]["step"] == 20
        assert manifest["pretraining"]["data"] == str(images)
    assert run(export, finished, "--dn", "c32-d1111") == WRONG_INPUT
    assert "no part of c16-d2121" in capsys.readouterr().err


def test_normalize_matches_the_manifest(finished):
    manifest = json.loads((finished / "exported" / "c8-d1111" / "manifest.json").read_text())
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(manifest["normalization"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(normalize(pixels), (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-5)
