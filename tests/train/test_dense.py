"""Dense linear probe: IoU against scikit-learn, training, the command, and what it refuses."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from tests.commands import run as run_command
from tests.interruption import interrupting
from tests.train.timm_weights import saved, timm_network
from train import evaluate, report
from train.cli import DONE, INTERRUPTED, WRONG_INPUT
from train.data.datasets.masks import UNKNOWN
from train.evaluation.classifiers import Hyperparameters
from train.evaluation.overlap import overlap, pixel_counts
from train.evaluation.protocols.dense import DenseClassifiers, DenseTraining

RANDOM = np.random.default_rng(0)
NAMES = ("sky", "ground", "tree", "car")
run = partial(run_command, evaluate)


def test_iou_equals_scikit_learns():
    predicted, targets = torch.randint(4, (2, 6, 5, 7))
    targets[targets == 3] = 1  # class 3 is predicted, but does not occur
    targets[0, :2] = UNKNOWN
    found = overlap(pixel_counts(predicted, targets.to(torch.uint8), 4), NAMES)
    known = targets != UNKNOWN
    expected = jaccard_score(targets[known], predicted[known], average=None, labels=range(4))
    assert [found.iou[name] for name in NAMES[:3]] == pytest.approx(expected[:3].tolist())
    assert found.iou["car"] is None and found.mean_iou == pytest.approx(expected[:3].mean())
    assert found.pixel_accuracy == pytest.approx((predicted == targets)[known].double().mean().item())


def test_interval_shrinks_with_the_number_of_images():
    def interval(images):
        targets = torch.randint(3, (images, 4, 4))
        wrong = torch.rand(images, 1, 1) < 0.3  # whole images are right or wrong
        return overlap(pixel_counts((targets + wrong) % 3, targets.to(torch.uint8), 3), NAMES[:3]).interval

    few, many = interval(30), interval(750)
    assert many < few / 2.5 and 0.1 < few < 0.4
    assert overlap(pixel_counts(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).byte(), 2), "ab").interval == 0


def test_classifiers_learn_classes_that_are_linear_in_the_features():
    targets = torch.randint(3, (32, 6, 6), dtype=torch.uint8)
    noise = torch.randn(2, 32, 5, 6, 6)
    features = {"a": noise[0].clone(), "b": noise[1]}
    features["a"][:, :3] += 8 * torch.nn.functional.one_hot(targets.long(), 3).permute(0, 3, 1, 2)
    targets[:, 0] = UNKNOWN
    features = {name: maps.flatten(1) for name, maps in features.items()}
    hparams = Hyperparameters(epochs=30, batch_size=16, lr=1.6, momentum=0.9, seed=0)
    classifiers = DenseClassifiers(dict.fromkeys("ab", (5, 6, 6)), 3, 6, hparams.seed)
    training = DenseTraining(classifiers, hparams, 2)
    for _ in range(30):
        for rows in (slice(16), slice(16, 32)):
            training.train_step(({name: table[rows] for name, table in features.items()}, targets[rows]))
    classifiers.eval()
    found = {
        name: overlap(pixel_counts(logits.argmax(1), targets, 3), NAMES[:3]).mean_iou
        for name, logits in classifiers(features)
    }
    assert found["a"] > 0.97 > 0.6 > found["b"]


def test_logits_are_resized_bilinearly_and_networks_are_independent():
    features = {"a": torch.randn(2, 4 * 2 * 3), "b": torch.randn(2, 5 * 2 * 2)}
    both = DenseClassifiers({"a": (4, 2, 3), "b": (5, 2, 2)}, 3, 8, seed=1).eval()
    alone = DenseClassifiers({"a": (4, 2, 3)}, 3, 8, seed=1).eval()
    (_, expected), (logits_of_b, logits) = next(alone(features)), list(both(features))[1]
    assert logits_of_b == "b" and logits.shape == (2, 3, 8, 8)
    torch.testing.assert_close(dict(both(features))["a"], expected)
    maps = both.layers[1](features["b"].view(2, 5, 2, 2))
    torch.testing.assert_close(logits[:, :, 3:5, 3:5].mean((2, 3)), maps.mean((2, 3)))


COMMON = ("--epochs", 4, "--batch-size", 6, "--workers", 0, "--device", "cpu")


def results(out, name="dense"):
    return json.loads((out / "evaluation" / f"{name}.json").read_text())


def test_command_compares_networks_with_untrained_ones_and_the_majority_class(trained, masked, capsys):
    assert run("dense", trained, "--data", masked, *COMMON) == DONE
    shown = capsys.readouterr().out
    found = results(trained)
    assert (found["train_images"], found["test_images"], found["classes"]) == (24, 10, {"0": 0, "3": 3})
    assert found["networks"].keys() == {"c8-d1111", "c8-d1121", "c16-d2121"}
    assert found["map"]["c16-d2121"] == [128, 2, 2]
    for network in found["networks"].values():
        for state in ("dense", "untrained"):
            assert 0 <= network[state]["mean_iou"] <= network[state]["pixel_accuracy"] <= 1
            assert network[state]["iou"].keys() == {"0", "3"} and network[state]["interval"] >= 0
        assert network["parameters"] > 0
    majority = found["majority_class"]
    assert majority["class"] == "0" and majority["iou"]["3"] == 0
    assert majority["mean_iou"] == pytest.approx(majority["pixel_accuracy"] / 2)
    assert found["verdict"]["conclusion"] in shown and "majority class, 0" in shown
    assert {"dense.json", "dense.md", "dense.png"} <= {path.name for path in (trained / "evaluation").iterdir()}
    run_command(report, trained)
    html = (trained / "report" / "index.html").read_text()
    assert "mean IoU %" in html and "majority class" in html


def test_interrupted_command_continues_to_the_same_result(trained, masked, capsys):
    assert run("dense", trained, "--data", masked, *COMMON) == DONE
    expected = (trained / "evaluation" / "dense.json").read_text()
    for checkpoints in (trained / "evaluation" / "classifiers").iterdir():
        for file in checkpoints.iterdir():
            file.unlink()
    with interrupting(DenseTraining, 5):
        assert run("dense", trained, "--data", masked, *COMMON) == INTERRUPTED
    assert "error: interrupted; the same command continues from what was saved" in capsys.readouterr().err
    assert run("dense", trained, "--data", masked, *COMMON) == DONE
    assert (trained / "evaluation" / "dense.json").read_text() == expected


def test_published_networks_have_no_untrained_ones(masked, tmp_path):
    weights = f"timm:test_resnet={saved(timm_network('test_resnet', num_classes=0), tmp_path / 'theirs.safetensors')}"
    options = ("--weights", weights, "--image-size", 32, "--data", masked)
    assert run("dense", tmp_path / "out", *options, *COMMON) == DONE
    (network,) = results(tmp_path / "out", "dense-timm-test_resnet-theirs")["networks"].values()
    assert "untrained" not in network and 0 < network["dense"]["mean_iou"] < 1


def rewrite(root, change):
    for path in root.glob("*/masks/*.png"):
        Image.fromarray(change(np.array(Image.open(path)))).save(path)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda mask: np.zeros_like(mask), (), "have the values 0, of which --ignore-labels 255 leaves fewer than two"),
        (lambda mask: mask, ("--ignore-labels", "0,255"), "have the values 0, 3, 255, of which --ignore-labels 0,255"),
        (lambda mask: mask, ("--ignore-labels", "x"), "--ignore-labels 'x': give whole numbers, or none"),
        (lambda mask: mask, ("--masks", "other"), "has no images beside masks"),
        (
            lambda mask: RANDOM.integers(0, 3000, mask.shape, dtype=np.uint16),
            (),
            "have .* values from .* to 2,9.*: these are no indices of at most 250 classes",
        ),
        (
            lambda mask: np.full_like(mask, 255) if mask[5, 5] == 3 else mask,
            (),
            r"masks have no class but --ignore-labels 255, such as that of .*png: take them out",
        ),
    ],
)
def test_masks_that_cannot_be_used_are_refused_before_features_are_computed(
    change, options, message, trained, masked, tmp_path, capsys
):
    root = shutil.copytree(masked, tmp_path / "other")
    rewrite(root, change)
    assert run("dense", trained, "--data", root, *COMMON, *options) == WRONG_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert not (trained / "features").exists()


def test_images_without_masks_are_refused(trained, images, capsys):
    assert run("dense", trained, "--data", images, *COMMON) == WRONG_INPUT
    assert (
        "has no images beside masks: give a folder with images/ and masks/ in train/ and val/"
        in capsys.readouterr().err
    )
