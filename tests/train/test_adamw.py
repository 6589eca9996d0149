"""Training with --optimizer adamw: its steps, its schedule, checkpoints and skipped steps."""

import copy
import math

import pytest
import torch

from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from train.config import ADAMW, PAPER, PretrainConfig
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import ADAMW_EPS, FlatBuffers
from train.pretraining.recipe import complete
from train.pretraining.trainer import Trainer
from train.run.schedules import weight_decay

CPU = torch.device("cpu")
BATCH = torch.randint(256, (16, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trainer(small):
    """trainer(**options): a trainer of AdamW with a large learning rate."""

    def make(**options):
        return Trainer(small(optimizer="adamw", base_lr=0.3, weight_decay=0.1, **options), 10, CPU)

    return make


def test_updates_equal_adamw_of_pytorch_without_decay_of_vectors():
    torch.manual_seed(0)
    model = DSPNet("resnet", family("resnet", ["c8-d1111", "c16-d1111"]), "small", 33, 17).double()
    twin, images = copy.deepcopy(model), torch.randn(8, 3, 16, 16, dtype=torch.float64)
    flat = FlatBuffers(model.online, model.target, "adamw")
    parameters = list(twin.online.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1]}]
    groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=ADAMW_EPS)
    for lr, tau, decay in ((0.01, 0.9, 0.5), (0.02, 0.99, 0.7)):
        for network in (model, twin):
            network.accumulate(images, list(network.family))
        flat.schedule(lr, tau, decay)
        flat.update_adamw(beta1=0.9, beta2=0.99)
        for group, wd in zip(theirs.param_groups, (decay, 0.0), strict=True):
            group.update(lr=lr, weight_decay=wd)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs.step()
        theirs.zero_grad()
        targets = dict(twin.target.named_parameters())
        for name, parameter in twin.online.named_parameters():
            if name in targets:
                targets[name].data = tau * targets[name].data + (1 - tau) * parameter.data
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)
    assert flat.steps == 2 and not flat.grads.count_nonzero()


def test_weight_decay_follows_a_cosine(trainer):
    assert [weight_decay(step, 4, 0.1, 0.5) for step in (0, 2, 4)] == pytest.approx([0.1, 0.3, 0.5])
    assert weight_decay(1, 4, 0.1, 0.5) == pytest.approx(0.5 - 0.4 * (math.cos(math.pi / 4) + 1) / 2)
    assert trainer().weight_decay(7) == 0.1
    assert trainer(weight_decay_end=0.3).weight_decay(10) == pytest.approx(0.2)


def test_resumed_steps_have_the_same_bits(trainer, tmp_path):
    straight, first = trainer(weight_decay_end=0.3), trainer(weight_decay_end=0.3)
    for step in range(6):
        straight.train_step(BATCH)
        if step < 3:
            first.train_step(BATCH)
    torch.save(first.state() | {"step": first.step}, tmp_path / "state.pt")
    second = trainer(weight_decay_end=0.3)
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        second.train_step(BATCH)
    assert second.flat_buffers.checksum() == straight.flat_buffers.checksum() and second.flat_buffers.steps == 6
    assert torch.equal(second.flat_buffers.params, straight.flat_buffers.params)


def test_checkpoint_of_lars_is_refused(trainer, small):
    other = Trainer(small(), 10, CPU)
    with pytest.raises(InputError, match="but not continued: the variance of "):
        trainer().load_state(other.state() | {"step": 0})


def test_skipped_step_changes_nothing(trainer):
    made = trainer()
    made.train_step(BATCH)
    flat = made.flat_buffers
    before = [flat.checksum(), flat.steps.item()]
    made.guard.begin()
    flat.grads.fill_(float("nan"))
    made.schedule(1)
    made.update()
    assert [flat.checksum(), flat.steps.item()] == before and made.guard.skipped().total == 1
    assert not flat.grads.count_nonzero()


def test_recipes_have_values_for_adamw():
    paper = PretrainConfig(recipe="paper", optimizer="adamw")
    assert {name: getattr(paper, name) for name in PAPER} == PAPER | ADAMW
    auto = complete(PretrainConfig(optimizer="adamw", epochs=10), 10_000)
    assert auto.base_lr * auto.batch_size / 256 == pytest.approx(ADAMW["base_lr"])
    assert auto.weight_decay == ADAMW["weight_decay"]
    with pytest.raises(InputError, match="--optimizer must be one of lars, adamw"):
        PretrainConfig(optimizer="sgd")
