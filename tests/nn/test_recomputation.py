"""Activation checkpointing repeats the forward pass of the subnet that was active, whenever the backward pass runs."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dspnet_fast.nn import activate, fused, slimmable
from dspnet_fast.nn.recomputation import _notes


class Network(nn.Module):
    """Two checkpointed parts, with layers of several kinds, one of them nested in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.GroupNorm(2, 16))
        self.inner = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish())
        self.outer = nn.Conv2d(32, 32, 3, groups=32, bias=False)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 4)
        self.reentrant: bool | None = None  # None: without checkpoints

    def part(self, function, x):
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)

    def second(self, x):
        return self.norm(self.outer(self.part(self.inner, x))).relu().mean((2, 3))

    def forward(self, x):
        return self.head(self.part(self.second, self.part(self.first, x)))


def gradients(network, x, reentrant, apart):
    """Gradients of two subnets, by a backward pass inside of each `activate` block, or by one behind them."""
    network.reentrant = reentrant
    network.zero_grad()
    losses = []
    for width in (0.5, 1.0, 0.25):
        with activate(network, width, views=2):
            losses.append(network(x.clone().requires_grad_()).square().sum())
            if not apart:
                losses[-1].backward()
    if apart:
        sum(losses).backward()
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_pass_outside_of_the_block_repeats_the_same_subnet(reentrant):
    network = fused(slimmable(Network(), torch.randn(2, 3, 8, 8))).double()
    x = torch.randn(4, 3, 8, 8).double()
    expected = gradients(network, x, None, apart=False)
    torch.testing.assert_close(gradients(network, x, reentrant, apart=True), expected)
    assert network.first[0].active_size is None and network.norm.views == 1


def test_active_subnet_is_restored_after_the_backward_pass():
    network = slimmable(Network(), torch.randn(2, 3, 8, 8))
    network.reentrant = False
    with activate(network, 0.5):
        loss = network(torch.randn(4, 3, 8, 8)).sum()
    activate(network, 0.25)
    loss.backward()
    assert network.first[0].active_size == 8 and network.inner[0].active_size == 8
    assert network.head.weight.grad[:, 16:].count_nonzero() == 0 != network.head.weight.grad[:, 8:16].count_nonzero()


def test_notes_are_limited_and_freed_with_the_model():
    network = slimmable(nn.Sequential(nn.Conv2d(3, 8, 1)), torch.randn(2, 3, 8, 8), keep=())
    x = torch.randn(1, 3, 1, 1)
    for _ in range(3000):
        with activate(network, 0.5):
            network(x)
    assert len(_notes[network].numbers) <= 2001
    alive = weakref.ref(network)
    del network
    gc.collect()
    assert alive() is None
