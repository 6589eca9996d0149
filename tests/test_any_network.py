"""slimmable() traces which channels of a network belong together, whatever its layers are."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dspnet_fast.nn import SlimConv2d, activate, slimmable
from dspnet_fast.nn.prefix import shared_prefixes
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics


class Concatenation(nn.Module):
    """Two branches whose outputs are concatenated."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 32, 1)
        self.after, self.head = nn.Conv2d(48, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.after(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with a class token, a position embedding and layer scale."""

    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.num_heads = heads
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 17, dim))
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.randn(dim))
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, self.num_heads, self.head_size(x))
        y = self.attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        return self.head((x + self.gamma * self.proj(y))[:, 0])

    def head_size(self, x):
        return -1

    def attend(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


def images(size=16, count=2):
    return torch.randn(count, 3, size, size)


def test_network_is_traced_within_shared_prefixes():
    with shared_prefixes(collects=True):
        model = slimmable(Concatenation(), images(8))
    with activate(model, 0.5):
        assert model(images(8)).shape == (2, 5)


def test_concatenated_inputs_take_the_prefix_of_each_part():
    plain = Concatenation().double()
    model = slimmable(copy.deepcopy(plain), images(8).double())
    x = images(8).double()
    with activate(model, 0.5):
        y = model(x)
    left, right = (layer(x)[:, :kept] for layer, kept in ((plain.left, 8), (plain.right, 16)))
    columns = [*range(8), *range(16, 32)]
    after = torch.conv2d(torch.cat([left, right], 1), plain.after.weight[:8, columns], plain.after.bias[:8])
    expected = after.mean((2, 3)) @ plain.head.weight[:, :8].T + plain.head.bias
    torch.testing.assert_close(y, expected)


def test_gradients_are_zero_outside_the_active_channels():
    model = slimmable(Concatenation(), images(8))
    with activate(model, {"right": 8}):
        model(images(8)).sum().backward()
    gradient = model.after.weight.grad
    assert gradient.shape == (16, 48, 1, 1)
    assert gradient[:, :24].count_nonzero() and not gradient[:, 24:].count_nonzero()


def test_attention_heads_are_kept_or_dropped_as_a_whole():
    plain = Attention().double()
    model = slimmable(copy.deepcopy(plain), images().double())
    x = images().double()
    with activate(model, {"qkv": 48}):
        assert model.num_heads == 2
        y = model(x)
    assert model.num_heads == 4
    keep = plain.proj.weight.detach().clone()
    keep[:, 16:] = 0  # the outputs of the last two heads
    plain.proj.weight = nn.Parameter(keep)
    torch.testing.assert_close(y, plain(x))
    with pytest.raises(ValueError, match="qkv has 96 channels in units of 24: it cannot have 50"):
        activate(model, {"qkv": 50})


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ConvTranspose2d(16, 8, 2, 2), nn.PReLU(8), nn.Conv2d(8, 4, 1)],
        [nn.Conv2d(16, 32, 3, groups=4), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 4, 1)],
        [nn.InstanceNorm2d(16, affine=True), nn.Conv2d(16, 64, 1), nn.PixelShuffle(2), nn.Conv2d(16, 4, 1)],
        [BatchNormAct2d(16), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1)],
        [nn.Flatten(2), nn.Conv1d(16, 24, 3), nn.BatchNorm1d(24), nn.Flatten(), nn.Linear(24 * 62, 4)],
        [nn.SyncBatchNorm(16), nn.Flatten(), nn.LayerNorm(16 * 64), nn.Linear(16 * 64, 4)],
    ],
)
def test_slim_network_equals_the_subnet_for_layers_of_all_kinds(layers):
    model = copy.deepcopy(nn.Sequential(nn.Conv2d(3, 16, 1), *layers)).double()
    names = list(model.state_dict())
    x = images(8, 6).double()
    kinds = [type(module) for module in model]
    slimmable(model, x)
    assert list(model.state_dict()) == names
    post_statistics(model, [0.5], [x])
    with activate(model, 0.5):
        wanted = model(x)
        wanted.sum().backward()
    plain = slim(model, 0.5)
    torch.testing.assert_close(plain(x), wanted)
    assert [type(module) for module in plain] == kinds
    full, kept = (sum(p.numel() for p in network.parameters()) for network in (model, plain))
    assert kept < 0.9 * full and wanted.shape[1] == 4


def test_batch_norm_of_a_subnet_applies_its_activation_and_keeps_the_running_statistics():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), BatchNormAct2d(16), nn.Conv2d(16, 4, 1))
    slimmable(model, images(8))
    before = copy.deepcopy(model[1].state_dict())
    with activate(model.train(), 0.5):
        y = model[1](model[0](images(8)))
    assert y.shape[1] == 8 and y.min() == 0
    torch.testing.assert_close(model[1].state_dict(), before)


def test_outputs_are_kept_unless_keep_says_otherwise():
    def layers():
        return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))

    for keep, first, last in ((("outputs",), 8, 16), ((), 8, 8), (("0",), 16, 8)):
        model = slimmable(layers(), images(8), keep=keep)
        with activate(model, 0.5):
            assert (model[0](images(8)).shape[1], model(images(8)).shape[1]) == (first, last), keep
    with pytest.warns(UserWarning, match="every channel of the network is kept"):
        slimmable(nn.Conv2d(3, 16, 1), images(8))


class Stubborn(nn.Module):
    """A block that needs its number of channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.conv(x).view(len(x), 16, 64).flatten(1)


def test_refusal_names_the_module_and_its_class_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), Stubborn(), nn.Linear(16 * 64, 4)).train()
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(TypeError, match=r"2 \(.*Stubborn\) cannot be slimmed: at width .*keep=\('outputs', '2'\)"):
        slimmable(model, images(8))
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    with pytest.warns(UserWarning, match="every channel"):
        slimmable(model, images(8), keep=("outputs", "2"))


def test_network_that_does_not_run_on_images_needs_an_example():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(), nn.Linear(16 * 49, 4))
    with pytest.raises(TypeError, match="give an example of its input"):
        slimmable(model)
    slimmable(model, images(7))


def test_layers_replaced_afterwards_are_an_error():
    model = slimmable(nn.Sequential(nn.Conv2d(3, 16, 1), nn.PReLU(16), nn.Conv2d(16, 4, 1)), images(8))
    model[1] = nn.ReLU()
    with pytest.raises(ValueError, match="1 was replaced after slimmable"):
        activate(model, 0.5)


def test_converted_networks_can_be_copied_and_pickled():
    model = slimmable(Attention(), images())
    x = images()
    with activate(model, 0.5):
        wanted = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with activate(twin, 0.5):
            torch.testing.assert_close(twin(x), wanted)


class Partial(nn.Module):
    """A layer that convolves a part of its input and passes the rest on."""

    def __init__(self, channels):
        super().__init__()
        self.part, self.rest = channels // 4, channels - channels // 4
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1)

    def forward(self, x):
        y, rest = x.split([self.part, self.rest], 1)
        return torch.cat([self.conv(y), rest], 1)


def test_parts_of_a_split_shrink_although_no_layer_reads_one_of_them():
    layers = nn.Conv2d(3, 64, 1), Partial(64), nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = slimmable(nn.Sequential(nn.Sequential(*layers), nn.Linear(64, 5)), images(8))
    with activate(model, 0.5):
        assert (model[0][1].part, model[0][1].rest) == (8, 24) and model(images(8)).shape == (2, 5)


class Bias(nn.Module):
    """An attention bias by head, which a method and not the forward method computes, and evaluation keeps."""

    def __init__(self, heads):
        super().__init__()
        self.shape = 17, 17, heads
        self.table, self.bias_cache = nn.Parameter(torch.randn(17 * 17, heads)), {}

    def by_head(self):
        if self.training or "bias" not in self.bias_cache:
            self.bias_cache["bias"] = self.table.view(self.shape).permute(2, 0, 1)
        return self.bias_cache["bias"]


class BiasedAttention(Attention):
    """Attention with a bias of the weights of every head."""

    def __init__(self):
        super().__init__()
        self.bias = Bias(4)

    def attend(self, q, k, v):
        return (q @ k.mT + self.bias.by_head()).softmax(-1) @ v


def test_tensors_that_evaluation_keeps_do_not_reach_other_subnets():
    plain = BiasedAttention().eval()
    x = images()
    expected = plain(x)
    model = slimmable(plain, x)
    for width, heads in ((0.5, 2), (0.75, 3), (0.5, 2)):
        with activate(model, width):
            assert model(x).shape == (2, 5) and model.bias.bias_cache["bias"].shape == (heads, 17, 17)
            torch.testing.assert_close(slim(model, width, x)(x), model(x))
    torch.testing.assert_close(model(x), expected)


class CrossCovariance(Attention):
    """Attention between the channels of a head, with a parameter per head that comes before the layers."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(4, 1, 1))

    def attend(self, q, k, v):
        return v @ (self.temperature * (q.mT @ k)).softmax(-1)


class Rotary(Attention):
    """Attention with a table and a normalisation that all heads share."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(17, 8), persistent=False)
        self.head_norm = nn.LayerNorm(8)

    def attend(self, q, k, v):
        return super().attend(self.head_norm(q) * self.table + q.roll(1, -1) * self.table.cos(), k * self.table, v)


class SingleHead(Attention):
    """Attention with one head, whose size a method needs."""

    def __init__(self):
        super().__init__(heads=1)
        self.head_dim = 32

    def head_size(self, x):
        return self.head_dim


@pytest.mark.parametrize(
    "kind, attribute, values",
    [
        (CrossCovariance, "num_heads", (1, 2, 3)),
        (Rotary, "num_heads", (1, 2, 3)),
        (SingleHead, "head_dim", (8, 16, 24)),
    ],
)
def test_attention_of_many_kinds_shrinks(kind, attribute, values):
    plain = kind().double().eval()
    x = images().double()
    expected, full = plain(x), getattr(plain, attribute)
    model = slimmable(plain, x)
    for width, value in zip((0.25, 0.5, 0.75), values, strict=True):
        with activate(model, width):
            assert getattr(model, attribute) == value
            torch.testing.assert_close(slim(model, width, x)(x), model(x))
    assert getattr(model, attribute) == full
    torch.testing.assert_close(model(x), expected)


class Deep(nn.Module):
    """A convolution and residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3), nn.ModuleList(Residual(16) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class Residual(nn.Module):
    """timm's normalisation with activation in a block."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), BatchNormAct2d(channels)

    def forward(self, x):
        return x + self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("network", "subnets"), [(Concatenation, [0.5]), (Attention, [0.5]), (Deep, [0.5, {"stem": 8, "blocks": 1}])]
)
def test_compiled_network_is_one_graph_and_equals_the_eager_one(network, subnets):
    model = slimmable(network(), images(), keep=())
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for subnet in [None, *subnets]:
        found = []
        for run in (model, compiled):
            with activate(model, subnet):
                y = run(x)
                y.square().sum().backward()
            found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_slim_removes_the_blocks_that_are_left_out():
    model = slimmable(Deep(), images(), keep=())
    subnet = {"blocks": 2, "stem": 8}
    post_statistics(model, [subnet], [images()])
    small = slim(model, subnet, images())
    assert len(small.blocks) == 2 and type(small.blocks[1]) is Residual
    with pytest.raises(ValueError, match="blocks has 1 to 3 blocks: it cannot have 0"):
        activate(model, {"blocks": 0})


class Alternating(Deep):
    """A network that needs its last block."""

    def forward(self, x):
        return self.blocks[2](self.blocks[1](self.blocks[0](self.stem(x)))).mean((2, 3))


def test_blocks_that_the_forward_method_names_by_index_stay():
    assert [stage.name for stage in slimmable(Deep(), images(), keep=()).channel_groups.stages] == ["blocks"]
    assert slimmable(Alternating(), images(), keep=()).channel_groups.stages == ()


def test_main_grad_receives_the_gradient_of_the_active_channels():
    model = slimmable(Concatenation(), images(8))
    x = images(8)
    with activate(model, 0.5):
        model(x).sum().backward()
        wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad = torch.zeros_like(parameter)
        model(x).sum().backward()
    torch.testing.assert_close({name: p.main_grad for name, p in model.named_parameters()}, wanted)


@pytest.mark.parametrize("name", ["lcnet_050", "convnext_atto"])
def test_networks_of_timm_state_their_numbers_of_features(name):
    model = slimmable(timm.create_model(name, num_classes=7), images(32))
    post_statistics(model, [0.5], [images(32, 4)])
    small = slim(model, 0.5)
    x = images(32)
    assert small(x).shape == (2, 7)
    features = small.forward_features(x)
    assert small.num_features == features.shape[1]
    assert small.head_hidden_size == small.forward_head(features, pre_logits=True).shape[1]
    outputs = {}
    for entry in small.feature_info:
        hook = small.get_submodule(entry["module"]).register_forward_hook
        hook(lambda _, __, y, name=entry["module"]: outputs.update({name: y.shape[1]}))
    small(x)
    assert [entry["num_chs"] for entry in small.feature_info] == [outputs[e["module"]] for e in small.feature_info]
    small.reset_classifier(3)
    assert small(x).shape == (2, 3)


def test_plain_layers_keep_the_fast_classes():
    model = slimmable(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)), images(8))
    assert [type(layer) for layer in model] == [SlimConv2d, SlimConv2d]
