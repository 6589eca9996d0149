"""Networks of timm, torchvision and users as families: names, sizes, export."""

import copy
import json
import pickle
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dspnet_fast import exported
from dspnet_fast.errors import InputError
from dspnet_fast.models import Classifier, build, check_network, family, subnet
from dspnet_fast.models.published import Source, load_published
from dspnet_fast.models.traced import make
from dspnet_fast.nn import activate
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

NAME = "encoders:small"


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Residual(nn.Module):
    """A block with a shortcut, and a parameter of its own."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        self.gamma = nn.Parameter(torch.rand(out_channels, 1, 1))
        self.adds = channels == out_channels

    def forward(self, x):
        y = self.gamma * self.norm(self.conv(x)).relu()
        return x + y if self.adds else y


class ByName(nn.Module):
    """A stage that is no container of torch.nn."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Residual(16, 32), Residual(32, 32)

    def forward(self, x):
        return self.two(self.one(x))


def deep() -> nn.Module:
    blocks = nn.Sequential(*(Residual(16, 16) for _ in range(3)))
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), blocks, ByName(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def without_residuals() -> nn.Module:
    plain = [nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()) for _ in range(2)]
    strided = [Residual(16, 16), Residual(16, 32)]
    return nn.Sequential(nn.Conv2d(3, 16, 1), *plain, *strided, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Auxiliary(nn.Sequential):
    """An encoder with another output in training, as GoogLeNet's auxiliary classifiers."""

    def forward(self, x):
        features = super().forward(x)
        return (features, features) if self.training else features


class CachedScale(nn.Module):
    """A layer that keeps a tensor of its channels in evaluation mode, as attention biases of EfficientFormer."""

    def __init__(self):
        super().__init__()
        self.scale, self.scale_cache = nn.Parameter(torch.rand(32)), {}

    def forward(self, x):
        if self.training or "scale" not in self.scale_cache:
            self.scale_cache["scale"] = self.scale[:, None, None].exp()
        return x * self.scale_cache["scale"]


def cached() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2), CachedScale(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    """A module of the user."""
    module = type(sys)("encoders")
    module.small, module.maps, module.nothing = small, lambda: nn.Conv2d(3, 8, 1), lambda: 1
    module.deep, module.without_residuals, module.cached = deep, without_residuals, cached
    module.auxiliary = lambda: Auxiliary(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module.transformer = lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    monkeypatch.setitem(sys.modules, "encoders", module)


def test_subnets_are_prefixes_of_all_groups_and_know_their_features():
    made = family(NAME, ["w0.25", "w0.50", "w1.00"])
    assert [dn.channels for dn in made] == [(8, 16, 16), (16, 32, 32), (32, 64, 64)]
    model = build(NAME, made.full)
    x = torch.randn(2, 3, 16, 16)
    for dn in made:
        with activate(model, dn):
            assert model(x).shape == (2, dn.channels[-1])
    assert model.num_features == 64


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_networks_of_one_image_size_are_cut_without_an_example(device):
    name = "encoders:transformer"
    with torch.device(device):
        half = build(name, subnet(name, "w0.50"))
        for network in (half, Classifier(half, 5), build(name, subnet(name, "w1.00"))):
            small = slim(network, None if network is not half else "w0.50")
            assert small(torch.randn(2, 3, 32, 32)).shape == network(torch.randn(2, 3, 32, 32)).shape


def test_network_built_for_a_width_has_only_its_weights():
    half = build(NAME, subnet(NAME, "w0.50"))
    assert half.body[3].weight.shape == (32, 16, 1, 1) and half.body[3].in_channels == 16
    x = torch.randn(2, 3, 16, 16)
    with activate(half, "w0.25"):
        assert half(x).shape == (2, 16)
    with pytest.raises(ValueError, match="it cannot have"):
        activate(half, "w1.00")


DEEP = "encoders:deep"


def test_subnets_of_fewer_blocks_run_the_first_blocks_of_each_stage():
    made = family(DEEP, ["w0.50-d11", "w0.50", "w1.00-d2.1", "w1.00"])
    assert [dn.depths for dn in made] == [(1, 1), (3, 2), (2, 1), (3, 2)]
    model = build(DEEP, made.full).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    body = copy.deepcopy(deep()).double()
    body.load_state_dict(model.body.state_dict())
    body[1], body[2].two = body[1][:2], nn.Identity()
    with activate(model, "w1.00-d2.1"):
        y = model(x)
    torch.testing.assert_close(y, body(x))
    y.sum().backward()
    assert model.body[1][1].conv.weight.grad.any() and model.body[1][2].conv.weight.grad is None
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    with activate(model, "w0.50-d11"):
        torch.testing.assert_close(pickle.loads(pickle.dumps(model.body))(x), model(x))


def test_network_built_for_few_blocks_has_only_their_weights():
    small = build(DEEP, subnet(DEEP, "w0.50-d21"))
    names = {name.partition(".conv")[0] for name in small.state_dict() if name.endswith("conv.weight")}
    assert names == {"body.1.0", "body.1.1", "body.2.one"}
    with activate(small, "w0.25-d11"):
        assert small(torch.randn(2, 3, 9, 9)).shape == (2, 8)
    with pytest.raises(ValueError, match="1 has 1 to 2 blocks: it cannot have 3"):
        activate(small, "w0.50-d31")


def test_exported_network_of_few_blocks_has_the_original_names(tmp_path):
    made = family(DEEP, ["w0.50-d11", "w1.00"])
    model = build(DEEP, made.full)
    x = torch.randn(4, 3, 9, 9)
    post_statistics(model, made, [x])
    exported.save(tmp_path, slim(model, made[0]), made[0], {})
    assert load_file(tmp_path / "model.safetensors").keys() < deep().state_dict().keys()
    with activate(model, made[0]), torch.no_grad():
        torch.testing.assert_close(exported.load(tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("network", "dn", "message"),
    [
        (DEEP, "w0.50-d1", r"left out in 1 \(1 to 3\), 2 \(1 to 2\): .* for example w0.50-d32"),
        (DEEP, "w0.50-d41", "give the number of blocks of each"),
        (DEEP, "w0.50-d0.1", "give the number of blocks of each"),
        (DEEP, "w0.50-d1..1", "give the number of blocks of each"),
        (NAME, "w0.50-d1", "no blocks that can be left out: it has no blocks of one class that follow each other"),
        ("encoders:without_residuals", "w0.50-d1", r"4 \(Residual\): its output has another shape than its input"),
    ],
)
def test_impossible_numbers_of_blocks_are_rejected(network, dn, message):
    with pytest.raises(InputError, match=message):
        subnet(network, dn)


@pytest.mark.parametrize("classes", [0, 5])
def test_exported_networks_of_all_widths_load_with_the_original_names(classes, tmp_path):
    made = family(NAME, ["w0.50", "w1.00"])
    model = build(NAME, made.full)
    model = Classifier(model, classes) if classes else model
    x = torch.randn(4, 3, 16, 16)
    post_statistics(model, made, [x])
    for dn in made:
        names = [str(index) for index in range(classes)]
        exported.save(tmp_path, slim(model, dn), dn, {}, classes=names)
        tensors = load_file(tmp_path / "model.safetensors")
        own = {name for name in tensors if not name.startswith("head.")}
        assert own == set(small().state_dict())
        with activate(model, dn), torch.no_grad():
            torch.testing.assert_close(exported.load(tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "dn"), [("timm:lcnet_050", "w1.00"), ("timm:convnext_atto", "w1.00-d1221")])
def test_network_of_timm_is_exported_for_timm(name, dn, tmp_path):
    dn = subnet(name, dn)
    model = build(name, dn)
    exported.save(tmp_path, slim(model, dn), dn, {})
    constructor = json.loads((tmp_path / "manifest.json").read_text())["loads_into"]["timm"]
    network = eval(constructor, {"timm": timm}).eval()
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_families_take_images_of_other_channels_than_three(channels, tmp_path):
    name = "timm:lcnet_050"
    made = family(name, ["w0.50", "w1.00"])
    model = build(name, made.full, in_channels=channels)
    x = torch.randn(4, channels, 32, 32)
    post_statistics(model, made, [x])
    for dn in made:
        exported.save(tmp_path, slim(model, dn), dn, {"pixels": {"channels": channels}})
        with activate(model, dn), torch.no_grad():
            torch.testing.assert_close(exported.load(tmp_path)(x), model(x), rtol=1e-3, atol=1e-5)
    network = eval(json.loads((tmp_path / "manifest.json").read_text())["loads_into"]["timm"], {"timm": timm})
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match=f"takes images of 3 channels, not {channels}"):
        build(NAME, subnet(NAME, "w0.50"), in_channels=channels)


def test_size_that_timm_cannot_build_has_no_constructor():
    name = "timm:convnext_atto"
    dn = subnet(name, "w0.50")
    assert exported.loads_into(slim(build(name, dn), None), dn) == {}


def test_published_weights_load_into_the_traced_network(tmp_path):
    name = "timm:lcnet_050"
    model, other = build(name, subnet(name, "w1.00")), timm.create_model("lcnet_050", num_classes=3)
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    source = Source.parse(f"{name}={tmp_path / 'weights.safetensors'}")
    load_published(model, source)
    wanted = {key: tensor for key, tensor in other.state_dict().items() if key in model.body.state_dict()}
    torch.testing.assert_close(model.body.state_dict(), type(model.body.state_dict())(wanted))
    with pytest.raises(InputError, match="does not fit --network timm:lcnet_050"):
        load_published(model, Source.parse(f"timm:lcnet_100={tmp_path / 'weights.safetensors'}"))
    half = build(name, subnet(name, "w0.50"))
    with pytest.raises(InputError, match=r"--init-from: conv_stem.weight of lcnet_050 is \[8, 3, 3, 3\]|blocks"):
        load_published(half, source)


def test_torchvision_networks_lose_their_classifier():
    assert subnet("torchvision:resnet18", "w0.50").channels[-1] == 256
    with pytest.raises(InputError, match="no linear classifier to remove"):
        subnet("torchvision:squeezenet1_1", "w0.50")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_networks_have_no_auxiliary_classifiers(name):
    network = make(f"torchvision:{name}").train()
    assert isinstance(network(torch.randn(2, 3, 96, 96)), torch.Tensor)


def test_tensors_that_evaluation_keeps_are_not_those_of_a_narrower_network():
    assert subnet("encoders:cached", "w0.50").channels[-1] == 16
    build("encoders:cached", subnet("encoders:cached", "w0.50")).eval()(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("network", "dn", "message"),
    [
        ("timm:nonsense", "w0.50", "--network timm:nonsense does not exist"),
        ("torchvision:nonsense", "w0.50", "--network torchvision:nonsense does not exist"),
        ("nowhere_at_all:small", "w0.50", "needs a package that is not installed"),
        ("encoders:missing", "w0.50", "does not exist"),
        ("encoders:nothing", "w0.50", "must return a torch.nn.Module, not int"),
        ("encoders:maps", "w0.50", r"must map images to features \[N, F\], but returns \[2, 8, 64, 64\]"),
        ("timm:resnest14d", "w0.50", "cannot be used: cut to w0.50, it does not run"),
        ("encoders:auxiliary", "w0.50", r"in training mode must map images to features \[N, F\], but returns tuple"),
        (NAME, "w1.50", "is no width of the network"),
        (NAME, "c8-d1111", "is no width of the network"),
        (":", "w0.50", "unknown network ':'"),
    ],
)
def test_unusable_networks_and_widths_are_rejected(network, dn, message):
    with pytest.raises(InputError, match=message):
        subnet(network, dn)


def test_transformer_takes_images_of_the_size_it_was_made_for():
    check_network("encoders:transformer", 32)
    assert subnet("encoders:transformer", "w0.50").channels[-1] < subnet("encoders:transformer", "w1.00").channels[-1]
    with pytest.raises(
        InputError, match=r"does not run on images of 48 px: .*\. Use --image-size 32, or name a function"
    ):
        check_network("encoders:transformer", 48)
    check_network(NAME, 48)


def test_small_stem_and_feature_maps_are_rejected():
    with pytest.raises(InputError, match="--stem small is not available"):
        build(NAME, subnet(NAME, "w0.50"), "small")
    with pytest.raises(InputError, match="feature maps are not available"):
        build(NAME, subnet(NAME, "w0.50")).feature_maps(torch.zeros(2, 3, 16, 16))
