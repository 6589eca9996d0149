"""slimmable(), fused() and slim() on networks that earlier versions computed wrongly or refused for a wrong reason."""

import types

import pytest
import timm
import torch
import torchvision
from timm.layers import StdConv2d
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dspnet_fast import ops
from dspnet_fast.nn import SlimConv2d, activate, fused, slimmable
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

IMAGES = torch.randn(4, 3, 32, 32)


def share(model, width=0.5, images=IMAGES):
    """Parameters of the network cut out over those of the model; it computes what the subnet computes."""
    post_statistics(model, [width], [images])
    small = slim(model, width)
    with activate(model, width), torch.no_grad():
        wanted = model(images)
        torch.testing.assert_close(small(images), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())


def test_running_statistics_stay_if_every_channel_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval()
    before = model(IMAGES)
    with pytest.warns(UserWarning, match="every channel"):
        slimmable(model, IMAGES)
    assert torch.equal(model(IMAGES), before) and model[1].num_batches_tracked == 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_networks_can_be_converted_again_and_within_others(name):
    def plain():
        return timm.create_model(name, num_classes=0)

    once = share(slimmable(plain(), IMAGES))
    assert share(slimmable(slimmable(plain(), IMAGES, keep=()), IMAGES)) == once
    assert share(slimmable(fused(plain(), IMAGES), IMAGES)) == once
    nested = nn.Sequential(slimmable(plain(), IMAGES), nn.LazyLinear(5))
    nested(IMAGES)
    assert share(slimmable(nested, IMAGES)) < 0.4


def test_conversion_begins_with_the_full_network():
    model = slimmable(timm.create_model("resnet18", num_classes=0), IMAGES)
    activate(model, 0.5)
    assert slimmable(model, IMAGES)(IMAGES).shape == (4, 512) and share(model) < 0.6


def test_replaced_weights_drop_the_statistics():
    model = slimmable(timm.create_model("resnet18", num_classes=5), IMAGES)
    for replace in (
        lambda: model.load_state_dict(timm.create_model("resnet18", num_classes=5).state_dict(), assign=True),
        lambda: setattr(model.conv1, "weight", nn.Parameter(torch.randn_like(model.conv1.weight))),
    ):
        post_statistics(model, [0.5], [IMAGES])
        with activate(model, 0.5):
            model.eval()(IMAGES)
            replace()
            with pytest.raises(RuntimeError, match="no batch normalisation statistics for w0.50"):
                model(IMAGES)


def test_output_without_tensors_is_refused():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 40, 1))

        def forward(self, x):
            return types.SimpleNamespace(logits=self.layers(x))

    with pytest.raises(TypeError, match="no tensor is found in its output: return tensors"):
        slimmable(Logits(), IMAGES)


@pytest.mark.parametrize("keep", [("outputs",), ("outputs", "0"), ("outputs", "2")])
def test_convolutions_that_reshape_by_their_numbers_of_channels(keep):
    layers = nn.Conv2d(3, 32, 3), nn.ReLU(), StdConv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 16, 1)
    model = slimmable(nn.Sequential(*layers), IMAGES, keep)
    assert (share(model) < 1) == ("2" not in keep)
    with activate(model, 0.5):
        assert len(model[2].weight) == model[2].out_channels == (64 if "2" in keep else 32)


def test_layers_that_share_a_weight_are_both_slimmed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight
            self.head = nn.Linear(64, 5)

        def forward(self, x):
            return self.head(self.second(self.first(self.embed(x)).relu()))

    x = torch.randn(4, 32)
    model = slimmable(Tied(), x)
    assert share(model, images=x) < 0.5
    small = slim(model, 0.5)
    assert small.first.weight is small.second.weight and small.second.bias.shape == (32,)


class Detector(nn.Module):
    """A model that calls a network within it."""

    def __init__(self, backbone, method="forward"):
        super().__init__()
        self.stem, self.backbone, self.method = nn.Conv2d(3, 3, 1), backbone, method

    def forward(self, x):
        return getattr(self.backbone, self.method)(self.stem(x))


@pytest.mark.parametrize("name", ["resnet18", "hrnet_w18_small", "convnext_atto"])
@pytest.mark.parametrize("nested", [False, True])
def test_features_only_networks_state_the_channels_of_subnets(name, nested):
    network = timm.create_model(name, features_only=True)
    model = slimmable(Detector(network) if nested else network, IMAGES, keep=())
    post_statistics(model, [0.5], [IMAGES])
    small = slim(model, 0.5)
    stated = (small.backbone if nested else small).feature_info.channels()
    assert stated == [y.shape[1] for y in small(IMAGES)] != network.feature_info.channels()


@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
def test_networks_within_another_model_state_their_features(method):
    model = slimmable(Detector(timm.create_model("regnetx_002", num_classes=7), method), IMAGES, keep=())
    post_statistics(model, [0.5], [IMAGES])
    small = slim(model, 0.5)
    assert vars(small.backbone).keys() == vars(model.backbone).keys()
    features = small.backbone.forward_features(small.stem(IMAGES))
    assert small.backbone.num_features == features.shape[1] < model.backbone.num_features
    small.backbone.reset_classifier(3)
    assert small.backbone(small.stem(IMAGES)).shape == (4, 3)


def test_mistaken_arguments_are_errors():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1))
    with pytest.raises(ValueError, match="no module 'layr1'"):
        slimmable(model, IMAGES, keep=("outputs", "layr1"))
    with pytest.raises(TypeError, match=r"such as keep=\('outputs', '0'\)"):
        slimmable(model, IMAGES, keep="0")
    for width in (0, 2):
        with pytest.raises(ValueError, match=f"a width must be more than 0 and at most 1, got {width}"):
            slimmable(model, IMAGES, widths=(0.5, width))
    for convert in (slimmable, fused):
        with pytest.raises(TypeError, match=r"Sequential does not run on the example that was given, \[2, 5\]: "):
            convert(model, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"Sequential has no slimmable layers: convert it first"):
        slim(model, 0.5)
    with pytest.raises(TypeError, match="LazyConv2d.*: run the network once"):
        fused(nn.Sequential(nn.LazyConv2d(16, 3), nn.ReLU()))
    labelled = DataLoader(TensorDataset(IMAGES, torch.zeros(4)), batch_size=2)
    with pytest.raises(TypeError, match="a batch is a list: give the model's input, without labels"):
        post_statistics(slimmable(model, IMAGES), [0.5], labelled)
    with pytest.raises(TypeError, match="Sequential does not take the 2 values of a batch .*, without labels"):
        post_statistics(model, [0.5], [(IMAGES, torch.zeros(4))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy_name", ["eager", "auto"])
def test_weights_in_16_bits(dtype, policy_name, policy):
    x = IMAGES.to(dtype)
    for make in (
        lambda: slimmable(timm.create_model("mobilenetv3_small_050").to(dtype), x),
        lambda: fused(timm.create_model("mobilenetv3_small_050").to(dtype).eval(), x),
        lambda: fused(timm.create_model("resnet18").to(dtype).eval(), x),
        lambda: SlimConv2d(3, 3, 3, groups=3, dtype=dtype),
    ):
        network = make().eval()
        ops.registry.set_policy("eager")
        wanted = network(x)
        ops.registry.set_policy(policy_name)
        found = network(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0.1, atol=0.1 * wanted.abs().max().item())


def test_parametrizations_of_ones_own():
    class Clamp(nn.Module):
        def forward(self, weight):
            return weight.clamp(-1, 1)

    model = timm.create_model("resnet18", num_classes=5)
    nn.utils.parametrize.register_parametrization(model.layer2[0].conv1, "weight", Clamp())
    assert share(slimmable(model, IMAGES)) < 0.4


def test_image_size_of_a_transformer_that_equals_its_width():
    made = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 128, num_classes=5)
    assert share(slimmable(made, IMAGES)) < 0.5


def test_converted_network_within_another_model():
    inner = slimmable(nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 4, 1)), torch.randn(2, 16, 8, 8))
    model = nn.Sequential(SlimConv2d(3, 16, 3, padding=1), inner)
    assert slim(model, {"0": 8, "1.0": 16}, IMAGES)(IMAGES).shape == (4, 4, 32, 32)


@pytest.mark.parametrize("example", [None, IMAGES])
@pytest.mark.parametrize("convert", [slimmable, fused])
def test_conversion_in_training_leaves_running_statistics(convert, example):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1))
    convert(model, example)
    assert model.training and model[1].num_batches_tracked == 0 and model[1].running_mean.count_nonzero() == 0
