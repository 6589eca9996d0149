"""nn.functional gives the same results with deferred normalisation as with torch.nn layers."""

import pytest
import torch
from torch import nn

from dspnet_fast.nn import SlimBatchNorm2d, SlimConv2d, activate
from dspnet_fast.nn.deferred import Deferred
from dspnet_fast.nn.functional import conv_norm_act, gated, materialize, pool
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

ACTS = [None, nn.ReLU(), nn.Hardswish(), nn.GELU("tanh")]
native = pytest.mark.parametrize("formulation", ["native"], indirect=True)  # deferred in this one alone


class Block(nn.Module):
    """Every function of nn.functional: expansion, depthwise, gate, projection, shortcuts of three kinds."""

    def __init__(self, act: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = SlimConv2d(6, 16, 1, bias=False), SlimBatchNorm2d(16)
        self.conv2, self.bn2 = SlimConv2d(16, 16, 3, padding=1, groups=16, bias=False), SlimBatchNorm2d(16)
        self.conv3, self.bn3 = SlimConv2d(16, 6, 1, bias=False), SlimBatchNorm2d(6)
        self.conv4, self.bn4 = SlimConv2d(6, 6, 3, padding=1, bias=False), SlimBatchNorm2d(6)
        self.act = act

    def forward(self, x):
        y = conv_norm_act(x, self.conv1, self.bn1, self.act)
        y = conv_norm_act(y, self.conv2, self.bn2, self.act)
        y = gated(gated(y, pool(y).sigmoid()), pool(y).tanh())
        y = conv_norm_act(y, self.conv3, self.bn3)
        tensor_shortcut = materialize(y, x, self.act)
        deferred_shortcut = materialize(conv_norm_act(tensor_shortcut, self.conv4, self.bn4), y)
        activated_shortcut = materialize(
            conv_norm_act(deferred_shortcut, self.conv4, self.bn4), conv_norm_act(x, self.conv4, self.bn4, self.act)
        )
        return (
            materialize(conv_norm_act(activated_shortcut, self.conv4, self.bn4, self.act))
            + pool(activated_shortcut)[:, :, None, None]
        )


def plain(model: nn.Module) -> nn.Module:
    """The same weights in torch.nn layers."""
    twin = Block(model.act)
    for name, module in model.named_children():
        if isinstance(module, SlimConv2d):
            arguments = (
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                1,
                module.padding,
                1,
                module.groups,
            )
            setattr(twin, name, nn.Conv2d(*arguments, bias=False))
        elif isinstance(module, SlimBatchNorm2d):
            setattr(twin, name, nn.BatchNorm2d(module.num_features))
    twin.load_state_dict(model.state_dict())
    return twin.double()


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_deferred_normalisation_equals_torch_nn_layers(act):
    model = Block(act).double()
    twin = plain(model)
    x = torch.randn(4, 6, 5, 4).double()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network(leaf) for network, leaf in zip((model, twin), leaves)]
    torch.testing.assert_close(*outputs)
    cotangent = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(cotangent)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())  # running statistics too
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


def test_slim_network_equals_the_active_subnet():
    model = Block(nn.ReLU()).double()
    x = torch.randn(4, 6, 5, 4).double()
    sizes = {"conv1": 11}
    post_statistics(model, [sizes], [x])
    small = slim(model, sizes, x)
    assert small.conv2.weight.shape == (11, 1, 3, 3) and type(small.conv1) is nn.Conv2d
    with activate(model, sizes):
        torch.testing.assert_close(model(x), small(x))


@native
def test_conv_norm_act_stores_the_raw_convolution_output():
    conv, norm = SlimConv2d(3, 8, 1, bias=False), SlimBatchNorm2d(8)
    x = torch.randn(4, 3, 5, 5)
    deferred = conv_norm_act(x, conv, norm, nn.ReLU())
    assert isinstance(deferred, Deferred) and deferred.act == "relu" and deferred.scale.shape == (1, 8)
    torch.testing.assert_close(deferred.x, torch.conv2d(x, conv.weight))
    torch.testing.assert_close(materialize(deferred), norm(conv(x)).relu())


@native
def test_unsupported_activation_is_rejected():
    with pytest.raises(ValueError, match="do not support the activation Mish"):
        conv_norm_act(torch.randn(2, 3, 4, 4), SlimConv2d(3, 8, 1, bias=False), SlimBatchNorm2d(8), nn.Mish())


@native
@pytest.mark.parametrize("options", [{"bias": True}, {"dilation": 2}, {"stride": (1, 2)}, {"padding": "same"}])
def test_unsupported_convolution_is_rejected(options):
    conv = SlimConv2d(3, 8, 3, **{"bias": False, **options})
    with pytest.raises(ValueError, match="conv_moments does not support"):
        conv_norm_act(torch.randn(2, 3, 8, 8), conv, SlimBatchNorm2d(8))
