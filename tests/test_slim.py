"""slim() returns a torch.nn network equal to the subnet; exported networks load here, in timm and in torchvision."""

import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.models.mobilenetv3 import _gen_mobilenet_v3
from timm.models.resnet import BasicBlock
from torch import nn

from dspnet_fast import exported
from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.errors import InputError
from dspnet_fast.models import Classifier, build, family
from dspnet_fast.nn import (
    SlimBatchNorm2d,
    SlimConv2d,
    SlimLinear,
    SlimSequential,
    activate,
    configure_batch_norm,
    slimmable,
)
from dspnet_fast.nn.batch_norm import SlimBatchNorm
from dspnet_fast.nn.sized import Sized
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

MOBILENET = ("mobilenet_v3_large", ["w0.50", "w0.66", "w1.00"])
RESNET = ("resnet", ["c16-d1111", "c64-d2222", "c64-d2232"])


def measured(network, names, stem="standard"):
    """A family with measured statistics and random affine parameters, and images."""
    torch.manual_seed(0)
    made = family(network, names)
    model = build(network, made.full, stem)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    images = torch.randn(6, 3, 40, 40)
    post_statistics(model, made, images.split(3))
    return made, model, images


def assert_same_features(features, model, images, network=None):
    """Compare features, within 1e-5 in float32 and 1e-9 in float64: only rounding may differ."""
    torch.testing.assert_close(features(images), model(images), rtol=1e-5, atol=1e-5)
    (network or features).double(), model.double()
    torch.testing.assert_close(features(images.double()), model(images.double()), rtol=1e-9, atol=1e-9)
    (network or features).float(), model.float()


@pytest.mark.parametrize(("network", "names"), [MOBILENET, RESNET])
@pytest.mark.parametrize("stem", ["standard", "small"])
@torch.no_grad()
def test_slim_network_equals_the_subnet_in_torch_nn_layers(network, names, stem):
    made, model, images = measured(network, names, stem)
    for dn in made:
        plain = slim(model, dn)
        assert not any(isinstance(module, Sized | SlimBatchNorm) for module in plain.modules())
        with activate(model, dn):
            assert_same_features(plain, model, images)
        assert plain.full == dn
    full = slim(model, made.full)
    assert list(full.state_dict()) == list(model.state_dict())
    full.conv1.weight.zero_() if network == "resnet" else full.conv_stem.weight.zero_()
    assert model.get_parameter("conv1.weight" if network == "resnet" else "conv_stem.weight").any(), "not a copy"


@torch.no_grad()
def test_slim_cuts_networks_without_layer_sizes():
    class CustomNetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.body = SlimSequential(
                SlimConv2d(3, 16, 3, groups=1),
                SlimConv2d(16, 32, 3, groups=4, bias=False, padding=1, padding_mode="circular"),
                SlimBatchNorm2d(32),
                nn.Dropout(),
            )
            self.head = SlimLinear(32, 5)

        def forward(self, x):
            return self.head((self.scale * self.body(x)).mean((2, 3)))

    model, x = CustomNetwork(), torch.randn(4, 3, 9, 9)
    post_statistics(model, [0.5], [x])
    plain = slim(model, 0.5, example=x)
    assert (plain.body[0].out_channels, plain.body[1].groups, plain.head.in_features) == (8, 2, 16)
    with activate(model, 0.5):
        torch.testing.assert_close(plain(x), model(x))
    configure_batch_norm(model, bn_groups=3)
    shallow = slim(model, {"body": 1}, example=x)
    assert len(shallow.body) == 1


def test_slim_rejects_a_subnet_without_statistics():
    made = family(*MOBILENET)
    with pytest.raises(RuntimeError, match="post_statistics"):
        slim(build(MOBILENET[0], made.full), "w0.50")


class Twice(nn.Module):
    """Uses one activation function and one convolution under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.second = self.first
        self.act1 = self.act2 = nn.ReLU()
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.head(self.act2(self.second(self.act1(self.first(self.stem(x))))))


@torch.no_grad()
def test_slim_keeps_modules_that_are_used_twice():
    model, x = slimmable(Twice()), torch.randn(2, 3, 8, 8)
    for width in (0.5, None):
        small = slim(model, width)
        assert small.first is small.second and small.act1 is small.act2
        with activate(model, width):
            torch.testing.assert_close(small(x), model(x))
    act = nn.ReLU()
    repeated = slimmable(nn.Sequential(nn.Conv2d(3, 16, 3), act, nn.Conv2d(16, 16, 3), act, nn.Conv2d(16, 2, 1)))
    small = slim(repeated, 0.5)
    with activate(repeated, 0.5):
        torch.testing.assert_close(small(x), repeated(x))


class Auxiliary(nn.Module):
    """A head that runs in training only, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
        self.aux = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        self.spare = nn.Conv2d(16, 16, 3)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_slim_network_has_the_layers_that_do_not_run_in_evaluation():
    model, x = slimmable(Auxiliary()), torch.randn(2, 3, 8, 8)
    with activate(model.train(), 0.5):
        assert [y.shape[1] for y in model(x)] == [4, 4]
    post_statistics(model, [0.5], [x])
    small = slim(model, 0.5)
    assert [y.shape[1] for y in small.train()(x)] == [4, 4]
    assert small.aux[0].weight.shape[:2] == (8, 8) and small.spare.weight.shape[:2] == (16, 16)


def test_slim_rejects_a_network_that_computes_something_else():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = SlimConv2d(3, 16, 1), []

        def forward(self, x):
            self.calls.append(1)
            return self.conv(x) * len(self.calls)

    with pytest.raises(RuntimeError, match="computes other outputs than the subnet"):
        slim(Counting(), 0.5)


def test_slim_rejects_a_layer_with_two_numbers_of_input_channels():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = SlimConv2d(6, 16, 1)

        def forward(self, x):
            return self.conv(x) + self.conv(x[:, :2])

    with pytest.raises(ValueError, match="conv is used with 3 and with 2 channels"):
        slim(Uneven(), 0.5)


def timm_mobilenet(width, stem):
    network = _gen_mobilenet_v3("mobilenetv3_large_100", width, num_classes=0).eval()
    if stem == "small":
        network.conv_stem.stride = (1, 1)
    return network, {"conv_head"}, lambda x: network.global_pool(network.forward_features(x)).flatten(1)


def torchvision_resnet18(_, stem):
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return small(network.eval(), stem), set(), network


def timm_resnet18(_, stem):
    network = timm.models.resnet.ResNet(BasicBlock, [2, 2, 2, 2], num_classes=0).eval()
    return small(network, stem), set(), network


def small(network, stem):
    if stem == "small":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize(
    ("network", "names", "dn", "foreign"),
    [(*MOBILENET, f"w{width:.2f}", timm_mobilenet) for width in (0.5, 0.66, 1.0)]
    + [(*RESNET, "c64-d2222", torchvision_resnet18), (*RESNET, "c64-d2222", timm_resnet18)],
)
@torch.no_grad()
def test_exported_weights_load_into_timm_and_torchvision(network, names, dn, foreign, stem, tmp_path):
    made, model, images = measured(network, names, stem)
    subnet = made.find(dn)
    exported.save(tmp_path, slim(model, subnet), subnet, {})
    other, missing, features = foreign(float(dn[1:]) if dn[0] == "w" else None, stem)
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert result.unexpected_keys == [] and {name.split(".")[0] for name in result.missing_keys} == missing
    with activate(model, subnet):
        assert_same_features(features, model, images, other)


@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize(("network", "names", "dn"), [(*MOBILENET, "w0.66"), (*RESNET, "c64-d2222")])
@torch.no_grad()
def test_classifiers_load_into_timm_and_torchvision_as_the_manifest_says(network, names, dn, stem, tmp_path):
    made, encoder, images = measured(network, names, stem)
    model, subnet = Classifier(encoder, 7), made.find(dn)
    exported.save(tmp_path, slim(model, subnet), subnet, {}, classes=list("abcdefg"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["num_classes"], manifest["class_names"]) == (7, list("abcdefg"))
    constructors = manifest["loads_into"]
    changes = constructors.pop("then", "")
    assert set(constructors) == {"timm"} | ({"torchvision"} if network == "resnet" else set())
    with activate(model, subnet):
        torch.testing.assert_close(exported.load(tmp_path)(images), model(images), rtol=1e-5, atol=1e-5)
        for constructor in constructors.values():
            other = eval(constructor, {"timm": timm, "torchvision": torchvision})
            for change in filter(None, changes.split("; ")):
                exec(f"other.{change}", {"torch": torch, "other": other})
            other.load_state_dict(load_file(tmp_path / "model.safetensors"))
            torch.testing.assert_close(other.eval()(images), model(images), rtol=1e-4, atol=1e-4)


def test_number_of_class_names_must_be_the_number_of_classes(tmp_path):
    subnet = family("resnet", ["c8-d1111"]).full
    with pytest.raises(ValueError, match="has 2 names, but the network has 3 classes"):
        exported.save(tmp_path, exported.plain("resnet", subnet, "small", 3), subnet, {}, classes=["a", "b"])
    with pytest.raises(ValueError, match="has 1 names, but the network has 0 classes"):
        exported.save(tmp_path, exported.plain("resnet", subnet, "small"), subnet, {}, classes=["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("network", "names"), [MOBILENET, RESNET])
@torch.no_grad()
def test_exported_networks_equal_their_subnets(network, names, tmp_path):
    made, model, images = measured(network, names)
    for dn in made:
        exported.save(tmp_path / dn.name, slim(model, dn), dn, {"note": 1})
        loaded = exported.load(tmp_path / dn.name)
        with activate(model, dn):
            assert_same_features(loaded, model, images)
    manifest = json.loads((tmp_path / names[0] / "manifest.json").read_text())
    assert manifest["note"] == 1 and manifest["channels"] == list(made[0].channels)
    convolutions = [layer for layer in manifest["layers"] if layer["type"] == "Conv2d"]
    assert convolutions[0]["in_channels"] == 3 and convolutions[0]["out_channels"] == made[0].channels[0]
    for layer in manifest["layers"]:  # the arguments must be the constructor's
        getattr(nn, layer["type"])(**{key: value for key, value in layer.items() if key not in ("name", "type")})
    if network == "resnet":
        assert "torchvision.models.resnet18" in str(json.loads((tmp_path / "c64-d2222/manifest.json").read_text()))


def test_missing_or_damaged_exports_are_rejected(tmp_path):
    made, model, _ = measured("resnet", ["c8-d1111", "c16-d1111"])
    with pytest.raises(InputError, match="contains no exported network"):
        exported.load(tmp_path / "nothing")
    exported.save(tmp_path / "a", slim(model, made[0]), made[0], {})
    exported.save(tmp_path / "b", slim(model, made[1]), made[1], {})
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="no valid exported network"):
        exported.load(tmp_path / "a")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="no valid exported network"):
        exported.load(tmp_path / "b")


def test_parameters_and_macs_of_known_networks():
    full = slim(build("mobilenet_v3_large", family("mobilenet_v3_large", ["w1.00"]).full), None)
    assert parameter_count(full) == 2_971_952  # timm's 5,483,032 less conv_head and classifier
    assert abs(mac_count(full, 224) / 214.1e6 - 1) < 0.001
    resnet18 = slim(build("resnet", family("resnet", ["c64-d2222"]).full), None)
    assert parameter_count(resnet18) == sum(p.numel() for p in torchvision.models.resnet18().parameters()) - 513_000
    assert abs(mac_count(resnet18, 224) / 1.8136e9 - 1) < 0.001
