"""The eager formulation gives the results of the operators, in every precision and with all kinds of statistics."""

import copy

import pytest
import torch

from dspnet_fast.models import family
from dspnet_fast.nn import configure_batch_norm
from dspnet_fast.ops import registry
from dspnet_fast.statistics import measured_statistics, post_statistics
from train.pretraining.dspnet import HALF, DSPNet
from train.pretraining.flat_buffers import FlatBuffers
from train.pretraining.loss_scale import GROWTH_STEPS, INITIAL, LossScale
from train.pretraining.trainer import Trainer

NETWORKS = {"resnet": ["c8-d1111", "c16-d2111"], "mobilenet_v3_large": ["w0.25", "w0.50"]}


def make(network, dtype=torch.float64, **options):
    model = DSPNet(network, family(network, NETWORKS[network]), "small", 32, 16, **options).to(dtype)
    for parameter in model.target.parameters():  # online and target differ, as after some steps
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(memory_format=torch.channels_last).train()


def images(dtype=torch.float64, count=8):
    return torch.randn(count, 3, 16, 16).to(dtype, memory_format=torch.channels_last)


def accumulated(policy, model, batch):
    """Losses, gradients in flat buffers, and running statistics of online and target after one step."""
    model = copy.deepcopy(model)
    flat = FlatBuffers(model.online, model.target)
    before = registry.get_policy()
    registry.set_policy(policy)
    try:
        losses = model.accumulate(batch, list(model.family), alpha=0.6)
    finally:
        registry.set_policy(before)
    return losses, flat.grads, flat.statistics


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bn_groups", [1, 2])
@pytest.mark.parametrize("momentum_bn", ["off", "on", "momentum2"])
def test_losses_gradients_and_statistics_equal_those_of_the_operators(network, bn_groups, momentum_bn):
    model, batch = make(network, momentum_bn=momentum_bn, bn_groups=bn_groups), images(count=16 * bn_groups)
    torch.testing.assert_close(accumulated("eager", model, batch), accumulated("native", model, batch))


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_without_flat_buffers_equal_those_with_them(network):
    model, batch = make(network), images()
    _, grads, _ = accumulated("eager", model, batch)
    flat = FlatBuffers(copy.deepcopy(model).online, copy.deepcopy(model).target)
    model.accumulate(batch, list(model.family), alpha=0.6)
    for name, parameter in model.online.named_parameters():
        start = flat._starts[name]
        torch.testing.assert_close(parameter.grad.flatten().sort()[0], grads[start:][: parameter.numel()].sort()[0])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_every_momentum_equal_those_of_the_operators(momentum):
    model, batch = make("resnet"), images()
    for norm in model.batch_norms():
        norm.momentum = momentum
    torch.testing.assert_close(accumulated("eager", model, batch)[2], accumulated("native", model, batch)[2])


@pytest.mark.parametrize("network", NETWORKS)
def test_post_statistics_and_features_equal_those_of_the_operators(network, policy):
    encoder, batch = make(network).online.encoder, images()
    results = []
    dns = list(family(network, NETWORKS[network]))
    others = images()
    for chosen in ("eager", "native"):
        policy(chosen)
        post_statistics(encoder, dns, [batch, others])
        results.append((measured_statistics(encoder, dns), encoder(batch)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
@pytest.mark.parametrize("network", NETWORKS)
def test_16_bit_step_is_close_to_fp32(network, precision, tolerance):
    """Every layer computes in 16 bits, and the gradients arrive in fp32."""
    model, batch = make(network, torch.float32), images(torch.float32, count=64)
    losses, grads, statistics = accumulated("eager", model, batch)
    model.precision = precision
    seen = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    got_losses, got_grads, got_statistics = accumulated("eager", model, batch)
    assert got_grads.dtype == got_statistics.dtype == torch.float32
    assert seen == {HALF[precision]}
    for name, loss in losses.items():
        assert abs(got_losses[name] / loss - 1) < tolerance
    assert torch.nn.functional.cosine_similarity(got_grads, grads, 0) > 1 - 5 * tolerance
    torch.testing.assert_close(got_statistics, statistics, rtol=tolerance, atol=tolerance)


def test_fp16_run_resumes_bit_for_bit(small):
    config = small(precision="fp16", epochs=2)
    batches = torch.randint(256, (4, 2 * config.batch_size, 3, 12, 12), dtype=torch.uint8)

    def trained(steps, state=None):
        trainer = Trainer(config, 2, torch.device("cpu"))
        if state is not None:
            trainer.load_state(state)
        while trainer.step < steps:
            trainer.train_step(batches[trainer.step])
        return trainer

    whole = trained(4)
    first = trained(2)
    resumed = trained(4, copy.deepcopy(first.state() | {"step": first.step}))
    assert resumed.flat_buffers.checksum() == whole.flat_buffers.checksum()
    assert torch.equal(resumed.loss_scale.scale, whole.loss_scale.scale)


def test_loss_scale_cancels_in_the_update(small):
    config = small(precision="fp16")
    batch = torch.randint(256, (2 * config.batch_size, 3, 12, 12), dtype=torch.uint8)
    grads = []
    for factor in (1.0, 2.0**-6):
        trainer = Trainer(config, 2, torch.device("cpu"))
        trainer.loss_scale.scale.fill_(2.0**10 * factor)
        trainer.update = lambda trainer=trainer: grads.append(trainer.flat_buffers.grads.clone())
        trainer.train_step(batch)
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


def test_loss_scale_halves_after_an_overflow_and_doubles_after_many_finite_steps():
    scale = LossScale(torch.device("cpu"))
    scale.update(torch.tensor(False))
    assert scale.scale == INITIAL / 2
    for _ in range(GROWTH_STEPS):
        scale.update(torch.tensor(True))
    assert scale.scale == INITIAL and scale.finite_steps == 0
    for _ in range(40):
        scale.update(torch.tensor(False))
    assert scale.scale == 1


def test_overflow_in_fp16_skips_the_step_and_lowers_the_scale(small):
    config = small(precision="fp16")
    trainer = Trainer(config, 2, torch.device("cpu"))
    trainer.loss_scale.scale.fill_(2.0**60)
    before = trainer.flat_buffers.params.clone()
    trainer.train_step(torch.randint(256, (2 * config.batch_size, 3, 12, 12), dtype=torch.uint8))
    assert torch.equal(trainer.flat_buffers.params, before)
    assert trainer.loss_scale.scale == 2.0**59 and trainer.guard.skipped().total == 1


def test_view_setting_is_restored():
    model = make("resnet")
    with configure_batch_norm(model, view=1):
        assert {norm.view for norm in model.batch_norms()} == {1}
    assert {norm.view for norm in model.batch_norms()} == {None}
