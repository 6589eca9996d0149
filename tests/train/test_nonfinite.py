"""Non-finite steps are skipped and counted; three in a row end the run and name the first non-finite tensor."""

import json
from pathlib import Path

import pytest
import torch

from dspnet_fast.errors import InputError
from train.pretrain import _main
from train.pretraining.nonfinite import MAX_IN_A_ROW
from train.pretraining.run import PretrainRun
from train.pretraining.trainer import Trainer
from train.run import checkpoint
from train.run.meter import Meter

EPOCH_STEPS = 10


@pytest.fixture
def poison(monkeypatch):
    """A set of step numbers, counted from the start of the run, whose batches contain a NaN."""
    steps: set[int] = set()
    batches = Meter.batches

    def poisoned(self):
        for step, batch in enumerate(batches(self), start=1):
            if step in steps:
                batch = batch.float() / 255
                batch[0, 0, 0, 0] = float("nan")
            yield batch

    monkeypatch.setattr(Meter, "batches", poisoned)
    return steps


def views(config, seed=0):
    shape = (2 * config.batch_size, 3, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def everything(trainer) -> list[torch.Tensor]:
    flat = trainer.flat_buffers
    return [t.clone() for t in (flat.params, flat.momenta, flat.targets, flat.statistics)]


@pytest.mark.parametrize("poisoned", [float("nan"), float("inf")])
@pytest.mark.parametrize("momentum_bn", ["on", "off"])
def test_skipped_step_changes_no_state(small, poisoned, momentum_bn):
    config = small(momentum_bn=momentum_bn, warmup_epochs=0)
    trainer = Trainer(config, EPOCH_STEPS, torch.device("cpu"))
    trainer.train_step(views(config))
    before = everything(trainer)
    nonfinite = views(config, 1)
    nonfinite[3, 1, 4, 4] = poisoned
    trainer.train_step(nonfinite)
    assert trainer.guard.skipped() == (1, 1, 1, 0)
    for kept, now in zip(before, everything(trainer), strict=True):
        assert torch.equal(kept, now)
    assert not trainer.flat_buffers.grads.count_nonzero()
    trainer.train_step(views(config, 2))
    assert trainer.guard.skipped() == (0, 1, 1, 1)
    assert all(now.isfinite().all() for now in everything(trainer))
    assert not torch.equal(before[0], trainer.flat_buffers.params)


def test_non_finite_running_statistics_skip_the_step(small, policy):
    """Activations with infinite variance are normalised to zero, so loss and gradient stay finite."""
    policy("native")
    config = small(warmup_epochs=0)
    trainer = Trainer(config, EPOCH_STEPS, torch.device("cpu"))
    trainer.train_step(views(config))
    trainer.step = trainer.steps - 2  # near the end, momentum batch norm gives the batch statistics little weight
    before = everything(trainer)
    norm = trainer.model.target.encoder.layer4[0].bn2

    def spoil(module, inputs):
        inputs[0].variance.fill_(float("inf"))

    handle = norm.register_forward_pre_hook(spoil)
    losses = trainer.train_step(views(config, 1))
    handle.remove()
    assert all(loss.isfinite() for loss in losses.values())
    assert trainer.guard.skipped().total == 1
    for kept, now in zip(before, everything(trainer), strict=True):
        assert torch.equal(kept, now)


def test_guard_counts_steps_since_the_last_skipped_one(small):
    config = small(warmup_epochs=0)
    trainer = Trainer(config, EPOCH_STEPS, torch.device("cpu"))
    trainer.train_step(torch.full_like(views(config), float("nan")))
    for since in range(3):
        assert trainer.guard.skipped().since == since
        trainer.train_step(views(config, since))


def test_few_skipped_steps_are_counted_and_logged(small, poison, capsys):
    poison.update([3, 4, 7])
    config = small(epochs=1)
    PretrainRun(config, resume=False).run()
    output = capsys.readouterr().out
    assert "step 3  skipped: its numbers were not finite (1 steps so far)" in output
    assert "step 7  skipped: its numbers were not finite (3 steps so far)" in output
    state = checkpoint.load(checkpoint.newest_of_run(Path(config.out)))
    assert state["skipped"] == 3 and state["step"] == EPOCH_STEPS
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line).get("skipped_steps") for line in lines]
    assert [count for count in counts if count is not None] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]


def test_three_skipped_steps_in_a_row_end_a_resumable_run(small, poison):
    config = small()
    poison.update(range(5, 5 + MAX_IN_A_ROW))
    with pytest.raises(InputError, match=r"3 consecutive steps .* first in the images of .* rank 0; saved"):
        PretrainRun(config, resume=False).run()
    out = Path(config.out)
    dump = json.loads((out / "nonfinite.json").read_text())
    assert dump["step"] == 7 and dump["ranks"][0]["found"]["where"] == "images"
    assert len(dump["ranks"][0]["batch"]) == config.batch_size
    assert all(name.endswith(".png") for name in dump["ranks"][0]["batch"])
    state = checkpoint.load(checkpoint.newest_of_run(out))
    assert state["step"] == 7 and all(value.isfinite().all() for value in state["model"].values())
    poison.clear()
    _main(["--resume", "--out", str(out)])
    assert checkpoint.load(checkpoint.newest_of_run(out))["skipped"] == 3


@pytest.mark.parametrize("layer", ["encoder.conv1", "predictor.fc1"])
def test_diagnose_names_the_layer(small, layer):
    config = small(warmup_epochs=0)
    trainer = Trainer(config, EPOCH_STEPS, torch.device("cpu"))
    trainer.train_step(views(config))
    before = everything(trainer)
    assert trainer.diagnose(views(config)) is None
    module = dict(trainer.model.online.named_modules())[layer]

    def spoil(module, inputs, output):
        (output if isinstance(output, torch.Tensor) else output.y).mul_(float("inf"))

    with torch.no_grad():
        handle = module.register_forward_hook(spoil, prepend=True)
        found = trainer.diagnose(views(config))
    handle.remove()
    assert found == ("c8-d1111", layer, "forward")
    for kept, now in zip(before, everything(trainer), strict=True):
        assert torch.equal(kept, now)


def test_diagnose_names_the_gradient_of_a_finite_loss(small):
    config = small(warmup_epochs=0)
    trainer = Trainer(config, EPOCH_STEPS, torch.device("cpu"))
    trainer.train_step(views(config))
    layer = trainer.model.online.predictor.fc2

    def spoil(module, inputs, output):
        output.register_hook(lambda gradient: gradient * float("nan"))

    handle = layer.register_forward_hook(spoil)
    found = trainer.diagnose(views(config))
    handle.remove()
    assert found is not None and found.where == "backward" and found.layer.startswith("predictor.fc2")


def test_diagnose_names_the_weight(small):
    trainer = Trainer(small(), EPOCH_STEPS, torch.device("cpu"))
    with torch.no_grad():
        trainer.model.online.projector.fc1.weight[0, 0] = float("nan")
    assert trainer.diagnose(views(small())) == ("all", "online.projector.fc1.weight", "weights")


def test_collapse_is_logged_with_advice(small, monkeypatch, capsys):
    monkeypatch.setattr("train.pretraining.probe.feature_std", lambda features: 0.01 if len(features[0]) < 100 else 0.5)
    PretrainRun(small(epochs=1), resume=False).run()
    output = capsys.readouterr().out
    assert "step 10  COLLAPSE of c8-d1111, c8-d1121:" in output and "lower --base-lr" in output
    assert "step 0  COLLAPSE" not in output
