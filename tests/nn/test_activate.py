"""activate() selects a subnet, restores the previous one, and rejects subnets that the model does not contain."""

import pytest
import torch
from torch import nn

from dspnet_fast.models import build, subnet
from dspnet_fast.nn import SlimBatchNorm2d, SlimConv2d, SlimLinear, activate


class CustomNetwork(nn.Module):
    """A network without a `layer_sizes` method, of slimmable layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = SlimConv2d(3, 32, 3, padding=1)
        self.norm1 = SlimBatchNorm2d(32)
        self.conv2 = SlimConv2d(32, 64, 3, stride=2)
        self.classifier = SlimLinear(64, 10)

    def forward(self, x):
        return self.classifier(self.conv2(self.norm1(self.conv1(x)).relu()).mean((2, 3)))


def test_width_scales_convolutions_but_not_the_classifier():
    model, x = CustomNetwork(), torch.randn(2, 3, 8, 8)
    sizes = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, __, y, name=name: sizes.update({name: y.shape[1]}))
    activate(model, 0.5)
    model(x)
    assert sizes == {"conv1": 16, "norm1": 16, "conv2": 32, "classifier": 10}
    activate(model, None)
    model(x)
    assert sizes == {"conv1": 32, "norm1": 32, "conv2": 64, "classifier": 10}


def test_mapping_sets_the_sizes_of_named_modules():
    model = CustomNetwork()
    activate(model, {"conv2": 7})
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert (model.conv1.size, model.conv2.size) == (32, 7)


def test_with_block_restores_the_previous_subnet_when_nested_and_after_errors():
    model = CustomNetwork()
    activate(model, 0.5)
    with activate(model, 0.25, views=2):
        assert (model.conv1.size, model.norm1.views) == (8, 2)
        with pytest.raises(ZeroDivisionError), activate(model, None):
            assert model.conv1.size == 32
            raise ZeroDivisionError
        assert (model.conv1.size, model.norm1.views) == (8, 2)
    assert (model.conv1.size, model.norm1.views) == (16, 1)


@pytest.mark.parametrize(
    ("dn", "message"),
    [
        ({"conv1": 33}, "needs 33 units of conv1, which has 32"),
        ({"stem": 3}, "does not have: stem"),
        (1.5, "at most 1"),
        ("w0.50", "no layer_sizes"),
    ],
)
def test_invalid_subnet_is_rejected_and_the_active_one_is_kept(dn, message):
    model = CustomNetwork()
    activate(model, 0.5)
    with pytest.raises(ValueError, match=message):
        activate(model, dn)
    assert (model.conv1.size, model.conv2.size) == (16, 32)


def test_subnet_larger_than_the_model_is_rejected():
    model = build("mobilenet_v3_large", subnet("mobilenet_v3_large", "w0.50"))
    with pytest.raises(ValueError, match="w0.75 needs"):
        activate(model, "w0.75")
    deep = build("resnet", subnet("resnet", "c16-d1111"))
    with pytest.raises(ValueError, match="c16-d2111 needs 2 units of layer1, which has 1"):
        activate(deep, "c16-d2111")
