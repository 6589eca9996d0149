"""The eager baseline of the step benchmark computes the same step as the trainer."""

import pytest
import torch

from benchmarks.eager import EagerStep
from dspnet_fast.models import family
from train.config import PretrainConfig
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import FlatBuffers
from train.pretraining.trainer import Trainer

MOBILENET = ("mobilenet_v3_large", ["w0.25", "w0.375", "w0.50"])
RESNET = ("resnet", ["c8-d1111", "c8-d2121", "c16-d2121"])
LARS = {"weight_decay": 0.1, "momentum": 0.9, "eta": 0.01}


def make(network, names, stem):
    torch.manual_seed(0)
    model = DSPNet(network, family(network, names), stem, 32, 16, momentum_bn="off").double()
    for parameter in model.parameters():  # as after some steps: nonzero biases, different online and target weights
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def named(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize(("network", "names"), [MOBILENET, RESNET])
@pytest.mark.parametrize(
    ("stem", "options"),
    [("small", {}), ("standard", {}), ("small", {"channels_last": False}), ("small", {"stacked": True})],
    ids=["small stem", "standard stem", "default layout", "stacked"],
)
def test_losses_gradients_and_updates_equal_ours(network, names, stem, options, policy):
    policy("native")
    model = make(network, names, stem)
    eager = EagerStep(model, **options, **LARS)
    flat = FlatBuffers(model.online, model.target)
    for _ in range(2):  # the second step has momentum
        images = torch.randn(8, 3, *2 * [64 if stem == "standard" else 32]).double()
        losses = model.accumulate(images, list(model.family))
        torch.testing.assert_close(eager.accumulate(images, list(model.family)), losses)
        gradients = {name: parameter.grad for name, parameter in eager.parameters.items()}
        torch.testing.assert_close(gradients, {name: p.grad for name, p in model.online.named_parameters()})

        flat.step(0.3, 0.9, **LARS)
        eager.update(0.3, 0.9)
        torch.testing.assert_close(named(eager.parameters.items()), named(model.online.named_parameters()))
        torch.testing.assert_close(eager.targets, named(model.target.named_parameters()))
        assert all(parameter.grad is None for parameter in eager.parameters.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_on_uint8_images_equals_the_trainers(precision, policy):
    policy("native")
    config = PretrainConfig(
        network="resnet",
        dns="c8-d1111,c16-d1111",
        stem="small",
        hidden_features=32,
        out_features=16,
        batch_size=16,
        momentum_bn="off",
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
    )
    trainer = Trainer(config, 10, torch.device("cpu"))
    eager = EagerStep(trainer.model, precision=precision)
    batch = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8)
    lr, tau = trainer.learning_rate(trainer.step), trainer.tau(trainer.step)
    expected = trainer.train_step(batch)
    losses = eager.step(batch, list(trainer.model.family), lr, tau)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5 if precision == "fp32" else 0.05)
