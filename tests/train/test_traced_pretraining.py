"""Families of traced networks pretrain like the project's own."""

import json
from collections import Counter

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models import VisionTransformer
from torch import nn

from dspnet_fast import exported
from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from dspnet_fast.nn.batch_norm import MomentumBatchNorm
from tests.small_run import SMALL_RUN
from train.config import PretrainConfig
from train.export import export
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import FlatBuffers
from train.pretraining.recipe import complete
from train.pretraining.run import PretrainRun
from train.selection.recording import calls_of


def encoder() -> nn.Module:
    """An encoder whose layers are of several kinds."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, bias=False), BatchNormAct2d(16), nn.Conv2d(16, 32, 1), nn.GroupNorm(4, 32),
        nn.PReLU(32), nn.Conv2d(32, 32, 3, groups=32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block that, as torchvision's MNASNet, loads tensors of a known version only."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), BatchNormAct2d(16)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, x):
        return x + self.norm(self.conv(x))


def deep() -> nn.Module:
    """An encoder of residual blocks."""
    stem = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, nn.Sequential(Block(), Block(), Block()), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Blur(nn.Module):
    """A convolution by a buffer, as in timm's networks with anti-aliasing."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", torch.full((1, 1, 3, 3), 1 / 9))

    def forward(self, x):
        return nn.functional.conv2d(x, self.filter.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


def blurred() -> nn.Module:
    """An encoder with a filter before the last batch normalisation."""
    stem = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Blur()
    return nn.Sequential(*stem, nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten())


NAME, DEEP = f"{__name__}:encoder", f"{__name__}:deep"


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


@pytest.mark.parametrize(
    ("network", "smallest", "precision"),
    [
        (NAME, "w0.50", "fp32"),
        (NAME, "w0.50", "bf16"),
        (DEEP, "w0.50-d1", "fp32"),
        (f"{__name__}:blurred", "w0.50", "fp32"),
    ],
)
def test_fused_step_equals_the_eager_one(network, smallest, precision, policy):
    made = family(network, [smallest, "w1.00"])
    exact = precision == "fp32"  # in fp64
    images, found = torch.randn(8, 3, 16, 16).to(torch.float64 if exact else torch.float32), []
    for name in ("native", "eager"):
        policy(name)
        torch.manual_seed(0)
        model = DSPNet(network, made, hidden_features=32, out_features=16, precision=precision, bn_groups=2)
        flat = FlatBuffers(*((model.online.double(), model.target.double()) if exact else (model.online, model.target)))
        losses = model.accumulate(images, list(made), 0.5)
        found.append((torch.stack([*losses.values()]), flat.grads, flat.statistics))
    assert isinstance(model.target.encoder.body[0].norm, MomentumBatchNorm)
    for got, want in zip(*found):
        assert (got - want).norm() < (1e-9 if exact else 0.1) * want.norm()


def test_recorded_calls_of_a_run_are_those_of_the_fused_formulation():
    config = PretrainConfig(
        data="none", network=NAME, dns="w0.50,w1.00", subnets_per_step=2, image_size=16, batch_size=4,
        hidden_features=32, out_features=16,
    )  # fmt: skip
    calls = Counter(call.operator for call in calls_of(complete(config, 64)))
    assert calls["conv_moments"] >= 4 and calls["norm_act"] >= 2 and calls["conv_moments_backward"] == 2


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


def test_subnet_of_fewer_blocks_trains_the_first_blocks_only():
    made = family(DEEP, ["w1.00-d2", "w1.00"])
    model = DSPNet(DEEP, made, hidden_features=32, out_features=16)
    FlatBuffers(model.online, model.target)
    images = torch.randn(8, 3, 16, 16)
    model.accumulate_subnet(images, model.targets(images), made.smallest)
    gradients = [block.conv.weight.main_grad.any() for block in model.online.encoder.body[3]]
    assert gradients == [True, True, False]


def one_size() -> nn.Module:
    """A transformer that takes images of one size only."""
    return VisionTransformer(SMALL_RUN["image_size"], 6, num_classes=0, embed_dim=64, depth=2, num_heads=4)


@pytest.mark.parametrize(("network", "smallest"), [(DEEP, "w0.50-d1"), (f"{__name__}:one_size", "w0.50")])
def test_run_of_a_network_of_ones_own_is_exported_as_programs(images, tmp_path, network, smallest):
    out, size = tmp_path / "run", SMALL_RUN["image_size"]
    options = {**SMALL_RUN, "network": network, "dns": f"{smallest},w1.00", "stem": "standard", "data": str(images)}
    PretrainRun(PretrainConfig(**options, out=str(out)), resume=False).run()
    for folder in export(out):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["loads_into"] == {} and manifest["program"]["largest_difference"] < 1e-4
        x = torch.randn(3, 3, size, size)
        program = torch.export.load(folder / manifest["program"]["file"]).module()
        with torch.no_grad():
            torch.testing.assert_close(program(x), exported.load(folder)(x))


def test_target_keeps_the_activation_functions_of_its_normalisation_layers():
    model = DSPNet(NAME, family(NAME, ["w1.00"]), hidden_features=32, out_features=16)
    norm = model.target.encoder.body[1]
    assert isinstance(norm, MomentumBatchNorm) and norm(torch.randn(4, 16, 5, 5)).min() == 0


def test_unknown_network_is_an_input_error_of_the_configuration():
    with pytest.raises(InputError, match="unknown network 'vgg': use one of mobilenet_v3_large, resnet, timm:NAME"):
        PretrainConfig(network="vgg")
    assert PretrainConfig(network="timm:resnet18").network == "timm:resnet18"
