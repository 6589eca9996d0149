"""Slimmable layers equal torch.nn layers on a prefix of the channels."""

import copy

import pytest
import torch
from torch import nn

from dspnet_fast.nn import (
    MomentumBatchNorm2d,
    SlimBatchNorm1d,
    SlimBatchNorm2d,
    SlimConv2d,
    SlimLinear,
    SlimSequential,
    activate,
    configure_batch_norm,
)

PAIRS = [
    (SlimConv2d, nn.Conv2d, (6, 8, 3), {"stride": 2, "padding": 1}),
    (SlimConv2d, nn.Conv2d, (6, 8, (3, 1)), {"padding": "same", "bias": False}),
    (SlimConv2d, nn.Conv2d, (6, 6, 5), {"groups": 6, "padding": 2}),
    (SlimConv2d, nn.Conv2d, (6, 9, 3), {"groups": 3, "dilation": 2, "padding": 2, "padding_mode": "reflect"}),
    (SlimBatchNorm2d, nn.BatchNorm2d, (6,), {"eps": 1e-3, "momentum": 0.2}),
    (SlimBatchNorm2d, nn.BatchNorm2d, (6,), {"momentum": None}),
    (SlimBatchNorm2d, nn.BatchNorm2d, (6,), {"affine": False, "track_running_stats": False}),
    (SlimBatchNorm1d, nn.BatchNorm1d, (6,), {}),
    (SlimLinear, nn.Linear, (6, 4), {}),
    (SlimLinear, nn.Linear, (6, 4), {"bias": False}),
]


def example(layer: nn.Module, channels: int = 6) -> torch.Tensor:
    flat = isinstance(layer, nn.Linear | nn.BatchNorm1d)
    return torch.randn(5, channels, dtype=torch.float64) if flat else torch.randn(5, channels, 9, 7).double()


def twins(slim_type, plain_type, args, kwargs):
    slim, plain = slim_type(*args, **kwargs).double(), plain_type(*args, **kwargs).double()
    plain.load_state_dict(slim.state_dict())  # strict: same names and shapes
    return slim, plain


@pytest.mark.parametrize(("slim_type", "plain_type", "args", "kwargs"), PAIRS)
def test_full_layer_equals_torch_nn(slim_type, plain_type, args, kwargs):
    slim, plain = twins(slim_type, plain_type, args, kwargs)
    for training in (True, True, False):
        slim.train(training), plain.train(training)
        x = example(slim)
        torch.testing.assert_close(slim(x), plain(x))
    torch.testing.assert_close(slim.state_dict(), plain.state_dict())


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_conv_uses_a_prefix_of_its_weight(channels, size):
    layer = SlimConv2d(6, 8, 3, stride=2, padding=1).double()
    x = example(layer, channels)
    activate(layer, {"": size})
    expected = torch.conv2d(x, layer.weight[:size, :channels], layer.bias[:size], 2, 1)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert layer.weight.grad[size:].count_nonzero() == 0 and layer.weight.grad[:, channels:].count_nonzero() == 0
    assert layer.weight.grad[:size, :channels].count_nonzero() > 0


def test_grouped_conv_drops_whole_groups():
    layer = SlimConv2d(6, 9, 3, groups=3).double()
    x = example(layer, 4)
    expected = torch.conv2d(x, layer.weight[:6], layer.bias[:6], groups=2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="not a whole number of groups of 2"):
        layer(example(layer, 3))


def test_depthwise_conv_has_as_many_outputs_as_inputs():
    layer = SlimConv2d(6, 6, 3, groups=6).double()
    x = example(layer, 4)
    torch.testing.assert_close(layer(x), torch.conv2d(x, layer.weight[:4], layer.bias[:4], groups=4), rtol=0, atol=0)


def test_linear_uses_a_prefix_of_its_weight():
    layer = SlimLinear(6, 4).double()
    x = example(layer, 5)
    activate(layer, {"": 3})
    torch.testing.assert_close(layer(x), x @ layer.weight[:3, :5].T + layer.bias[:3])


@pytest.mark.parametrize("layer", [SlimConv2d(6, 8, 3), SlimLinear(6, 4), SlimBatchNorm2d(6)])
def test_too_many_channels_are_rejected(layer):
    x = torch.randn(5, 7) if isinstance(layer, nn.Linear) else torch.randn(5, 7, 9, 7)
    with pytest.raises(ValueError, match="6 (input )?(channels|features), but the input has 7"):
        layer(x)


def test_sequential_runs_its_first_modules():
    layer = SlimSequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    with activate(layer, {"": 2}):
        torch.testing.assert_close(layer(x), layer[1](layer[0](x)))
    with activate(layer, {"": 0}):
        torch.testing.assert_close(layer(x), x)
    assert set(layer.state_dict()) == set(nn.Sequential(*layer).state_dict())


def test_views_are_normalised_separately():
    layer = SlimBatchNorm2d(6).double()
    first, second = example(layer), 3 * example(layer) + 1
    alone = copy.deepcopy(layer)
    with activate(layer, None, views=2):
        together = layer(torch.cat([first, second]))
    torch.testing.assert_close(together, torch.cat([alone(first), alone(second)]), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), alone.state_dict())
    with activate(layer, None, views=2), pytest.raises(ValueError, match="is not 2 parts"):
        layer(torch.cat([first, second])[:7])


def test_subnets_do_not_change_the_running_statistics():
    layer = SlimBatchNorm2d(6).double()
    before = copy.deepcopy(layer.state_dict())
    model = nn.ModuleDict({"conv": SlimConv2d(3, 6, 1), "norm": layer})
    with activate(model, {"conv": 4}):
        layer(example(layer, 4))
        layer(example(layer, 6))  # as many channels as the full network, but a subnet is active
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_evaluation_without_measured_statistics_is_rejected():
    model = nn.ModuleDict({"conv": SlimConv2d(3, 6, 1), "norm": SlimBatchNorm2d(6)}).eval()
    activate(model, {"conv": 4})
    with pytest.raises(RuntimeError, match="post_statistics"):
        model["norm"](torch.randn(5, 4, 9, 7))


def test_measured_statistics_are_converted_with_the_layer():
    layer = SlimBatchNorm2d(2)
    layer.measured["w0.50"] = (torch.zeros(2), torch.ones(2))
    assert layer.double().measured["w0.50"][0].dtype == torch.float64


def test_groups_of_a_view_update_the_running_statistics_once():
    layer = SlimBatchNorm2d(6).double()
    x = example(layer)[:4]
    with activate(layer, None, views=1), configure_batch_norm(layer, bn_groups=2):
        layer(x)
    parts = x.chunk(2)
    mean = sum(part.mean((0, 2, 3)) for part in parts) / 2
    variance = sum(part.var((0, 2, 3)) for part in parts) / 2
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * variance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("slim_type", "plain_type", "args", "kwargs"),
    [PAIRS[0], PAIRS[2], PAIRS[4], PAIRS[8]],
)
def test_autocast_casts_as_for_torch_nn_and_backward_works_outside(slim_type, plain_type, args, kwargs, dtype):
    slim, plain = (layer.float() for layer in twins(slim_type, plain_type, args, kwargs))
    x = example(slim).float()
    results = []
    for layer in (slim, plain):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        y.float().square().sum().backward()
        results.append((y, layer.weight.grad))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0].dtype == results[1][0].dtype


def test_configure_batch_norm_sets_named_attributes_and_restores_them():
    plain, momentum = SlimBatchNorm2d(6), MomentumBatchNorm2d(6)
    model = nn.ModuleList([plain, momentum, nn.BatchNorm2d(6)])
    configure_batch_norm(model, bn_groups=3)
    with configure_batch_norm(model, alpha=0.5, process_group=None):
        assert momentum.alpha == 0.5 and not hasattr(plain, "alpha")
        assert (plain.bn_groups, momentum.bn_groups) == (3, 3)
    assert (momentum.alpha, momentum.bn_groups) == (1.0, 3)
