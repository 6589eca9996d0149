"""Semi-supervised evaluation: published subsets, training on them, resuming."""

import hashlib
import json
import shutil
import signal
from functools import partial

import pytest
import torch

from dspnet_fast.errors import InputError
from dspnet_fast.nn import activate
from dspnet_fast.slim import slim
from tests.commands import run as run_command
from train import evaluate
from train.cli import DONE, INTERRUPTED, WRONG_INPUT
from train.data.datasets import open_images
from train.data.datasets.stratified import checksum, index_text, stratified_subset
from train.evaluation.classifiers import ClassifierTraining
from train.evaluation.pretrained import PretrainedFamily
from train.evaluation.protocols.semi import fitting_batch
from train.evaluation.supervised import SupervisedTraining

SMALL = ("--batch-size", "16", "--epochs", "2", "--finetune-epochs", "3", "--workers", "0", "--shares", "5,25")


run = partial(run_command, evaluate)


def report(out):
    return json.loads((out / "evaluation" / "semi.json").read_text())


@pytest.mark.parametrize(
    ("percent", "sha256"),
    [
        (1, "f76ec9a1752b1506b3227ab33d8887c15fb624f260d295f4e12da9fca75f7d81"),
        (10, "35bb2abbf6f67fcd731ad1b3d46f9b462cc18175fb4c155cf8171523263d33b4"),
    ],
)
def test_published_subsets_of_ten_classes_of_5000_images(percent, sha256):
    """CIFAR-10 as an image folder: the published lists must never change."""
    labels = torch.arange(10).repeat_interleave(5000)
    chosen = stratified_subset(labels, percent / 100)
    assert checksum(chosen) == sha256 == hashlib.sha256(index_text(chosen).encode()).hexdigest()
    assert labels[chosen].bincount().tolist() == [50 * percent] * 10
    assert chosen == sorted(set(chosen))


def test_subsets_are_nested_balanced_and_depend_on_the_seed():
    labels = torch.tensor([0, 1] * 100 + [1] * 200 + [2] * 3)
    one, ten = (stratified_subset(labels, share) for share in (0.01, 0.1))
    assert set(one) < set(ten)
    assert labels[one].bincount().tolist() == [1, 3, 1], "rounded, at least one"
    assert labels[ten].bincount().tolist() == [10, 30, 1]
    assert ten != stratified_subset(labels, 0.1, seed=1)
    assert stratified_subset(labels, 1.0) == list(range(len(labels)))
    for share in (0, 1.01):
        with pytest.raises(InputError, match="at most 100 percent"):
            stratified_subset(labels, share)


@pytest.fixture(scope="module")
def complete(finished, tmp_path_factory):
    """A run evaluated with both methods."""
    out = tmp_path_factory.mktemp("complete") / "run"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("features", "evaluation"))
    assert run("semi", out, *SMALL) == DONE
    return out


def test_semi_writes_report_figure_and_subsets(complete, images):
    found = report(complete)
    columns = ["5 % linear", "5 % finetune", "25 % linear", "25 % finetune"]
    for network in found["networks"].values():
        assert list(network) == ["parameters", "macs", *columns]
        assert all(network[column].keys() == {"top1", "top5", "interval"} for column in columns)
    labels = open_images(str(images), "train").labels
    for percent, per_class in (("5", 2), ("25", 10)):
        subset = found["subsets"][f"{percent} %"]
        text = (complete / "evaluation" / subset["file"]).read_text()
        assert hashlib.sha256(text.encode()).hexdigest() == subset["sha256"]
        indices = [int(line) for line in text.splitlines()]
        assert labels[indices].bincount().tolist() == [per_class, per_class] and len(indices) == subset["images"]
    assert "| c16-d2121 |" in (complete / "evaluation" / "semi.md").read_text()
    assert (complete / "evaluation" / "semi.png").stat().st_size > 1000


def test_second_call_trains_nothing(complete, monkeypatch):
    before = report(complete)

    def refuse(*_):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(SupervisedTraining, "train_step", refuse)
    monkeypatch.setattr(ClassifierTraining, "train_step", refuse)
    assert run("semi", complete, *SMALL) == DONE
    assert report(complete) == before


@pytest.mark.parametrize(
    ("images", "batch"), [(500, 250), (5000, 250), (128_117, 255), (80, 80), (512, 256), (257, 256)]
)
def test_fitting_batch_drops_few_images(images, batch):
    assert fitting_batch(256, images) == batch


def test_single_method_gives_the_same_results(trained, complete):
    assert run("semi", trained, *SMALL, "--methods", "linear") == DONE
    for name, network in report(trained)["networks"].items():
        columns = {column for column in network if "%" in column}
        assert columns == {"5 % linear", "25 % linear"}
        assert all(network[column] == report(complete)["networks"][name][column] for column in columns)


def test_finetuning_with_all_labels_learns_in_every_network(trained):
    options = ("--shares", "100", "--methods", "finetune", "--finetune-epochs", "5", "--finetune-lr", "0.5")
    assert run("semi", trained, *options, "--finetune-head-lr", "0.5", "--batch-size", "16", "--workers", "0") == DONE
    for network in report(trained)["networks"].values():
        assert network["100 % finetune"]["top1"] >= 0.9


@pytest.mark.parametrize("dn", ["c8-d1111", "c8-d1121", "c16-d2121"])
def test_cut_equals_slim(trained, images, dn):
    family = PretrainedFamily(trained, torch.device("cpu"))
    subnet = family.family.find(dn)
    family.measure_statistics([subnet], open_images(str(images), "train"), str(images), 0)
    plain, cut = slim(family.encoder, subnet), family.cut(subnet)
    assert {n: p.shape for n, p in cut.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(cut.get_parameter(name), parameter, rtol=0, atol=0)
    batch = torch.randn(4, 3, 12, 12)
    with activate(family.encoder.train(), subnet):
        torch.testing.assert_close(cut.train()(batch), family.encoder(batch))


def test_cut_refuses_a_network_outside_the_family(finished):
    family = PretrainedFamily(finished, torch.device("cpu"))
    with pytest.raises(InputError, match="no part of c16-d2121"):
        family.cut(family.encoder.subnet("c32-d1111"))


def test_resumed_finetuning_equals_an_uninterrupted_one(trained, complete, monkeypatch, capsys):
    command = (*SMALL, "--methods", "finetune")
    train_step, steps = SupervisedTraining.train_step, []

    def interrupting(self, batch):
        loss = train_step(self, batch)
        steps.append((self.family.full.name, self.step))
        if len(steps) == 4:  # the second step of the first network
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(SupervisedTraining, "train_step", interrupting)
    assert run("semi", trained, *command) == INTERRUPTED
    assert "error: interrupted; the same command continues from what was saved" in capsys.readouterr().err
    assert run("semi", trained, *command) == DONE
    five, quarter = steps[:9], steps[9:]  # 5 %: 4 images, 1 step per epoch; 25 %: 20 images, 2 steps of 10
    assert (len(five), len(set(five))) == (9, 9) and (len(quarter), len(set(quarter))) == (18, 18)
    for name, network in report(trained)["networks"].items():
        for column in ("5 % finetune", "25 % finetune"):
            assert network[column] == report(complete)["networks"][name][column]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shares", "1,x"), "--shares must be percentages"),
        (("--shares", "0"), "--shares must be percentages"),
        (("--shares", "101"), "--shares must be percentages"),
        (("--methods", "linear,distil"), "--methods must be among linear, finetune"),
        (("--finetune-lr", "0"), "--finetune-lr must be above 0"),
        (("--min-scale", "0"), "smallest crop"),
    ],
)
def test_invalid_options_are_refused(finished, capsys, options, message):
    assert run("semi", finished, *options) == WRONG_INPUT
    assert message in capsys.readouterr().err
