"""The training loop of finetune and detect: skipped steps and stalls are reported, errors end it after saving."""

import time

import pytest
import torch

from dspnet_fast.errors import InputError
from dspnet_fast.models import build, family
from train.evaluation.supervised import Hyperparameters, SupervisedTraining, new_classifier
from train.run import checkpoint, loop
from train.run.update_guard import MAX_IN_A_ROW

CPU = torch.device("cpu")


@pytest.fixture
def training():
    made = family("resnet", ["c8-d1111"])
    torch.manual_seed(0)
    model = new_classifier(build("resnet", made.full, "small"), 2, seed=0)
    return SupervisedTraining(model, made, Hyperparameters(epochs=2, batch_size=4, lr=0.1, head_lr=0.1), epoch_steps=3)


def batch(value=1.0):
    return torch.randn(4, 3, 8, 8) * value, torch.tensor([0, 1, 0, 1])


def test_a_non_finite_step_changes_neither_weights_nor_statistics(training):
    training.train_step(batch())
    before = {
        name: tensor.clone() for name, tensor in training.model.state_dict().items() if tensor.is_floating_point()
    }
    training.train_step(batch(float("nan")))
    assert training.step == 2
    for name, tensor in before.items():
        torch.testing.assert_close(training.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert all(not parameter.grad.any() for parameter in training.model.parameters())
    training.train_step(batch())
    assert not torch.equal(training.model.state_dict()["head.weight"], before["head.weight"])


def test_loop_reports_skipped_steps_and_saves_before_it_gives_up(training, tmp_path, capsys):
    values = [1.0, float("nan"), 1.0, *[float("inf")] * MAX_IN_A_ROW]
    with pytest.raises(InputError, match=f"{MAX_IN_A_ROW} consecutive steps, up to step 6"):
        loop.run(
            "test", training, lambda start: map(batch, values), tmp_path / "checkpoints", CPU, guards=[training.guard]
        )
    shown = capsys.readouterr()
    for step, total in ((2, 1), (4, 2), (5, 3), (6, 4)):
        line = f"step {step}  skipped: its numbers were not finite ({total} steps so far)"
        assert line in shown.out + shown.err
    state = checkpoint.load_newest(tmp_path / "checkpoints", CPU, print)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_loop_reports_a_stall_and_continues(training, tmp_path, capsys):
    stalled = tmp_path / "stalled.txt"

    def slow(start):
        for step in range(start, training.steps):
            while step == 1 and not (stalled.exists() and "Thread" in stalled.read_text()):
                time.sleep(0.01)
            yield batch()

    loop.run("test", training, slow, tmp_path / "checkpoints", CPU, stall_timeout=0.2)
    assert training.step == training.steps
    shown = capsys.readouterr()
    assert "after step 1: waiting for images" in shown.out + shown.err
