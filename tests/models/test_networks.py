"""Each subnet equals the network of timm or torchvision with the prefix of the weights."""

import pytest
import timm
import torch
import torchvision
from timm.models.mobilenetv3 import _gen_mobilenet_v3

from dspnet_fast.errors import InputError
from dspnet_fast.models import build, family, subnet
from dspnet_fast.nn import activate
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

MOBILENET = "mobilenet_v3_large"


def slice_into(model, plain):
    """Load the prefix of every tensor into the plain network; returns the modules that have no source."""
    target = plain.state_dict()
    source = model.state_dict()
    sliced = {
        name: source[name][tuple(slice(size) for size in tensor.shape)]
        for name, tensor in target.items()
        if name in source
    }
    return {name.split(".")[0] for name in plain.load_state_dict(sliced, strict=False).missing_keys}


def randomize(model):
    """Give batch normalisation affine parameters other than 1 and 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5) if name.endswith("weight") else parameter.data.normal_(0, 0.1)
    return model.double().train()


def compare(model, dn, plain, features, x):
    """Compare outputs and weight gradients of the active prefix with the plain network."""
    with activate(model, dn):
        actual = model(x)
        actual.square().sum().backward()
    expected = features(plain.double().train(), x)
    expected.square().sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            gradient = gradients[name].grad[tuple(slice(size) for size in parameter.shape)]
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("width", [0.35, 0.5, 0.625, 0.6875, 0.75, 1.0])
def test_mobilenet_v3_equals_timm(width):
    model = randomize(build(MOBILENET, subnet(MOBILENET, "w1.00")))
    plain = _gen_mobilenet_v3("mobilenetv3_large_100", width, num_classes=0)
    assert slice_into(model, plain) == {"conv_head"}

    def features(network, x):
        return network.global_pool(network.forward_features(x)).flatten(1)

    compare(model, f"w{width}", plain, features, torch.randn(3, 3, 40, 40).double())


@pytest.mark.parametrize(("dn", "plain"), [("c64-d2222", "resnet18"), ("c64-d3463", "resnet34")])
@pytest.mark.parametrize("library", [torchvision.models, timm.models.resnet])
def test_resnet_equals_torchvision_and_timm(dn, plain, library):
    made = family("resnet", ["c64-d2222", "c64-d3463", "c72-d3463"])
    model = randomize(build("resnet", made.full))
    network = getattr(library, plain)()
    assert slice_into(model, network) == {"fc"}
    network.fc = torch.nn.Identity()

    compare(model, made.find(dn), network, lambda n, x: n(x), torch.randn(3, 3, 40, 40).double())


def test_resnet_depth_uses_the_first_blocks_of_each_stage():
    made = family("resnet", ["c8-d1111", "c8-d2132", "c16-d2132"])
    model = build("resnet", made.full, "small")
    for dn in made:
        for parameter in model.parameters():
            parameter.grad = None
        with activate(model, dn):
            model(torch.randn(2, 3, 16, 16)).sum().backward()
        for index, depth in enumerate(dn.depths, 1):
            for position, block in enumerate(getattr(model, f"layer{index}")):
                assert (block.conv1.weight.grad is not None) == (position < depth)


@pytest.mark.parametrize(("network", "dn"), [(MOBILENET, "w0.50"), ("resnet", "c8-d1111")])
def test_small_stem_keeps_the_resolution(network, dn):
    sizes = []
    for stem in ("standard", "small"):
        model = build(network, subnet(network, dn), stem)
        last = model.blocks if network == MOBILENET else model.layer4
        last.register_forward_hook(lambda _, __, y: sizes.append(y.shape[-1]))
        model(torch.randn(2, 3, 64, 64))
    assert sizes == ([2, 4] if network == MOBILENET else [2, 8])


def test_number_of_features_follows_the_active_subnet():
    model = build(MOBILENET, subnet(MOBILENET, "w1.00"))
    assert model.num_features == 960
    with activate(model, "w0.50"):
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 480)


def test_unknown_network_or_stem_is_rejected():
    with pytest.raises(InputError, match="unknown network 'vgg': use one of mobilenet_v3_large, resnet"):
        subnet("vgg", "w1.00")
    with pytest.raises(InputError, match="unknown stem 'tiny': use one of standard, small"):
        build("resnet", subnet("resnet", "c8-d1111"), "tiny")


@pytest.mark.parametrize(("network", "dns"), [(MOBILENET, ("w0.50", "w1.00")), ("resnet", ("c8-d1121", "c16-d2222"))])
def test_feature_maps_have_resolutions_4_to_32_and_equal_those_of_the_slim_network(network, dns):
    model = randomize(build(network, subnet(network, dns[1])))
    x = torch.randn(2, 3, 64, 96).double()
    post_statistics(model, dns, [x])
    model.train()
    for dn in dns:
        plain = slim(model, dn).train()
        with activate(model, dn):
            maps, features = model.feature_maps(x), model(x)
        assert [tuple(of.shape[1:]) for of in maps] == [
            (channels, 64 // r, 96 // r) for channels, r in zip(plain.map_channels, (4, 8, 16, 32))
        ]
        torch.testing.assert_close(maps[-1].mean((2, 3)), features)
        torch.testing.assert_close(plain.feature_maps(x), maps, rtol=1e-8, atol=1e-8)
