"""Networks that fused() has prepared compute the same with operators as in plain PyTorch."""

import copy
import functools
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GELU, BatchNormAct2d, GELUTanh
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from dspnet_fast import ops
from dspnet_fast.nn import SlimConv2d, activate, configure_batch_norm, fused, slimmable
from dspnet_fast.nn import deferred_tensor as module
from dspnet_fast.nn.deferred_tensor import DeferredTensor
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics


@pytest.fixture(autouse=True)
def formulation(policy):
    """Tests set the policy themselves; by default the operators' native bodies compute."""
    policy("native")


def chain(channels: int, out: int, kernel: int = 1, groups: int = 1, norm=nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, 1, kernel // 2, groups=groups, bias=False), norm(out))


class Network(nn.Module):
    """Every way in which a deferred tensor is made, extended and read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depthwise = chain(3, 16, 3), chain(16, 32), chain(32, 32, 3, 32)
        self.squeeze, self.project = nn.Conv2d(32, 32, 1), chain(32, 16)
        self.down, self.second = chain(16, 24), chain(16, 24, 3, norm=BatchNormAct2d)
        self.grouped, self.last = chain(48, 48, 3, 2), chain(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x), inplace=True)
        y = nn.ReLU6(inplace=True)(self.expand(x))
        y = F.silu(self.depthwise(y))
        y = self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid() * y
        y = self.project(y)
        y += x
        z = self.second(F.relu(y)) + self.down(y)
        z = F.max_pool2d(F.relu_(z), 2)
        z = self.grouped(torch.cat([z, z.tanh()], 1)).relu()
        z = self.last(z)
        return F.adaptive_avg_pool2d(z, 1).flatten(1) + z.amax((2, 3))


def results(network: nn.Module, x: Tensor, policy: str) -> list[Tensor]:
    """Outputs, gradients and state of a copy of the network."""
    ops.registry.set_policy(policy)
    network, x = copy.deepcopy(network), x.clone().requires_grad_()
    outputs = network(x)
    outputs.square().sum().backward()
    return [outputs, x.grad, *(p.grad for p in network.parameters()), *network.state_dict().values()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("width", [None, 0.5])
def test_outputs_gradients_and_statistics_equal_plain_pytorch(training, width):
    network = fused(slimmable(Network().double(), torch.randn(2, 3, 8, 8).double()))
    x = torch.randn(4, 3, 8, 8).double()
    if not training:
        post_statistics(network, [width], [x])
        network.eval()
    with activate(network, width, views=2):
        torch.testing.assert_close(results(network, x, "native"), results(network, x, "eager"))


def test_grouped_convolution_of_more_outputs_than_inputs_is_computed_in_plain_pytorch():
    network = fused(nn.Sequential(*chain(8, 16, 3, 8), *chain(16, 8)).double(), torch.randn(2, 8, 4, 4).double())
    x = torch.randn(2, 8, 4, 4).double()
    torch.testing.assert_close(results(network, x, "native"), results(network, x, "eager"))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t", "regnetx_002", "fasternet_t0"])
def test_networks_of_timm_equal_plain_pytorch(name):
    network = fused(timm.create_model(name, num_classes=0).double())
    x = torch.randn(4, 3, 32, 32).double()
    outputs, *gradients = results(network, x, "native")
    expected, *wanted = results(network, x, "eager")
    torch.testing.assert_close(outputs, expected)
    largest = max(gradient.abs().max() for gradient in wanted)
    for got, want in zip(gradients, wanted):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10 * largest.item())


def test_activations_are_computed_at_ends_of_blocks_only(monkeypatch):
    computed = []
    original = module.compute
    monkeypatch.setattr(module, "compute", lambda *args: computed.append(args) or original(*args))
    network = fused(timm.create_model("mobilenetv3_small_050", num_classes=0))
    chains = sum(vars(layer).get("norm") is not None for layer in network.modules())
    residuals = sum(getattr(block, "has_skip", False) for block in network.modules())
    network(torch.randn(2, 3, 64, 64))
    assert chains == 34 and len(computed) == residuals == 7


@pytest.mark.parametrize(
    "act, name",
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardswish(inplace=True), "hardswish"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (GELU(), "gelu"),
        (GELUTanh(), "gelu_tanh"),
    ],
    ids=str,
)
def test_activation_function_is_deferred(act, name, policy):
    network = fused(nn.Sequential(*chain(3, 8), act).double(), torch.randn(2, 3, 4, 4).double())
    x = torch.randn(4, 3, 4, 4).double()
    assert network(x).state.x.act == name
    torch.testing.assert_close(results(network, x, "native"), results(network, x, "eager"))


def test_activation_of_timms_normalisation_is_deferred_without_calls_of_its_modules():
    network = fused(chain(3, 8, norm=BatchNormAct2d).double(), torch.randn(2, 3, 4, 4).double())
    x = torch.randn(4, 3, 4, 4).double()
    y = network(x)
    assert y.state.x.act == "relu" and y.state.value is None
    torch.testing.assert_close(results(network, x, "native"), results(network, x, "eager"))


@pytest.mark.parametrize("name", ["drop", "act"])
@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "backward hook", "global hook", "forward method"])
def test_modules_of_timms_normalisation_that_somebody_watches_are_called(name, kind):
    norm = functools.partial(BatchNormAct2d, inplace=False)
    network = fused(chain(3, 8, norm=norm).double(), torch.randn(2, 3, 4, 4).double())
    watched, seen = getattr(network[1], name), []
    handle = None
    if kind == "global hook":
        handle = register_module_forward_hook(lambda module, *_: seen.append(kind) if module is watched else None)
    elif kind == "forward hook":
        watched.register_forward_hook(lambda *_: seen.append(kind))
    elif kind == "pre-hook":
        watched.register_forward_pre_hook(lambda *_: seen.append(kind))
    elif kind == "backward hook":
        watched.register_full_backward_hook(lambda *_: seen.append(kind))
    else:
        original = watched.forward
        watched.forward = lambda x: seen.append(kind) or original(x)
    network(torch.randn(4, 3, 4, 4).double()).sum().backward()
    if handle is not None:
        handle.remove()
    assert seen == [kind]


def test_dropout_of_timms_normalisation_runs():
    network = fused(chain(3, 8, norm=BatchNormAct2d), torch.randn(2, 3, 4, 4))
    network[1].drop = nn.Dropout(0.5)
    assert (network(torch.randn(4, 3, 16, 16)) == 0).float().mean() > 0.7  # half of ReLU's positive outputs too


def test_ordinary_layers_outside_of_chains_keep_their_classes():
    network = fused(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU()))
    assert isinstance(network[0], SlimConv2d) and type(network[2]) is nn.Conv2d
    assert set(network.state_dict()) == set(
        nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).state_dict()
    )


def test_small_network_cut_out_of_a_fused_one_equals_its_subnet():
    network = fused(slimmable(Network(), torch.randn(2, 3, 8, 8)))
    x = torch.randn(4, 3, 8, 8)
    post_statistics(network, [0.5], [x])
    small = slim(network, 0.5)
    assert type(small.stem[0]) is nn.Conv2d and "norm" not in vars(small.stem[0])
    with activate(network, 0.5):
        torch.testing.assert_close(network.eval()(x), small(x))


def test_ghost_groups_and_observers_change_the_moments_that_convolutions_compute():
    network = fused(Network().double(), torch.randn(2, 3, 8, 8).double())
    x = torch.randn(8, 3, 8, 8).double()
    with configure_batch_norm(network, bn_groups=4):
        torch.testing.assert_close(results(network, x, "native"), results(network, x, "eager"))


def test_network_survives_copying_and_pickling():
    network = fused(Network(), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin.stem[0].norm is twin.stem[1] is not network.stem[1]
        torch.testing.assert_close(twin(x), network(x))


# Deferred tensors in the hands of code that does not know them.


@pytest.fixture
def made():
    """A function that makes a leaf and the deferred tensor hardswish(norm(conv(leaf)))."""
    conv, norm = SlimConv2d(3, 8, 3, bias=False).double(), nn.BatchNorm2d(8).double()
    layers = fused(nn.Sequential(conv, norm, nn.Hardswish()), torch.randn(2, 3, 6, 6).double())
    images = torch.randn(4, 3, 6, 6).double()

    def make() -> tuple[Tensor, Tensor]:
        leaf = images.clone().requires_grad_()
        return leaf, layers(leaf)

    return make


class Half(torch.autograd.Function):
    """A custom gradient whose output is deferred."""

    @staticmethod
    def forward(ctx, x, layers):
        return layers(x)

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient.sum() * torch.ones(4, 3, 6, 6).double(), None


class Square(torch.autograd.Function):
    """A custom gradient, which gets tensors without __torch_function__."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2 * ctx.saved_tensors[0]


def in_place(x: Tensor) -> Tensor:
    alias, ones = x, torch.ones(x.shape, dtype=x.dtype)
    x += ones
    x *= 2
    x.relu_()
    return alias + x


def in_place_after_reading(x: Tensor) -> Tensor:
    alias = x
    x += torch.ones_like(x)
    x *= 2
    x.relu_()
    return alias + x


def watched(x: Tensor) -> Tensor:
    x.register_hook(lambda gradient: 3 * gradient)
    return x + 1


READERS = {
    "custom gradient": Square.apply,
    "in place": in_place,
    "in place after reading": in_place_after_reading,
    "gate in place": lambda x: x.mul_(x.detach().mean((2, 3), keepdim=True)) + x,
    "gradient hook": watched,
    "reentrant checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=True),
    "checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
    "copy without gradient": lambda x: x.detach() + x,
    "read twice": lambda x: x.sum() * x.mean((2, 3)),
    "index": lambda x: x[:, 1:3] - x[:1, :2],
    "scalar product": lambda x: 2 * x / 3 - x,
    "gate of its own mean": lambda x: x * x.mean((-1, -2), True) + x,
    "sum of three": lambda x: F.relu(x + x.tanh() + x),
    "mean of a sum": lambda x: (x + torch.ones_like(x)).mean((2, 3)),
    "activation function twice": lambda x: F.relu(F.hardswish(x) - 1),
    "out": lambda x: torch.add(x.detach(), 1, out=torch.empty(x.shape, dtype=x.dtype)) + x,
    "keyword": lambda x: torch.add(input=x, other=x) + x.mean(axis=(2, 3), keepdims=True),
}


@pytest.mark.parametrize("reader", READERS)
def test_other_code_reads_the_computed_tensor_with_its_gradient(reader, made, policy):
    found = []
    for name in ("native", "eager"):
        policy(name)
        leaf, x = made()
        assert isinstance(x, DeferredTensor) == (name == "native")
        output = READERS[reader](x)
        output.sum().backward()
        found.append((output, leaf.grad))
    torch.testing.assert_close(*found)


def test_value_and_metadata_are_those_of_the_computed_tensor(made, policy):
    _, x = made()
    policy("eager")
    _, expected = made()
    assert x.shape == expected.shape and x.dtype == expected.dtype and x.requires_grad and len(x) == 4
    assert isinstance(x, Tensor) and x.stride() == x.contiguous(memory_format=torch.channels_last).stride()
    torch.testing.assert_close(x, expected)
    assert type(x + 0) is Tensor and repr(x).startswith("tensor(")
    torch.testing.assert_close(torch.from_numpy(x.detach().numpy()), expected.detach())
    torch.testing.assert_close(pickle.loads(pickle.dumps(x.detach())), expected.detach())


def test_value_that_is_read_without_gradients_first_has_its_gradient_later(made):
    leaf, x = made()
    with torch.no_grad():
        x.max()
    x.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_output_of_a_custom_gradient_keeps_its_gradient():
    layers = fused(chain(3, 8), torch.randn(2, 3, 6, 6)).double()
    leaf = torch.randn(4, 3, 6, 6).double().requires_grad_()
    output = Half.apply(leaf, layers)
    assert isinstance(output, DeferredTensor)
    F.relu(output).sum().backward()
    torch.testing.assert_close(leaf.grad, 0.5 * (output > 0).sum() * torch.ones_like(leaf))


def test_hooks_of_modules_see_and_replace_outputs(made):
    network = fused(Network().double(), torch.randn(2, 3, 8, 8).double())
    seen = []
    network.expand.register_forward_hook(lambda _, __, output: seen.append(output.mean()) or 2 * output)
    network.depthwise.register_full_backward_hook(lambda _, __, gradients: seen.append(gradients[0].sum()))
    x = torch.randn(4, 3, 8, 8).double()
    torch.testing.assert_close(results(network, x, "native"), results(network, x, "eager"))
    assert len(seen) == 4
    torch.testing.assert_close(seen[:2], seen[2:])


def test_input_changed_in_place_before_the_value_is_computed_is_an_error():
    layers = fused(chain(3, 8), torch.randn(2, 3, 6, 6))
    shortcut = torch.randn(2, 8, 6, 6)
    total = layers(torch.randn(2, 3, 6, 6)) + shortcut
    shortcut.zero_()
    with pytest.raises(RuntimeError, match="changed in place before an activation that depends on it was computed"):
        total.sum()


def test_inference_mode_and_evaluation_equal_plain_pytorch(policy):
    network = fused(Network(), torch.randn(2, 3, 8, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        outputs = network(x)
    policy("eager")
    torch.testing.assert_close(outputs, network(x).detach())


def test_autocast_defers_in_bfloat16_and_computes_float16_in_plain_pytorch(policy):
    layers = fused(chain(3, 8), torch.randn(2, 3, 6, 6))
    x = torch.randn(2, 3, 6, 6)
    for dtype, deferred in ((torch.bfloat16, True), (torch.float16, False)):
        with torch.autocast("cpu", dtype):
            policy("native")
            got = layers(x)
            assert isinstance(got, DeferredTensor) == deferred and got.dtype == dtype
            policy("eager")
            want = layers(x)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        got.float().sum().backward()


def test_compiled_network_computes_the_same():
    network = fused(chain(3, 8), torch.randn(2, 3, 6, 6))
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))
