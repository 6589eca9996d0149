"""Linear evaluation: classifiers against scikit-learn, saved features, resuming."""

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dspnet_fast.errors import InputError
from tests.commands import run as run_command
from tests.interruption import interrupting
from train import evaluate
from train.cli import DONE, INTERRUPTED, WRONG_INPUT
from train.data.datasets import open_images
from train.data.datasets.images import Subset
from train.data.loader import evaluation_batches
from train.data.normalization import normalize
from train.data.sampler import EpochSampler
from train.evaluation import features
from train.evaluation.accuracy import accuracies, interval95
from train.evaluation.classifiers import Classifiers, ClassifierTraining, Hyperparameters, feature_batches
from train.evaluation.classifiers import evaluate as evaluate_classifiers
from train.evaluation.pretrained import BATCH, PretrainedFamily

CPU = torch.device("cpu")
DNS = ["c8-d1111", "c16-d1111"]  # of real_features


run = partial(run_command, evaluate)


def report(out):
    return json.loads((out / "evaluation" / "linear.json").read_text())


def train_classifiers(train, labels, epochs=80, names=None):
    chosen = {name: train[name] for name in names or train}
    hparams = Hyperparameters(epochs, 256, 0.2, 0.9, seed=0)
    classifiers = Classifiers({name: rows.shape[1] for name, rows in chosen.items()}, 10, hparams.seed)
    order = EpochSampler(len(labels), hparams.batch_size, hparams.seed, hparams.epochs)
    training = ClassifierTraining(classifiers, hparams, order.steps_per_epoch)
    for batch in feature_batches(chosen, labels, order, CPU):
        training.train_step(batch)
    assert training.step == training.steps
    return classifiers


def test_accuracy_is_within_the_interval_of_scikit_learns_logistic_regression(real_features):
    (train, train_labels), (test, test_labels) = real_features
    found = evaluate_classifiers(train_classifiers(train, train_labels), test, test_labels, CPU)
    for name in DNS:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train[name], train_labels)
        expected = model.score(test[name], test_labels)
        assert abs(found[name].top1 - expected) <= found[name].interval
        assert found[name].top1 > 0.1 + 5 * found[name].interval, "above chance, which is 10 %"


def test_networks_trained_together_equal_networks_trained_separately(real_features):
    (train, labels), (test, test_labels) = real_features
    together = train_classifiers(train, labels, epochs=2)
    alone = train_classifiers(train, labels, epochs=2, names=DNS[:1])
    logits, expected = (trained.eval()(test)[DNS[0]] for trained in (together, alone))
    torch.testing.assert_close(logits, expected)


def test_accuracies_equal_scikit_learns(real_features):
    _, (_, labels) = real_features
    logits = torch.randn(len(labels), 10) + 2 * torch.nn.functional.one_hot(labels, 10)
    batches = zip(logits.split(300), labels.split(300))
    found = accuracies(({"a": rows}, of_rows) for rows, of_rows in batches)["a"]
    assert found.top1 == pytest.approx(top_k_accuracy_score(labels, logits, k=1))
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert found.interval == interval95(found.top1, len(labels))
    (few,) = accuracies([({"a": torch.eye(3)}, torch.tensor([0, 1, 0]))]).values()
    assert (few.top1, few.top5) == (pytest.approx(2 / 3), 1.0), "with three classes top 5 is 1"
    with pytest.raises(InputError, match="no test images"):
        accuracies([])


def test_second_call_reuses_features_and_classifiers(trained, monkeypatch, capsys):
    assert run("linear", trained, "--epochs", "3", "--batch-size", "16", "--workers", "0") == DONE
    first = report(trained)
    assert list(first["networks"]) == ["c8-d1111", "c8-d1121", "c16-d2121"]
    assert (first["train_images"], first["test_images"], first["step"]) == (80, 40, 20)
    for network in first["networks"].values():
        assert network.keys() == {"parameters", "macs", "linear"}
        assert network["linear"].keys() == {"top1", "top5", "interval"} and network["linear"]["top5"] == 1.0
    assert "| c16-d2121 |" in (trained / "evaluation" / "linear.md").read_text()
    assert (trained / "evaluation" / "linear.png").stat().st_size > 1000
    assert "c16-d2121" in capsys.readouterr().out
    saved = max((np.load(path) for path in (trained / "features").glob("c16-d2121-*.npy")), key=len)
    assert saved.shape == (80, 128) and saved.dtype == np.float32
    expected = next(iter(evaluation_batches(open_images(first["data"], "train"), range(80), 12, BATCH, 0)))
    encoder = PretrainedFamily(trained, CPU)
    assert encoder.restore_statistics([encoder.family.full]), "the statistics were saved"
    found = features.extract(encoder.encoder, [encoder.family.full], [normalize(expected)])["c16-d2121"]
    np.testing.assert_allclose(saved, found, rtol=1e-5, atol=1e-6)

    def refuse(*_):
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr("train.evaluation.pretrained.representations", refuse)
    monkeypatch.setattr("train.evaluation.pretrained.post_statistics", refuse)
    monkeypatch.setattr(ClassifierTraining, "train_step", refuse)
    assert run("linear", trained, "--epochs", "3", "--batch-size", "16", "--workers", "0") == DONE
    assert report(trained) == first
    assert run("knn", trained, "--workers", "0") == DONE, "kNN uses the same features"


def test_features_are_recomputed_for_other_weights_statistics_or_images(trained, images):
    encoder = PretrainedFamily(trained, CPU)
    full = [encoder.family.full]
    train = open_images(str(images), "train")
    encoder.measure_statistics(full, train, str(images), 0)
    saved = encoder.features(full, train, "train", 0)
    assert len(list((trained / "features").iterdir())) == 1
    encoder.features(full, Subset(train, range(40)), "train", 0)
    assert len(list((trained / "features").iterdir())) == 2, "other images"
    encoder.measure_statistics(full, Subset(train, range(40)), str(images), 0)
    encoder.features(full, train, "train", 0)
    assert len(list((trained / "features").iterdir())) == 3, "other statistics"
    other = PretrainedFamily(trained, CPU)
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(2)
    other.measure_statistics(full, train, str(images), 0)
    assert not torch.equal(other.features(full, train, "train", 0)["c16-d2121"], saved["c16-d2121"])


@pytest.mark.parametrize("cut", [0, 7])
def test_features_continue_after_the_last_whole_batch(tmp_path, cut):
    """The partial file lacks its last `cut` bytes, as after a kill."""
    rows = {"a": torch.randn(10, 3), "b": torch.randn(10, 2)}
    files = {name: tmp_path / "features" / f"{name}.npy" for name in rows}
    shapes = {name: tuple(table.shape) for name, table in rows.items()}
    starts = []

    def compute(stop):
        def batches(names, start):
            starts.append((names, start))
            for row in range(start, 10, 4):
                if row >= stop:
                    raise KeyboardInterrupt
                yield {name: rows[name][row : row + 4] for name in names}

        return batches

    with pytest.raises(KeyboardInterrupt):
        features.load_or_compute(files, shapes, 4, compute(8))
    assert not any(path.exists() for path in files.values())
    partial = files["b"].with_suffix(".partial")
    os.truncate(partial, partial.stat().st_size - cut)
    for _ in range(2):
        found = features.load_or_compute(files, shapes, 4, compute(99))
        assert all(torch.equal(found[name], rows[name]) for name in rows)
    assert starts == [(["a", "b"], 0), (["a", "b"], 4 if cut else 8)]
    files["b"].unlink()
    features.load_or_compute(files, shapes, 4, compute(99))
    assert starts[2:] == [(["b"], 0)]


@pytest.mark.parametrize("damage", [b"", b"no array", None])
def test_damaged_feature_file_is_named(tmp_path, damage):
    files, shapes = {"a": tmp_path / "a.npy"}, {"a": (4, 3)}
    features.load_or_compute(files, shapes, 4, lambda *_: [{"a": torch.randn(4, 3)}])
    files["a"].write_bytes(files["a"].read_bytes()[:-1] if damage is None else damage)
    with pytest.raises(InputError, match="a.npy is damaged.*delete it"):
        features.load_or_compute(files, shapes, 4, lambda *_: [])
    with pytest.raises(InputError, match="is not a float32 array"):
        np.save(files["a"], np.zeros((4, 3)))
        features.load_or_compute(files, shapes, 4, lambda *_: [])


def test_full_disk_is_reported_before_features_are_computed(tmp_path):
    with pytest.raises(InputError, match="make room"):
        features.load_or_compute({"a": tmp_path / "a.npy"}, {"a": (10**12, 10**6)}, 4, lambda *_: [])


@pytest.mark.parametrize("augment", [(), ("--augment",)])
def test_resumed_training_equals_an_uninterrupted_one(trained, tmp_path, monkeypatch, capsys, augment):
    other = shutil.copytree(trained, tmp_path / "other")
    command = ("--epochs", "3", "--batch-size", "16", "--workers", "0", *augment)
    assert run("linear", other, *command) == DONE
    train_step, steps = ClassifierTraining.train_step, []

    def noting(self, batch):
        steps.append(self.step)
        return train_step(self, batch)

    monkeypatch.setattr(ClassifierTraining, "train_step", noting)
    with interrupting(ClassifierTraining, 7):
        assert run("linear", trained, *command) == INTERRUPTED
    assert "error: interrupted; the same command continues from what was saved" in capsys.readouterr().err
    assert run("linear", trained, *command) == DONE
    assert steps == list(range(15)), "none is repeated"
    assert report(trained) == report(other)
    states = [next((out / "evaluation" / "classifiers").rglob("step-00000015.pt")) for out in (trained, other)]
    first, second = (torch.load(state, weights_only=True)["classifiers"] for state in states)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "0"), "--epochs must be at least 1, not 0"),
        (("--momentum", "1"), "--momentum must be"),
        (("--lr", "-1"), "--lr must be above 0"),
        (("--augment", "--min-scale", "2"), "--min-scale must lie between 0 and 1, not 2.0"),
        (("--data", "/nowhere"), "no image dataset"),
    ],
)
def test_invalid_options_are_refused(finished, capsys, options, message):
    assert run("linear", finished, *options) == WRONG_INPUT
    assert message in capsys.readouterr().err


def test_disk_that_fills_up_is_named_and_keeps_whole_batches(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of file sizes exist on Unix alone")
    rows, starts = torch.randn(8, 100), []

    def compute(names, start):
        starts.append(start)
        return ({"a": part} for part in rows[start:].split(4))

    call = partial(features.load_or_compute, {"a": tmp_path / "a.npy"}, {"a": (8, 100)}, 4, compute)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match=f"the disk is full: {tmp_path} could not be written"):
            call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(call()["a"], rows) and starts == [0, 4]
