"""Gradients of weight prefixes in plain PyTorch."""

import pytest
import torch

from dspnet_fast.nn import SlimConv2d, activate
from dspnet_fast.nn.prefix import shared_prefixes


@pytest.fixture(autouse=True)
def formulation(policy):
    """Only plain PyTorch copies prefixes."""
    policy("eager")


def gradients(active: int, dtype: torch.dtype, collects: bool | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Input gradient and main_grads of a convolution that runs twice; `collects` None: outside of any context."""
    torch.manual_seed(0)
    conv = SlimConv2d(6, 8, 3)
    for parameter in conv.parameters():
        parameter.main_grad = torch.ones_like(parameter)
    x = torch.randn(2, 4 if active < 8 else 6, 5, 5, requires_grad=True)
    with activate(conv, {"": active}):
        if collects is None:
            conv(conv_input := x.to(dtype)).add(conv(conv_input * 2)).square().sum().backward()
        else:
            with shared_prefixes(collects=collects):
                loss = conv(conv_input := x.to(dtype)).add(conv(conv_input * 2)).square().sum()
                if collects:
                    loss.backward()
            if not collects:
                loss.backward()
    return x.grad, [parameter.main_grad for parameter in conv.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", [5, 8])
def test_shared_prefixes_give_the_gradients_of_separate_ones(active, dtype):
    separate = gradients(active, dtype, None)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for collects in (False, True):
        torch.testing.assert_close(gradients(active, dtype, collects), separate, rtol=tolerance, atol=tolerance)


def test_a_frozen_weight_gets_no_gradient():
    conv = SlimConv2d(6, 8, 3, bias=False).requires_grad_(False)
    conv.weight.main_grad = torch.zeros_like(conv.weight)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with activate(conv, {"": 5}), shared_prefixes(collects=True):
        conv(x).sum().backward()
    assert x.grad.abs().sum() > 0 and not conv.weight.main_grad.any()


@pytest.mark.parametrize("whole", [True, False])
def test_gradients_of_whole_weights_in_16_bits_are_added_when_asked(whole):
    conv = SlimConv2d(4, 8, 3, bias=False)
    conv.weight.main_grad = torch.zeros_like(conv.weight)
    with shared_prefixes(collects=True, whole=whole):
        conv(torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)).sum().backward()
        assert bool(conv.weight.main_grad.any()) != whole
    assert conv.weight.main_grad.all()


def test_gradients_are_added_when_the_context_ends():
    conv = SlimConv2d(6, 8, 3, bias=False)
    conv.weight.main_grad = torch.zeros_like(conv.weight)
    with activate(conv, {"": 5}), shared_prefixes(collects=True):
        with shared_prefixes():  # the inner context shares the prefixes of the outer one
            y = conv(torch.randn(2, 4, 5, 5))
        y.sum().backward()
        assert not conv.weight.main_grad.any()
    assert conv.weight.main_grad[:5, :4].all() and not conv.weight.main_grad[5:].any()
