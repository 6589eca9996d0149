"""LARS against its formulas, written out for one tensor at a time."""

import torch

from train.optim import LARS


def reference(p, g, m, lr, momentum, weight_decay, eta):
    if p.ndim > 1:
        g = g + weight_decay * p
        if p.norm() > 0 and g.norm() > 0:
            g = eta * p.norm() / g.norm() * g
    m = momentum * m + g
    return p - lr * m, m


def test_three_steps():
    options = {"momentum": 0.8, "weight_decay": 0.03, "eta": 0.02}
    shapes = [(4, 3, 2, 2), (5, 3), (5,), (), (4, 4), (3, 2)]
    params = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    params[4].data.zero_()  # no weight norm: the ratio is 1
    optimizer = LARS(params, lr=1.0, **options)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for lr in (0.5, 0.4, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        gradients = [torch.randn_like(p) for p in params]
        gradients[5].zero_()
        for p, g in zip(params, gradients):
            p.grad = g.clone()
        optimizer.step()
        expected = [reference(p, g, m, lr, **options) for (p, m), g in zip(expected, gradients)]
        for p, g, (wanted, _) in zip(params, gradients, expected):
            torch.testing.assert_close(p.detach(), wanted)
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0)  # gradients are not changed


def test_no_gradient_no_decay_no_change():
    weight = torch.randn(3, 2, requires_grad=True)
    before = weight.detach().clone()
    LARS([weight], lr=1.0, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)


def test_zero_gradient_and_zero_decay_of_a_zero_weight_stay_finite():
    weight = torch.zeros(3, 2, requires_grad=True)
    weight.grad = torch.zeros(3, 2)
    LARS([weight], lr=1.0, weight_decay=0.0).step()
    assert weight.isfinite().all()
