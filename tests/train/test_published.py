"""Published weights: the full network computes the same features, and prefixes have the most important channels."""

import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from dspnet_fast.errors import InputError
from dspnet_fast.models import build, subnet
from dspnet_fast.models.published import Source, channel_groups, check_name, load_published
from dspnet_fast.nn import activate
from tests.commands import run
from train import pretrain
from train.cli import DONE, WRONG_INPUT
from train.costs.dry_run import estimate
from train.pretraining.run import PretrainRun

CASES = {
    "timm:mobilenetv3_large_100": ("mobilenet_v3_large", "w1.00"),
    "timm:mobilenetv3_large_075": ("mobilenet_v3_large", "w0.75"),
    "torchvision:mobilenet_v3_large": ("mobilenet_v3_large", "w1.00"),
    "timm:resnet18": ("resnet", "c64-d2222"),
    "torchvision:resnet34": ("resnet", "c64-d3463"),
}


def published(text):
    """A model with random weights, statistics and scales."""
    torch.manual_seed(0)
    library, name = text.split(":")
    model = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def features_of(model, images):
    if hasattr(model, "forward_features"):
        return model.forward_features(images).mean((2, 3))
    if hasattr(model, "features"):
        return model.features(images).mean((2, 3))
    return nn.Sequential(*list(model.children())[:-1])(images).flatten(1)


@pytest.mark.parametrize("text", CASES)
def test_full_network_has_the_published_features(text, tmp_path):
    model, (network, dn) = published(text), CASES[text]
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    ours = build(network, subnet(network, dn)).eval()
    order = load_published(ours, Source.parse(f"{text}={tmp_path}/weights.pth"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = features_of(model, images)[:, order]
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert sorted(order.tolist()) == list(range(ours.num_features)) and order.tolist() != sorted(order.tolist())


@pytest.mark.parametrize(("network", "dn"), [("mobilenet_v3_large", "w1.00"), ("resnet", "c64-d2222")])
def test_groups_cover_every_channel_once(network, dn):
    """Every output of every layer is in one group, and every input of a convolution that is not depthwise."""
    model = build(network, subnet(network, dn))
    groups = channel_groups(model)
    outputs, inputs = ([name for group in groups for name in getattr(group, of)] for of in ("outputs", "inputs"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.modules.batchnorm._BatchNorm)}
    assert sorted(outputs) == sorted(layers) and len(set(inputs)) == len(inputs)
    read = {n for n, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.in_channels > 3}
    assert set(inputs) == read


@pytest.mark.parametrize("text", ["timm:mobilenetv3_large_100", "timm:resnet18"])
def test_prefixes_have_the_most_important_channels(text, tmp_path):
    model, (network, dn) = published(text), CASES[text]
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    ours = build(network, subnet(network, dn))
    load_published(ours, Source.parse(f"{text}={tmp_path}/weights.safetensors"))
    for group in channel_groups(ours):
        weights = [ours.get_submodule(name).weight.detach().double() for name in group.inputs or group.outputs]
        if group.inputs:
            importance = sum(weight.abs().sum((0, 2, 3)) for weight in weights)
        else:
            importance = sum(weight.abs() for weight in weights if weight.ndim == 1)
        assert (importance.diff() <= 1e-9).all()


def test_run_starts_with_published_weights_in_both_branches(tmp_path, small):
    torch.save({"state_dict": published("timm:resnet18").state_dict()}, tmp_path / "weights.pth")
    options = {"dns": "c32-d1111,c64-d2222", "stem": "standard", "image_size": 32, "probe_epochs": 0}
    config = small(**options, init_from=f"timm:resnet18={tmp_path}/weights.pth")
    assert estimate(config).images == 80
    model = PretrainRun(config, resume=False).trainer.model
    view = torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.no_grad(), activate(model.online, None):
        online = model.online.encoder(view)
    expected = features_of(published("timm:resnet18"), view).sort().values
    torch.testing.assert_close(online.sort().values, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        dict(model.target.encoder.named_parameters()), dict(model.online.encoder.named_parameters()), rtol=0, atol=0
    )


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_weights_that_do_not_fit_are_refused(tmp_path, arguments, capsys):
    files = {"resnet": published("timm:resnet18").state_dict(), "empty": {"x": torch.zeros(1)}, "code": [Harmful()]}
    for name, contents in files.items():
        torch.save(contents, tmp_path / f"{name}.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    standard = {"stem": "standard", "image_size": 32, "dns": "c64-d2222"}
    for options, source, message in (
        (
            standard | {"dns": "c64-d1111,c64-d3463"},
            "timm:resnet18=resnet.pth",
            "use c64-d2222 as the largest of --dns",
        ),
        (standard | {"dns": "c32-d2222"}, "timm:resnet18=resnet.pth", "use c64-d2222 as the largest of --dns"),
        (standard | {"dns": "c64-d1111"}, "timm:resnet18=resnet.pth", r"\(depths\)"),
        (standard | {"stem": "small"}, "timm:resnet18=resnet.pth", "and --stem standard"),
        (standard, "timm:resnet50=resnet.pth", "does not fit --network resnet: give for example timm:resnet18"),
        (standard, "timm:resnet18=empty.pth", r"another shape|has no tensor"),
        (standard, "timm:resnet18=code.pth", "holds more than tensors, or is damaged"),
        (standard, "timm:resnet18=missing.pth", "there is no file"),
        (standard, "timm:resnet18=damaged.safetensors", "is no readable file of weights"),
        (standard, "resnet18", "holds no checkpoint"),
    ):
        given = re.sub("=(.*)", rf"={tmp_path}/\1", source)
        code = run(pretrain, *arguments(**options, init_from=given, probe_epochs=0), "--dry-run")
        shown = capsys.readouterr()
        assert code == WRONG_INPUT and re.search(message, shown.err), (source, shown.err)
        assert "executed" not in shown.out and shown.err.count("\n") == 1
    assert DONE == 0 and not (tmp_path / "run").exists()


def test_file_of_a_network_in_data_parallel_is_read(tmp_path):
    torch.save({"model_state_dict": {"module.conv1.weight": torch.ones(1)}}, tmp_path / "parallel.pth")
    assert Source.parse(f"timm:resnet18={tmp_path / 'parallel.pth'}").read().keys() == {"conv1.weight"}


def test_download_that_fails_asks_for_a_file(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network\nmany details")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        InputError, match=r"not available here \(no network\); download them and give --init-from timm:"
    ):
        Source.parse("timm:resnet18").read()
    check_name("timm:resnet18", Source.parse("timm:resnet18"))
    with pytest.raises(InputError, match="does not fit --network timm:resnet18: give timm:resnet18 or"):
        check_name("timm:resnet18", Source.parse("timm:resnet34"))
    with pytest.raises(InputError, match="does not fit --network mobilenet_v3_large"):
        check_name("mobilenet_v3_large", Source.parse("timm:tf_mobilenetv3_large_100"))
