"""Post-statistics are the moments of all data, stored by subnet."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dspnet_fast.models import build, family
from dspnet_fast.nn import SlimBatchNorm2d, SlimConv2d, activate
from dspnet_fast.statistics import Moments, load_statistics, measured_statistics, post_statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_moments_are_exact_for_batches_with_different_means(dtype):
    batches = [torch.randn(n, 3, 5, 4, dtype=dtype) * n + 100 * n for n in (1, 7, 32, 0, 2)]
    moments = Moments()
    for batch in batches:
        if len(batch):
            variance, mean = torch.var_mean(batch, (0, 2, 3), correction=0)
            moments.add(mean, variance, batch[:, 0].numel())
    everything = torch.cat(batches).double()
    mean, variance = moments.result(torch.float64)
    torch.testing.assert_close(mean, everything.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, everything.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_subnets_with_equal_channel_counts_have_separate_statistics():
    model = nn.Sequential(SlimConv2d(3, 8, 1), SlimConv2d(8, 4, 1), SlimBatchNorm2d(4)).double()
    batches = [torch.randn(6, 3, 4, 4).double() + shift for shift in range(3)]
    narrow = {"0": 2}
    post_statistics(model, [narrow, None], batches)
    for dn in (narrow, None):
        with activate(model, dn):
            y = model[1](model[0](torch.cat(batches)))
            mean, variance = model[2].evaluation_statistics()
            torch.testing.assert_close(mean, y.mean((0, 2, 3)))
            torch.testing.assert_close(variance, y.var((0, 2, 3), correction=0))


def test_one_pass_measures_all_subnets_and_keeps_the_training_state():
    made = family("resnet", ["c8-d1111", "c8-d2111", "c16-d2111"])
    model = build("resnet", made.full, "small")
    before = copy.deepcopy(model.state_dict())
    passes = iter([torch.randn(4, 3, 8, 8), torch.randn(3, 3, 8, 8)])  # an iterator cannot be read twice
    assert post_statistics(model, made, passes) == 7
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training and model.bn1.track_running_stats
    for dn in made:
        with activate(model, dn):
            assert model(torch.randn(1, 3, 8, 8)).isfinite().all()


def test_training_deletes_measured_statistics():
    model = nn.Sequential(SlimConv2d(3, 32, 1), SlimBatchNorm2d(32))
    post_statistics(model, [0.5], [torch.randn(4, 3, 2, 2)])
    model.train()(torch.randn(4, 3, 2, 2))
    with activate(model.eval(), 0.5), pytest.raises(RuntimeError, match="no batch normalisation statistics"):
        model(torch.randn(4, 3, 2, 2))


@pytest.mark.parametrize("change", ["load_state_dict", "optimizer", "moving average", "copy"])
def test_statistics_of_other_weights_are_not_used(change):
    model = nn.Sequential(SlimConv2d(3, 32, 1), SlimBatchNorm2d(32))
    x = torch.randn(4, 3, 2, 2)
    post_statistics(model, [0.5], [x])
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with activate(twin, 0.5):
            twin(x)
    if change == "load_state_dict":
        model.load_state_dict(model.state_dict())
    elif change == "optimizer":
        model[0].weight.grad = torch.ones_like(model[0].weight)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    else:
        for parameter in model.state_dict().values():
            parameter.lerp_(torch.ones(()).to(parameter.dtype), 0.5) if parameter.is_floating_point() else None
    twin = copy.deepcopy(model) if change == "copy" else model
    with activate(twin, 0.5), pytest.raises(RuntimeError, match="no batch normalisation statistics"):
        twin(x)
    assert measured_statistics(twin, [0.5]) == {}


def test_statistics_are_restored_from_a_flat_dictionary():
    made = family("resnet", ["c8-d1111", "c16-d1121"])
    model = build("resnet", made.full, "small")
    post_statistics(model, made, [torch.randn(4, 3, 8, 8)])
    flat = measured_statistics(model, made)
    assert "c8-d1111/layer3.1.bn1.running_mean" not in flat
    twin = build("resnet", made.full, "small")
    twin.load_state_dict(model.state_dict())
    load_statistics(twin.eval(), made, flat)
    x = torch.randn(2, 3, 8, 8)
    for dn in made:
        with activate(model, dn), activate(twin, dn):
            torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)


def test_empty_batches_are_rejected():
    with pytest.raises(ValueError, match="at least one batch"):
        post_statistics(build("resnet", family("resnet", ["c8-d1111"]).full), [None], [])
