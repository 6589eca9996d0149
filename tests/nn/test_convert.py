"""slimmable() converts networks of torch.nn layers in place."""

import copy

import torch
import torchvision
from torch import nn

from dspnet_fast.nn import SlimBatchNorm2d, SlimConv2d, activate, slimmable
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics


def test_outputs_and_state_are_unchanged_until_a_subnet_is_activated():
    plain = torchvision.models.resnet18(num_classes=5).double()
    network = slimmable(copy.deepcopy(plain))
    x = torch.randn(3, 3, 32, 32).double()
    for training in (True, False):
        torch.testing.assert_close(network.train(training)(x), plain.train(training)(x))
    torch.testing.assert_close(network.state_dict(), plain.state_dict())


def train(model, optimizer, batches):
    """An ordinary training loop."""
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_ordinary_training_loop_changes_only_the_active_subnet():
    network = torchvision.models.resnet18(num_classes=2)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.02
    )  # before slimmable(), which must keep the parameter objects
    assert slimmable(network) is network
    before = copy.deepcopy(network.state_dict())
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    with activate(network, 0.25):
        losses = train(network, optimizer, 12 * [(images, labels)])
        assert losses[-1] < 0.5 * losses[0]
    conv = network.layer4[1].conv2.weight.detach()
    assert not torch.equal(conv[:128, :128], before["layer4.1.conv2.weight"][:128, :128])
    rest = torch.ones_like(conv, dtype=torch.bool)
    rest[:128, :128] = False
    assert torch.equal(conv[rest], before["layer4.1.conv2.weight"][rest])

    post_statistics(network, [0.25], [images])
    small = slim(network, 0.25)
    assert small.layer4[1].conv2.weight.shape == (128, 128, 3, 3) and type(small.bn1) is nn.BatchNorm2d
    with activate(network, 0.25):
        torch.testing.assert_close(small(images), network(images), rtol=1e-4, atol=1e-4)


def test_slimmable_layers_are_kept():
    model = nn.Sequential(SlimConv2d(3, 8, 1), SlimBatchNorm2d(8), nn.Conv2d(8, 8, 1))
    model[1].measured["w0.50"] = (torch.zeros(4), torch.ones(4))
    slimmable(model, keep=())
    assert [type(module) for module in model] == [SlimConv2d, SlimBatchNorm2d, SlimConv2d]
    assert "w0.50" in model[1].measured
