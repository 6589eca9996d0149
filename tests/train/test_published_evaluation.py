"""train.evaluate with networks that others have trained."""

import io
import json

import pytest
import torch
from PIL import Image

from dspnet_fast.errors import InputError
from dspnet_fast.weight_file import read_weights
from tests.train.timm_weights import saved, timm_network
from train import evaluate, report
from train.cli import DONE, WRONG_INPUT
from train.data.datasets import open_images
from train.data.loader import evaluation_batches
from train.data.normalization import MEAN, STD
from train.evaluation import drawing
from train.evaluation.published import PublishedNetwork
from train.teachers.weights import match

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
NAME = "test_resnet"  # its images are normalised with a mean and std of 0.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return timm_network(NAME, num_classes=0)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """The value of --weights for a file of the network."""
    return f"timm:{NAME}={saved(network, tmp_path_factory.mktemp('weights') / 'theirs.safetensors')}"


def run(*argv):
    with pytest.raises(SystemExit) as end:
        evaluate.main([*map(str, argv), "--workers=0", "--device=cpu"])
    return end.value.code


def test_features_are_those_of_the_network_on_its_own_normalisation(network, weights, images, tmp_path):
    found = PublishedNetwork(tmp_path, CPU, weights, image_size=16)
    data = open_images(str(images), "test")
    pixels = next(iter(evaluation_batches(data, range(40), 16, 40, 0))).float() / 255
    assert network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) != MEAN
    with torch.no_grad():
        expected = network((pixels - 0.5) / 0.5)
        (subnet,) = found.family
        torch.testing.assert_close(
            found.features([subnet], data, "test", 0)[subnet.name], expected, rtol=1e-5, atol=1e-5
        )
    cost = found.cost(subnet)
    assert cost.parameters == sum(p.numel() for p in network.parameters()) and cost.features == expected.shape[1]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        torch.testing.assert_close(found.cut(subnet)((pixels - mean) / std), expected, rtol=1e-5, atol=1e-5)


def test_protocols_write_results_named_after_the_network(weights, images, tmp_path, capsys):
    out = tmp_path / "theirs"
    common = (out, "--weights", weights, "--image-size", 16, "--data", images)
    assert run("knn", *common, "--k", 5) == DONE
    assert run("linear", *common, "--epochs", 2, "--batch-size", 16) == DONE
    semi = ("--shares", 20, "--epochs", 2, "--finetune-epochs", 2, "--finetune-lr", 0.1)
    assert run("semi", *common, *semi) == DONE
    name = f"timm-{NAME}-theirs"
    for protocol, columns in (
        ("knn", {"pretrained"}),
        ("linear", {"linear"}),
        ("semi", {"20 % linear", "20 % finetune"}),
    ):
        found = json.loads((out / "evaluation" / f"{protocol}-{name}.json").read_text())
        assert (found["weights"], found["image_size"]) == (weights, 16) and "step" not in found
        assert found["networks"].keys() == {name} and columns <= found["networks"][name].keys()
    shown = "".join(capsys.readouterr().out.split())  # the line wraps within a long path
    assert "".join(f"weights of {weights} at 16 px".split()) in shown


def test_report_shows_published_networks_beside_those_of_the_run(trained, weights, images, monkeypatch):
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    monkeypatch.setattr(drawing, "png", lambda draw, theme=None: file.getvalue())
    assert run("knn", trained, "--k", 5) == DONE
    assert run("knn", trained, "--k", 5, "--weights", weights, "--image-size", 16, "--data", images) == DONE
    with pytest.raises(SystemExit):
        report.main([str(trained)])
    html = (trained / "report" / "index.html").read_text()
    assert f'<th scope="row">timm-{NAME}-theirs</th>' in html
    assert {path.stem for path in (trained / "report").glob("accuracy-*.png")} == {
        "accuracy-knn-macs",
        "accuracy-knn-parameters",
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--weights", "timm:resnet18=FILE"], "--data is missing"),
        (
            ["--weights", "timm:resnet18=/no/file", "--data", "IMAGES"],
            "--weights timm:resnet18=/no/file: there is no file",
        ),
        (["--weights", "timm:none", "--data", "IMAGES"], "has no model 'none'"),
        (["--weights", "theirs", "--data", "IMAGES"], "--weights theirs: there is no such folder"),
        (["--image-size", "16"], "--image-size is for published --weights"),
        (
            ["--weights", "GIVEN", "--data", "IMAGES", "--network-part", "target"],
            "--network-part is for the networks of",
        ),
        (["--weights", "GIVEN", "--data", "IMAGES", "--fast-kernels"], "--fast-kernels is for the networks of a run"),
        (["--weights", "GIVEN", "--data", "IMAGES", "--image-size", "0"], "--image-size must be at least 1, not 0"),
        (["--weights", "GIVEN", "--data", "IMAGES", "--baselines"], "--baselines evaluates untrained networks"),
    ],
)
def test_options_that_do_not_fit_are_refused(weights, images, tmp_path, capsys, options, reason):
    given = {"GIVEN": weights, "IMAGES": str(images)}
    assert run("knn", tmp_path, *(given.get(option, option) for option in options)) == WRONG_INPUT
    assert reason in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_network_inside_a_self_supervised_model_is_found(network, tmp_path):
    state = network.state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    moco = {f"module.encoder_{kind}.{name}": t for kind, of in (("k", other), ("q", state)) for name, t in of.items()}
    moco |= {"module.encoder_q.fc.0.weight": torch.zeros(3, 3), "module.queue": torch.zeros(2, 4)}
    torch.save({"epoch": 1, "state_dict": moco, "optimizer": {"state": {}}}, tmp_path / "moco.pth")
    for tensors in (
        read_weights(tmp_path / "moco.pth"),
        {f"backbone.{name}": t for name, t in state.items()} | {"projector.0.weight": torch.zeros(2, 2)},
        state | {"prototypes.weight": torch.zeros(2, 2), "projection_head.0.bias": torch.zeros(2)},
    ):
        found, by_order = match(network, tensors, ["fc"])
        assert not by_order and all(torch.equal(found[name], state[name]) for name in found)
        assert len(found) == sum(not name.endswith("num_batches_tracked") for name in state)
    twice = {f"{kind}.{name}": t for kind in "ab" for name, t in state.items()}
    with pytest.raises(InputError, match=r"several such networks, a\., b\.: save the tensors of one"):
        match(network, twice, ["fc"])


def test_a_larger_network_is_not_taken_for_a_smaller_one():
    larger = {f"encoder_q.{name}": t for name, t in torchvision.models.resnet34().state_dict().items()}
    smaller = torchvision.models.resnet18()
    smaller.fc = torch.nn.Identity()
    with pytest.raises(InputError, match="the network has no layer1.2"):
        match(smaller, larger, ["fc"])
