"""LARS and AdamW as optimizers: against formulas and torch.optim.AdamW in float64, targets, state and groups."""

import copy
import io

import pytest
import torch
from torch import nn

from dspnet_fast.optim import LARS, AdamW
from tests.ops.test_lars_ema_step import reference


def network(memory_format=torch.channels_last):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2, bias=True))
    return layers.double().to(memory_format=memory_format)


def backward(model, seed):
    torch.manual_seed(seed)
    model(torch.randn(6, 3, 5, 5, dtype=torch.float64)).square().sum().backward()


def pairs(online, target):
    return dict(zip(online.parameters(), target.parameters(), strict=True))


def test_lars_equals_the_formulas():
    model, options = network(), {"momentum": 0.8, "weight_decay": 0.03, "eta": 0.02}
    optimizer = LARS(model.parameters(), lr=0.5, **options)
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(3):
        backward(model, step)
        values = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
        optimizer.step()
        for index, ((p, g), parameter) in enumerate(zip(values, model.parameters(), strict=True)):
            p, momenta[index] = reference(p, g, momenta[index], p.ndim > 1, 0.5, **options)
            torch.testing.assert_close(parameter.detach(), p)
            assert not parameter.grad.count_nonzero()


@pytest.mark.parametrize("zero", [True, False], ids=["with zero_grad", "without zero_grad"])
def test_adamw_equals_that_of_pytorch(zero):
    ours, theirs = network(), network()
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim > 1) is several] for several in (True, False))
    optimizer = AdamW(ours.parameters(), 0.1, 0.8, 0.95, 1e-6, 0.3)
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, 0.1, (0.8, 0.95), 1e-6)
    scheduler, other_scheduler = (torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, other))
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        optimizer.step()
        other.step()
        other.zero_grad()
        if zero:
            optimizer.zero_grad()
        scheduler.step()
        other_scheduler.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [LARS, AdamW])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_targets_follow_the_parameters(kind, memory_format):
    online, target = network(), network(memory_format)
    before = copy.deepcopy(target)
    optimizer = kind(online.parameters(), lr=0.1, targets=pairs(online, target), tau=0.9)
    backward(online, 0)
    online[3].bias.grad = None
    optimizer.step()
    for p, xi, old in zip(online.parameters(), target.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(xi, 0.9 * old + 0.1 * p)


@pytest.mark.parametrize("kind", [LARS, AdamW])
def test_loaded_state_continues_exactly(kind):
    straight, model = network(), network()
    optimizers = [kind(m.parameters(), lr=0.1) for m in (straight, model)]
    for step in range(2):
        for m, optimizer in zip((straight, model), optimizers, strict=True):
            backward(m, step)
            optimizer.step()
    file = io.BytesIO()
    torch.save(optimizers[1].state_dict(), file)
    file.seek(0)
    again = kind(model.parameters(), lr=9.0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for m, optimizer in ((straight, optimizers[0]), (model, again)):
        backward(m, 2)
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), straight.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [LARS, AdamW])
def test_copy_of_model_target_and_optimizer_continues_exactly(kind):
    online, target = network(), network()
    original = online, target, kind(online.parameters(), lr=0.1, targets=pairs(online, target), tau=0.9)
    copied = copy.deepcopy(original)
    for model, _, optimizer in (original, copied):
        backward(model, 0)
        optimizer.step()
    for ours, theirs in zip(copied[:2], original[:2], strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert not torch.equal(target[0].weight, network()[0].weight)


def test_gradients_of_another_memory_format_are_accepted():
    model, twin = network(), network()
    for m in (model, twin):
        backward(m, 0)
    model[0].weight.grad = model[0].weight.grad.contiguous()
    for m in (model, twin):
        LARS(m.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_groups_have_their_own_values():
    model = network()
    optimizer = LARS([{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters()}], lr=0.1)
    before = copy.deepcopy(model)
    backward(model, 0)
    loss = optimizer.step(lambda: 3.0)
    assert loss == 3.0 and torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[3].weight, before[3].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: LARS([p], lr=-1.0), "lr cannot be negative"),
        (lambda p: AdamW([p], beta2=1.5), "beta2 must lie between 0 and 1"),
        (lambda p: LARS([p.detach().half().requires_grad_()], lr=0.1), "float32 or float64, not torch.float16"),
        (lambda p: LARS([torch.zeros(4, 4)[:, ::2].requires_grad_()], lr=0.1), "has gaps"),
        (lambda p: LARS([p], lr=0.1, targets={p: torch.zeros(3)}), r"a target of \[3\]"),
        (lambda p: LARS([p], lr=0.1, targets={torch.zeros(3): torch.zeros(3)}), "does not train"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.zeros(2, 2)))
