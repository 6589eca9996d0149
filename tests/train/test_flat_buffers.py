"""FlatBuffers: parameters stay the same objects, and the update equals one that treats each tensor separately."""

import copy

import pytest
import torch
from torch import nn

from dspnet_fast.models import family
from dspnet_fast.nn import SlimConv2d, SlimLinear
from tests.ops.test_lars_ema_step import reference
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import ALIGNMENT, FlatBuffers

OPTIONS = {"weight_decay": 0.03, "momentum": 0.8, "eta": 0.02}
NAMES = ["c8-d1111", "c8-d2111", "c16-d2111"]


def make(dtype=torch.float32):
    torch.manual_seed(0)
    model = DSPNet("resnet", family("resnet", NAMES), "small", 33, 17).to(dtype)
    model = model.to(memory_format=torch.channels_last)
    for parameter in model.target.parameters():  # online and target differ, as after some steps
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model, torch.randn(8, 3, 16, 16, dtype=dtype)


def test_parameters_keep_values_strides_and_identity():
    model, _ = make()
    before = copy.deepcopy(model)
    originals = list(model.parameters())
    FlatBuffers(model.online, model.target)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert list(model.state_dict()) == list(before.state_dict())
    for parameter, same, old in zip(model.parameters(), originals, before.parameters()):
        assert parameter is same and parameter.stride() == old.stride() and parameter.is_leaf
        assert parameter.requires_grad == old.requires_grad
    weight = model.online.encoder.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameter_gradient_momentum_and_target_share_one_offset(dtype):
    model, _ = make(dtype)
    flat = FlatBuffers(model.online, model.target)
    targets = dict(model.target.named_parameters())
    assert len(flat.params) == len(flat.grads) == len(flat.momenta) > len(flat.targets)
    starts = []
    for name, parameter in model.online.named_parameters():
        momentum = flat.momentum()[name]
        start = parameter.storage_offset()
        starts.append(start)
        for tensor, whole in ((parameter, flat.params), (parameter.grad, flat.grads), (momentum, flat.momenta)):
            assert tensor.data_ptr() == whole[start:].data_ptr() and tensor.data_ptr() % ALIGNMENT == 0
            assert tensor.stride() == parameter.stride() and tensor.dtype == dtype
        if name in targets:
            assert targets[name].data_ptr() == flat.targets[start:].data_ptr()
            assert targets[name].stride() == parameter.stride()
        else:
            assert start >= len(flat.targets) and name.startswith("predictor")
    assert len(set(starts)) == len(starts)


def test_target_takes_the_strides_of_the_online_parameter():
    model, _ = make()
    model.target.to(memory_format=torch.contiguous_format)
    before = copy.deepcopy(model.target.state_dict())
    FlatBuffers(model.online, model.target)
    torch.testing.assert_close(model.target.state_dict(), before, rtol=0, atol=0)
    assert model.target.encoder.conv1.weight.stride() == model.online.encoder.conv1.weight.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autograd_accumulates_in_place_also_for_sliced_weights(memory_format):
    conv, linear = SlimConv2d(6, 8, 3), SlimLinear(8, 5)
    module = nn.ModuleList([conv, linear]).to(memory_format=memory_format)
    plain = copy.deepcopy(module)
    flat = FlatBuffers(module, nn.ModuleList())
    gradients = [parameter.grad for parameter in module.parameters()]
    addresses = [gradient.data_ptr() for gradient in gradients]
    for _ in range(2):
        for channels, size in ((6, 8), (3, 4)):
            images = torch.randn(2, channels, 4, 4).to(memory_format=memory_format)
            for conv_, linear_ in (module, plain):
                conv_.active_size = size
                linear_(conv_(images).mean((2, 3))).square().sum().backward()
    for parameter, gradient, address, other in zip(module.parameters(), gradients, addresses, plain.parameters()):
        assert parameter.grad is gradient and gradient.data_ptr() == address
        torch.testing.assert_close(gradient, other.grad)
    sums = sum(parameter.grad.double().square().sum() for parameter in plain.parameters())
    torch.testing.assert_close(flat.grads.double().square().sum(), sums)  # the padding received no gradient


def test_steps_equal_updates_of_separate_tensors():
    model, images = make(torch.float64)
    twin = copy.deepcopy(model)
    flat = FlatBuffers(model.online, model.target)
    momenta = {name: torch.zeros_like(p) for name, p in twin.online.named_parameters()}
    for lr, tau in ((0.5, 0.9), (0.4, 0.99), (0.3, 1.0)):
        for network in (model, twin):
            network.accumulate(images, list(network.family))
        flat.step(lr, tau, **OPTIONS)
        targets = dict(twin.target.named_parameters())
        for name, p in twin.online.named_parameters():
            p.data, momenta[name] = reference(p.data, p.grad, momenta[name], p.ndim > 1, lr, **OPTIONS)
            p.grad = None
            if name in targets:
                targets[name].data = tau * targets[name].data + (1 - tau) * p.data
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
        torch.testing.assert_close(flat.momentum(), momenta)
        assert not flat.grads.count_nonzero()


def test_padding_stays_zero():
    model, images = make()
    flat = FlatBuffers(model.online, model.target)
    inside = torch.zeros(len(flat.params), dtype=torch.bool)
    for parameter in model.online.parameters():
        inside[parameter.storage_offset() :][: parameter.numel()] = True
    assert not inside.all()
    for _ in range(2):
        model.accumulate(images, list(model.family))
        flat.step(0.5, 0.9, **OPTIONS)
        for tensor in (flat.params, flat.grads, flat.momenta, flat.targets):
            assert not tensor[~inside[: len(tensor)]].count_nonzero()


def test_unused_blocks_are_updated_with_a_zero_gradient():
    model, images = make(torch.float64)
    flat = FlatBuffers(model.online, model.target)
    model.accumulate(images, list(model.family))
    flat.step(0.5, 0.9, **OPTIONS)
    before = {name: (p.detach().clone(), flat.momentum()[name].clone()) for name, p in model.online.named_parameters()}
    model.accumulate(images, [model.family[0]])
    dropped = [name for name in before if name.startswith("encoder.layer1.1.")]
    assert dropped and not any(model.online.get_parameter(name).grad.count_nonzero() for name in dropped)
    flat.step(0.5, 0.9, **OPTIONS)
    for name in dropped:
        p, m = before[name]
        p, m = reference(p, torch.zeros_like(p), m, p.ndim > 1, 0.5, **OPTIONS)
        torch.testing.assert_close(model.online.get_parameter(name).detach(), p)
        torch.testing.assert_close(flat.momentum()[name], m)


def test_state_dict_is_compatible_with_a_plain_model(tmp_path):
    model, images = make()
    plain, _ = make()
    flat = FlatBuffers(model.online, model.target)
    model.accumulate(images, list(model.family))
    flat.step(0.5, 0.9, **OPTIONS)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    model.load_state_dict(plain.state_dict())
    flat.step(0.0, 1.0, **OPTIONS)  # the parameters are still views of the flat buffers
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_momentum_is_loaded_by_name():
    model, images = make()
    other, _ = make()
    flat = FlatBuffers(model.online, model.target)
    elsewhere = FlatBuffers(other.online, nn.ModuleDict({"projector": other.target.projector}))  # in another order
    model.accumulate(images, list(model.family))
    flat.step(0.5, 0.9, **OPTIONS)
    elsewhere.load_momentum(flat.momentum())
    assert flat.momenta.count_nonzero() and not torch.equal(elsewhere.momenta, flat.momenta)
    torch.testing.assert_close(
        dict(sorted(elsewhere.momentum().items())), dict(sorted(flat.momentum().items())), rtol=0, atol=0
    )


@pytest.mark.parametrize("wrong", ["a missing one", "one too many", "another shape"])
def test_load_momentum_refuses_another_network_and_changes_nothing(wrong):
    model, _ = make()
    flat = FlatBuffers(model.online, model.target)
    momentum = {name: torch.ones_like(value) for name, value in flat.momentum().items()}
    if wrong == "a missing one":
        momentum.popitem()
    elif wrong == "one too many":
        momentum["x"] = torch.ones(3)
    else:
        momentum["predictor.0.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="the momentum of "):
        flat.load_momentum(momentum)
    assert not flat.momenta.count_nonzero()


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.zero_grad(),
        lambda model: model.online.double(),
        lambda model: setattr(model.online.encoder.conv1.weight, "data", torch.randn(8, 3, 3, 3)),
        lambda model: setattr(model.target.encoder.bn1.weight, "data", torch.randn(8)),
        lambda model: setattr(model.online.encoder.bn1.weight, "grad", torch.randn(8)),
    ],
    ids=["zero_grad", "another dtype", "an online parameter", "a target parameter", "a gradient"],
)
def test_step_refuses_tensors_outside_the_buffers(replace):
    model, _ = make()
    flat = FlatBuffers(model.online, model.target)
    model.accumulate(torch.randn(8, 3, 16, 16), [model.family.full])
    before = flat.params.clone()
    with pytest.raises((RuntimeError, ValueError)):
        replace(model)
        flat.step(0.5, 0.9, **OPTIONS)
    assert torch.equal(flat.params, before)


def test_frozen_parameters_stay_outside_of_the_buffers():
    model, images = make()
    frozen = model.online.encoder.conv1.weight.requires_grad_(False)
    before = frozen.clone()
    target = model.target.encoder.conv1.weight.clone()
    flat = FlatBuffers(model.online, model.target)
    model.accumulate(images, list(model.family))
    flat.step(0.5, 0.9, **OPTIONS)
    assert "encoder.conv1.weight" not in flat.momentum() and "encoder.bn1.weight" in flat.momentum()
    assert torch.equal(frozen, before) and torch.equal(model.target.encoder.conv1.weight, target)
    assert frozen.grad is None and flat.params.isfinite().all() and flat.momenta.any()


def test_online_and_target_that_do_not_match_are_refused():
    for online, target in (
        (nn.Linear(3, 4), nn.Linear(3, 5)),
        (nn.Linear(3, 4, bias=False), nn.Linear(3, 4)),
        (nn.Linear(3, 4), nn.Linear(3, 4).double()),
        (nn.Linear(3, 4).requires_grad_(False), nn.Linear(3, 4).requires_grad_(False)),
        (nn.ReLU(), nn.ReLU()),
    ):
        with pytest.raises(ValueError):
            FlatBuffers(online, target)
