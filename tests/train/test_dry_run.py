"""`train.pretrain --dry-run`: counts, memory sizes and checks, with and without images; it writes nothing."""

from functools import partial

import pytest
import torch

from dspnet_fast.errors import InputError
from tests.commands import run as run_command
from train import pretrain
from train.cli import DONE, WRONG_INPUT
from train.costs.dry_run import estimate
from train.costs.flops import network_costs, run_cost
from train.pretraining.trainer import Trainer
from train.run.tables import quantity

run = partial(run_command, pretrain)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 "),
        (999, "999 "),
        (999.6, "1.0 k"),
        (2.5e12, "2.5 T"),
        (999_949, "999.9 k"),
        (999_960, "1.0 M"),
        (999.98e15, "1.0 E"),
        (1234e18, "1,234.0 E"),
    ],
)
def test_quantity_is_rounded_before_its_prefix_is_chosen(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize("options", [{}, {"momentum_bn": "off"}, {"dns": "c8-d1111"}])
def test_memory_equals_the_trainers_buffers(small, options):
    config = small(**options)
    memory, trainer = estimate(config).memory, Trainer(config, 10, torch.device("cpu"))
    flat = trainer.flat_buffers
    tensors = {"weights": flat.params, "gradients": flat.grads, "momentum": flat.momenta, "target": flat.targets}
    assert memory.parts == {name: tensor.nbytes for name, tensor in tensors.items()}


def test_checkpoint_size_is_predicted(finished, small):
    path = finished / "checkpoints" / "step-00000020.pt"
    state = torch.load(path, weights_only=True)
    tensors = [*state["model"].values(), *state["momentum"].values(), state["skipped"]]
    estimated = estimate(small()).memory.checkpoint
    assert estimated == sum(tensor.nbytes for tensor in tensors) <= path.stat().st_size
    assert path.stat().st_size < estimated + 1000 * len(tensors)


def test_dry_run_prints_counts_and_writes_nothing(arguments, small, images, tmp_path, capsys):
    assert run(*arguments(), "--dry-run") == DONE
    shown = capsys.readouterr().out
    assert f"80 of {images}, counted here" in shown
    assert "20: 2 epochs of 10 steps, 8 images each; the first 5 train only c16-d2121" in shown
    estimated = estimate(small())
    assert estimated.trained == {"c8-d1111": 15, "c8-d1121": 15, "c16-d2121": 20}
    counted = run_cost(small(), 10, network_costs(small()))
    assert estimated.cost == counted
    for part, macs in counted.parts().items():
        assert f"{part:14}{quantity(macs)}MAC" in shown
    for name, cost in estimated.costs.items():
        row = next(line for line in shown.splitlines() if line.strip().startswith(name))
        assert f"{cost.parameters:,}" in row and f"{quantity(counted.online[name])}MAC" in row
    assert f"{'checkpoint':14}{quantity(estimated.memory.checkpoint)}B" in shown
    assert not (tmp_path / "run").exists()


def test_unknown_dataset_gives_the_cost_of_one_step(arguments, small, tmp_path, capsys):
    assert run(*arguments(data="/nowhere"), "--dry-run") == DONE
    assert "unknown: /nowhere is not on this machine" in capsys.readouterr().out
    one = estimate(small(data="/nowhere"))
    assert (one.images, one.epoch_steps, one.size) == (None, None, None)
    assert one.trained == {"c8-d1111": 1, "c8-d1121": 1, "c16-d2121": 1}
    later, first = (estimate(small(full_only_epochs=epochs)).cost.parts()["online"] for epochs in (0, 1))
    assert later - first == pytest.approx(10 * (one.cost.parts()["online"] - one.cost.online["c16-d2121"]))
    assert run(*arguments(data="/nowhere", train_images=64), "--dry-run") == DONE
    shown = capsys.readouterr().out
    assert "64 of /nowhere, as --train-images says" in shown and "16: 2 epochs of 8 steps" in shown
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_are_counted(images, small):
    estimated = estimate(small(data=str(images / "train" / "blobs")))
    assert estimated.images == 40 and estimated.size.local


def test_dry_run_of_a_resumed_run_checks_its_options(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run("--resume", "--out", finished, "--dry-run") == DONE
    assert "20: 2 epochs of 10 steps" in capsys.readouterr().out
    assert run("--resume", "--out", finished, "--dry-run", "--base-lr", "9") == WRONG_INPUT
    assert "another --base-lr" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_init_from_is_checked(finished, small):
    assert estimate(small(init_from=str(finished))).images == 80
    with pytest.raises(InputError, match="of another network"):
        estimate(small(init_from=str(finished), dns="c8-d1111"))
    with pytest.raises(InputError, match="holds no checkpoint"):
        estimate(small(init_from="/nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dns": "c8-d1122,c16-d2111"}, "does not nest"),
        ({"batch_size": 500}, "batch of 500"),
        ({"train_images": 500}, "--train-images 500"),
        ({"subnets_per_step": 1}, "at least"),
        ({"min_scale": 0}, "smallest crop"),
        ({"stem": "tall"}, "--stem must be one of"),
        ({"data": "empty"}, "empty"),
        ({"out": "finished"}, "holds a run already"),
    ],
)
def test_invalid_options_are_refused_as_in_a_run(finished, arguments, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if "out" in options:
        options = {"out": finished}
    assert run(*arguments(**options), "--dry-run") == WRONG_INPUT
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
