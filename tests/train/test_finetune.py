"""train.finetune: the step against plain PyTorch, initial weights, resuming, output files."""

import json
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml

from dspnet_fast.models import build, family
from dspnet_fast.slim import slim
from tests.commands import as_arguments
from tests.commands import run as run_command
from tests.interruption import interrupting
from train import finetune
from train.cli import DONE, INTERRUPTED, WRONG_INPUT
from train.config import FinetuneConfig
from train.evaluation.pretrained import PretrainedFamily
from train.evaluation.supervised import Hyperparameters, SupervisedTraining, new_classifier
from train.finetune import completed, starting_network
from train.run import checkpoint
from train.run.schedules import learning_rate

DNS = ["c8-d1111", "c8-d1121", "c16-d2121"]
SHORT = {"epochs": 2, "batch_size": 16, "lr": 0.5, "warmup_epochs": 0.5, "subnets_per_step": 3, "workers": 0}


run = partial(run_command, finetune)


def command(**options):
    return as_arguments({**SHORT, **options})


def report(out):
    return json.loads((out / "evaluation" / "finetune.json").read_text())


def hyperparameters(**options):
    values = {"epochs": 1, "batch_size": 8, "lr": 0.1, "head_lr": 0.3, "weight_decay": 1e-2, "label_smoothing": 0.1}
    return Hyperparameters(**{**values, "subnets_per_step": 3, **options})


def models(dns=DNS):
    networks = family("resnet", dns)
    torch.manual_seed(1)
    return networks, new_classifier(build("resnet", networks.full, "small"), 5, seed=0)


def batches(count):
    return [(torch.randn(8, 3, 12, 12), torch.randint(0, 5, (8,))) for _ in range(count)]


@pytest.mark.parametrize("distill", [True, False])
def test_step_equals_sandwich_rule_with_in_place_distillation(distill):
    """The reference sums the gradients of separate plain networks where their weights overlap."""
    networks, model = models()
    ((images, labels),) = batches(1)
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    teacher = None
    for subnet in reversed(networks):
        plain = _cut(model, subnet).train()
        logits = plain(images)
        if teacher is not None and distill:
            loss = F.cross_entropy(logits, teacher)
        else:
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            teacher = logits.detach().softmax(1)
        loss.backward()
        for name, parameter in plain.named_parameters():
            expected[name][tuple(slice(size) for size in parameter.shape)] += parameter.grad
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training = SupervisedTraining(model, networks, hyperparameters(distill=distill), epoch_steps=4)
    training.train_step((images, labels))
    for name, parameter in model.named_parameters():
        decay = 1e-2 * before[name] if parameter.ndim > 1 else 0.0
        peak = (0.3 if name.startswith("head") else 0.1) * 8 / 256
        moved = before[name] - learning_rate(0, 4, 0, peak) * (expected[name] + decay)
        torch.testing.assert_close(parameter.detach(), moved, rtol=1e-4, atol=1e-6)


def _cut(model, subnet):
    """A plain copy of one subnet."""
    plain = build("resnet", subnet, "small")
    classifier = new_classifier(plain, 5, seed=0)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            parameter.copy_(weights[name][tuple(slice(size) for size in parameter.shape)])
    return slim(classifier, None)


def test_training_one_network_equals_plain_sgd():
    networks, model = models(["c8-d1111"])
    plain = slim(model, None).train()
    optimizer = torch.optim.SGD(
        [{"params": plain.encoder.parameters(), "lr": 0.1}, {"params": plain.head.parameters(), "lr": 0.3}],
        lr=0.1,
        momentum=0.9,
    )
    training = SupervisedTraining(model, networks, hyperparameters(weight_decay=0.0, batch_size=256), epoch_steps=3)
    for step, (images, labels) in enumerate(batches(3)):
        for group, peak in zip(optimizer.param_groups, (0.1, 0.3)):
            group["lr"] = learning_rate(step, 3, 0, peak)
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(images), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(training.train_step((images, labels)), loss.detach())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


def test_initial_weights_come_from_the_run_or_the_seed(finished, images):
    encoder = PretrainedFamily(finished, torch.device("cpu")).encoder
    config = completed(FinetuneConfig(from_=str(finished)))
    assert (config.dns, config.image_size, config.data) == (",".join(DNS), 12, str(images))
    same = starting_network(config, family("resnet", DNS))
    torch.testing.assert_close(dict(same.named_parameters()), dict(encoder.named_parameters()), rtol=0, atol=0)
    alone = completed(FinetuneConfig(from_=str(finished), dn="c8-d1121"))
    assert alone.dns == "c8-d1121"
    small = starting_network(alone, family("resnet", ["c8-d1121"]))
    torch.testing.assert_close(small.conv1.weight, encoder.conv1.weight[:8], rtol=0, atol=0)
    scratch = {"from_": "none", "network": "resnet", "stem": "small", "dns": "c8-d1111", "image_size": 12, "data": "x"}
    first, again, other = (
        starting_network(completed(FinetuneConfig(**scratch, seed=seed)), family("resnet", ["c8-d1111"]))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize(
    "start",
    [
        {"dn": "c8-d1121"},
        {"dns": "c8-d1111,c16-d2111"},
        {"from": "none", "network": "resnet", "stem": "small", "dns": "c8-d1111,c12-d1111", "image_size": 12},
    ],
    ids=["one network", "other switches", "from scratch"],
)
def test_finetune_writes_report_figure_metrics_and_config(finished, images, tmp_path, capsys, start):
    out = tmp_path / "run"
    assert run(*command(**{"from": finished, "data": images, "out": out, **start})) == DONE
    found = report(out)
    names = start.get("dns", start.get("dn")).split(",")
    assert list(found["networks"]) == names and found["train_images"] == 80
    for network in found["networks"].values():
        assert network["finetuned"].keys() == {"top1", "top5", "interval"}
    assert (out / "evaluation" / "finetune.png").stat().st_size > 1000
    assert f"| {names[0]} |" in (out / "evaluation" / "finetune.md").read_text()
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["from"] == str(start.get("from", finished)) and config["dns"] == ",".join(names)
    assert run("--config", out / "config.yaml") == WRONG_INPUT
    assert "holds a run already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(*command(**{"from": finished, "out": out})) == DONE
    return out


def test_saved_config_reproduces_the_run(whole, tmp_path):
    assert run("--config", whole / "config.yaml", "--out", tmp_path / "again") == DONE
    assert report(tmp_path / "again") == report(whole)


def test_all_subnets_learn(finished, tmp_path):
    assert run(*command(**{"from": finished, "epochs": 5, "evaluate_epochs": 2, "out": tmp_path / "run"})) == DONE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["top1"] for line in lines if "top1" in line}
    assert list(measured) == [10, 20] and list(measured[10]) == DNS
    for network in report(tmp_path / "run")["networks"].values():
        assert network["finetuned"]["top1"] >= 0.9


def test_resumed_run_equals_an_uninterrupted_one(finished, whole, tmp_path, capsys):
    second = tmp_path / "second"
    with interrupting(SupervisedTraining, 4):
        assert run(*command(**{"from": finished, "out": second})) == INTERRUPTED
    assert f"saved up to step 4: continue with --resume --out {second}" in capsys.readouterr().err
    assert checkpoint.latest_step(second / "checkpoints") == 4
    assert run("--out", second, "--resume", "--lr", "9") == WRONG_INPUT
    assert "another --lr" in capsys.readouterr().err
    assert run("--out", second, "--resume") == DONE
    assert report(second) == report(whole)
    states = [checkpoint.load(checkpoint.newest_of_run(out)) for out in (whole, second)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    newest = checkpoint.newest_of_run(second)
    lines = (second / "metrics.jsonl").read_text()
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run("--out", second, "--resume") == DONE  # resumes from the previous checkpoint and rewrites the later lines
    assert (second / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from": None}, "--from is missing"),
        ({"from": "none"}, "--from none needs --network"),
        ({"from": "/nowhere"}, "holds no run"),
        ({"dn": "c8-d1111", "dns": "c8-d1111"}, "--dn needs --from RUN"),
        ({"dn": "c32-d1111"}, "no part of c16-d2121"),
        ({"network": "mobilenet_v3_large"}, "has resnet"),
        ({"batch_size": 500}, "batch of 500"),
        ({"subnets_per_step": 1}, "--subnets-per-step must be at least 2"),
        ({"label_smoothing": 1}, "--label-smoothing must be"),
        ({"lr": 0}, "--lr must be above 0"),
        ({"min_scale": 0}, "smallest crop"),
    ],
)
def test_invalid_options_are_refused(finished, tmp_path, capsys, options, message):
    assert run(*command(**{"from": finished, "out": tmp_path / "run", **options})) == WRONG_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_from_refuses_a_finetuned_run(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "copy")
    (out / "config.yaml").write_text(yaml.safe_dump({"from": "none"}))
    assert run(*command(**{"from": out, "out": tmp_path / "run"})) == WRONG_INPUT
    assert f"{out} is a run of dspnet-finetune" in capsys.readouterr().err
