"""Momentum batch normalisation equals its formulas (Li et al. 2021, Momentum^2 Teacher)."""

import pytest
import torch

from dspnet_fast.nn import MomentumBatchNorm1d, MomentumBatchNorm2d, SlimBatchNorm2d, activate


@pytest.mark.parametrize("double_correction", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (8, 5)])
def test_outputs_and_running_statistics_equal_the_formulas(shape, double_correction):
    layer = (MomentumBatchNorm2d if len(shape) == 4 else MomentumBatchNorm1d)(5).double()
    layer.double_correction = double_correction
    layer.weight.data.uniform_(0.5, 2), layer.bias.data.normal_()
    momentum_mean, momentum_variance = torch.zeros(5).double(), torch.ones(5).double()
    dims = [0, 2, 3][: len(shape) - 1]
    column = (1, 5, 1, 1)[: len(shape)]
    activate(layer, None, views=2)
    for step, alpha in enumerate((1.0, 0.7, 0.2), 1):
        views = [torch.randn(shape).double() * 2 + 3, torch.randn(shape).double() - 1]
        count = views[0].numel() / 5
        layer.alpha = alpha
        outputs = layer(torch.cat(views)).chunk(2)
        means = [view.mean(dims) for view in views]
        variances = [((view - m.view(column)) ** 2).sum(dims) / (count - 1) for view, m in zip(views, means)]
        if double_correction:
            variances = [variance * count / (count - 1) for variance in variances]
        for view, mean, variance, output in zip(views, means, variances, outputs):
            mu = alpha * mean + (1 - alpha) * momentum_mean
            var = alpha * variance + (1 - alpha) * momentum_variance
            scale = layer.weight / torch.sqrt(var + layer.eps)
            expected = (view - mu.view(column)) * scale.view(column) + layer.bias.view(column)
            torch.testing.assert_close(output, expected)
        momentum_mean = alpha * (means[0] + means[1]) / 2 + (1 - alpha) * momentum_mean
        momentum_variance = alpha * (variances[0] + variances[1]) / 2 + (1 - alpha) * momentum_variance
        torch.testing.assert_close(layer.running_mean, momentum_mean)
        torch.testing.assert_close(layer.running_var, momentum_variance)
        assert layer.num_batches_tracked == step


def test_state_dict_has_the_names_of_ordinary_batch_norm():
    assert set(MomentumBatchNorm2d(5).state_dict()) == set(SlimBatchNorm2d(5).state_dict())


def test_evaluation_uses_the_running_statistics():
    layer = MomentumBatchNorm2d(5).double()
    layer(torch.randn(6, 5, 4, 3).double() + 2)
    x = torch.randn(2, 5, 4, 3).double()
    mean, variance = layer.running_mean.view(1, 5, 1, 1), layer.running_var.view(1, 5, 1, 1)
    torch.testing.assert_close(layer.eval()(x), (x - mean) / torch.sqrt(variance + layer.eps))


def test_prefix_of_the_channels_is_rejected():
    with pytest.raises(ValueError, match="not slimmable"):
        MomentumBatchNorm2d(5)(torch.randn(6, 4, 4, 3))


def test_single_value_per_channel_is_rejected():
    with pytest.raises(ValueError, match="at least two values"):
        MomentumBatchNorm1d(5)(torch.randn(1, 5))
