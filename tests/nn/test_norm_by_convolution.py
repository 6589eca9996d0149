"""Convolutions that compute the scale and shift of the batch normalisation behind them, by one call."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dspnet_fast.nn import SlimBatchNorm2d, SlimConv2d, fused
from dspnet_fast.nn.functional import conv_norm_act, materialize
from dspnet_fast.ops import cpp

pytestmark = pytest.mark.skipif(not cpp.load()[0], reason=cpp.load()[1])


@pytest.fixture(autouse=True)
def formulation(policy):
    policy("auto")


@pytest.fixture
def layers() -> nn.Sequential:
    layers = nn.Sequential(SlimConv2d(3, 8, 3, padding=1, bias=False), SlimBatchNorm2d(8), nn.Hardswish())
    with torch.no_grad():
        layers[1].weight.copy_(torch.rand(8) + 0.5)
        layers[1].bias.normal_()
    return fused(layers, torch.randn(2, 3, 6, 6))


def written(layers: nn.Sequential, x: Tensor) -> Tensor:
    return materialize(conv_norm_act(x, *layers))


def traced(layers: nn.Sequential, x: Tensor) -> Tensor:
    return layers(x) + 0


def results(layers: nn.Sequential, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Output, gradients and statistics of a copy of the layers."""
    layers, x = copy.deepcopy(layers), torch.linspace(-2, 3, 4 * 3 * 36).sin().view(4, 3, 6, 6).requires_grad_()
    output = forward(layers, x)
    (output * torch.linspace(0, 9, output.numel()).cos().view_as(output)).sum().backward()
    return [output, x.grad, *(p.grad for p in layers.parameters()), *layers.state_dict().values()]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("forward", [written, traced])
def test_one_call_equals_plain_pytorch(forward, layers, policy):
    got = results(layers, forward)
    policy("eager")
    assert_close(got, results(layers, forward))


def test_scale_comes_from_the_node_of_the_convolution(layers):
    x = torch.randn(4, 3, 6, 6)
    for deferred in (conv_norm_act(x, *layers), layers(x).state.x):
        assert deferred.scale.grad_fn is deferred.shift.grad_fn is deferred.x.grad_fn
        assert "ConvMoments" in deferred.x.grad_fn.name()


def another_norm(layers: nn.Sequential, x: Tensor) -> Tensor:
    norm = copy.deepcopy(layers[1])
    with torch.no_grad():
        norm.weight *= 2
    return norm(layers[0](x)) + layers[1](layers[0](x))


def no_norm(layers: nn.Sequential, x: Tensor) -> Tensor:
    return layers[0](x) + layers[1].weight.sum() + layers[1].bias.sum()


def changed_output(layers: nn.Sequential, x: Tensor) -> Tensor:
    class Tripled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).mul_(3))

    del layers[0].norm
    return fused(Tripled(*layers), torch.randn(2, 3, 6, 6))(x)


def views_after_the_convolution(layers: nn.Sequential, x: Tensor) -> Tensor:
    y = layers[0](x)
    layers[1].views = 2
    return layers[1](y)


def evaluation_after_the_convolution(layers: nn.Sequential, x: Tensor) -> Tensor:
    return layers[1].eval()(layers[0](x))


def hook_that_makes_the_weight(layers: nn.Sequential, x: Tensor) -> Tensor:
    """As torch.nn.utils.weight_norm, from parameters that the layer has beside the weight."""
    norm = layers[1]
    part = norm.weight.detach() / 2
    norm.register_parameter("part", nn.Parameter(part))
    weight = norm._parameters.pop("weight")
    norm.weight = weight.detach() * 100

    def make(norm, _):
        norm.weight = 2 * norm.part

    norm.register_forward_pre_hook(make)
    return layers(x) + 0


@pytest.mark.parametrize(
    "forward",
    [
        another_norm,
        no_norm,
        changed_output,
        views_after_the_convolution,
        evaluation_after_the_convolution,
        hook_that_makes_the_weight,
    ],
)
def test_normalisation_of_other_values_than_the_convolution_expected(forward, layers, policy):
    got = results(layers, forward)
    policy("eager")
    assert_close(got, results(layers, forward))
