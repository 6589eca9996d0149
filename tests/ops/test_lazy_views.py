"""Lazily negated and conjugated views are resolved as inputs and rejected as written arguments."""

import harness
import pytest
import torch
from torch import Tensor

from dspnet_fast.ops import cpp
from dspnet_fast.ops.norm_act import norm_act


def negated(*shape: int) -> Tensor:
    """A lazy view whose memory holds the negated numbers."""
    view = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    return view


def conjugated(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex64).conj()


@pytest.fixture(params=["dspnet", "dspnet_cpp"])
def library(request):
    if request.param == "dspnet_cpp":
        loaded, reason = cpp.load()
        if not loaded:
            pytest.skip(reason)
    return getattr(torch.ops, request.param)


@pytest.mark.parametrize("lazy", [negated, conjugated])
@pytest.mark.parametrize("place", range(4))
def test_lazy_flat_buffers_are_rejected(library, lazy, place):
    """PyTorch would decrement a reference count too often, as the operator returns nothing, and crash later."""
    buffers = [torch.randn(6) for _ in range(4)]
    buffers[place] = lazy(6)
    scalars = torch.tensor(0.1), torch.tensor(0.9)
    with pytest.raises(RuntimeError, match=r"written to.*resolve_neg"):
        library.lars_ema_step(*buffers, [0, 2], [2, 2], *scalars, 0.0, 0.9, 1e-3, None)


@pytest.mark.parametrize("lazy", [negated, conjugated])
def test_lazy_targets_are_rejected(library, lazy):
    with pytest.raises(RuntimeError, match=r"targets is written to.*resolve_neg"):
        library.ema_update([torch.randn(3), lazy(3)], [torch.randn(3), lazy(3)], 0.5)


def test_lazy_onlines_are_resolved(library):
    target, online = torch.zeros(3), negated(3)
    library.ema_update([target], [online], 0.0)
    assert torch.equal(target, online)


def test_lazy_main_grads_are_rejected(library):
    """The operator returns other tensors than those it writes to."""
    rows, channels = torch.randn(2, 3), torch.rand(3)
    with pytest.raises(RuntimeError, match=r"bias_main_grad is written to.*resolve_neg"):
        library.scale_shift_backward(rows, rows, rows, rows, channels, channels, channels, negated(3), 1e-5)


provider = harness.provider_of(norm_act)


def test_lazy_inputs_are_resolved(provider):
    """Also in eager calls that bypass PyTorch's dispatcher, which would resolve them."""
    x, scale, shift, grad = negated(2, 3, 4, 4), negated(1, 3), negated(1, 3), negated(2, 3, 4, 4)
    found = []
    for ready in (lambda tensor: tensor, Tensor.resolve_neg):
        leaves = [ready(tensor).to(harness.device()).detach().requires_grad_() for tensor in (x, scale, shift)]
        result = norm_act(*leaves, "hardswish", None, None, None, None)
        result.backward(ready(grad).to(harness.device()))
        found.append((result, *(leaf.grad for leaf in leaves)))
    for lazy, resolved in zip(*found, strict=True):
        torch.testing.assert_close(lazy, resolved, rtol=0, atol=0)
