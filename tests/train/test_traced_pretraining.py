"""Families of traced networks pretrain like the project's own."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from dspnet_fast.nn.batch_norm import MomentumBatchNorm
from train.config import PretrainConfig
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import FlatBuffers


def encoder() -> nn.Module:
    """An encoder whose layers are of several kinds."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, bias=False), BatchNormAct2d(16), nn.Conv2d(16, 32, 1), nn.GroupNorm(4, 32),
        nn.PReLU(32), nn.Conv2d(32, 32, 3, groups=32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


NAME = f"{__name__}:encoder"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_trains_the_sampled_subnets_of_a_traced_network(precision):
    made = family(NAME, ["w0.50", "w1.00"])
    model = DSPNet(NAME, made, hidden_features=32, out_features=16, precision=precision)
    flat = FlatBuffers(model.online, model.target)
    before = flat.params.clone()
    losses = [model.accumulate(torch.randn(8, 3, 16, 16), list(made)) for _ in range(2)][-1]
    gradients = {name: parameter.main_grad for name, parameter in model.online.encoder.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    flat.step(0.1, 0.9, weight_decay=0.0, momentum=0.9, eta=1e-3)
    assert set(losses) == {"w0.50", "w1.00"} and all(0 < loss < 8 for loss in losses.values())
    assert not torch.equal(flat.params, before) and flat.params.isfinite().all()


def test_gradients_of_a_subnet_are_zero_outside_it():
    made = family(NAME, ["w0.50", "w1.00"])
    model = DSPNet(NAME, made, hidden_features=32, out_features=16)
    FlatBuffers(model.online, model.target)
    images = torch.randn(8, 3, 16, 16)
    model.accumulate_subnet(images, model.targets(images), made.smallest)
    body = model.online.encoder.body
    for parameter in (body[0].weight, body[4].weight, body[5].weight):
        half = len(parameter) // 2
        assert parameter.main_grad[:half].any() and not parameter.main_grad[half:].any()


def test_target_keeps_the_activation_functions_of_its_normalisation_layers():
    model = DSPNet(NAME, family(NAME, ["w1.00"]), hidden_features=32, out_features=16)
    norm = model.target.encoder.body[1]
    assert isinstance(norm, MomentumBatchNorm) and norm(torch.randn(4, 16, 5, 5)).min() == 0


def test_unknown_network_is_an_input_error_of_the_configuration():
    with pytest.raises(InputError, match="unknown network 'vgg': use one of mobilenet_v3_large, resnet, timm:NAME"):
        PretrainConfig(network="vgg")
    assert PretrainConfig(network="timm:resnet18").network == "timm:resnet18"
