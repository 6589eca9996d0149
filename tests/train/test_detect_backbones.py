"""train.detect with random weights and networks of other libraries."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dspnet_fast.errors import InputError
from tests.commands import run as run_command
from train import detect
from train.cli import DONE, WRONG_INPUT
from train.detection import mask_rcnn
from train.detection.backbones import STRIDES, open_backbone
from train.detection.training import DetectionTraining, Hyperparameters
from train.run.update_guard import MAX_IN_A_ROW

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def run(*argv):
    options = ["--sizes=32", "--max-size=64", "--anchor-size=8", "--rois=16", "--batch-size=2", "--lr-drops="]
    return run_command(
        detect, *map(str, argv), *options, "--steps=1", "--warmup-steps=0", "--workers=0", "--device=cpu"
    )


@pytest.fixture
def saved(tmp_path):
    """saved(network): a file of its weights."""

    def save(network, name="weights.safetensors"):
        if name.endswith(".pth"):
            torch.save(network.state_dict(), tmp_path / name)
        else:
            save_file(network.state_dict(), tmp_path / name)
        return tmp_path / name

    return save


@torch.no_grad()
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("timm", "resnet18"),
        ("timm", "mobilenetv3_small_050"),
        ("torchvision", "resnet18"),
        ("torchvision", "mobilenet_v3_small"),
    ],
)
def test_published_weights_give_maps_of_four_strides(saved, tmp_path, library, name):
    torch.manual_seed(0)
    network = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    file = saved(network)
    backbone = open_backbone(f"{library}:{name}={file}", tmp_path, None, seed=0)
    images = torch.randn(2, 3, 64, 96)
    maps = backbone.network.eval().feature_maps(images)
    channels = backbone.network.map_channels
    assert [tuple(found.shape) for found in maps] == [
        (2, count, 64 // stride, 96 // stride) for count, stride in zip(channels, STRIDES)
    ]
    network.eval()
    assert library != "timm" or backbone.mean == tuple(network.pretrained_cfg["mean"])
    if (library, name) == ("timm", "resnet18"):
        torch.testing.assert_close(maps[-1], network.forward_features(images))
    if name == "mobilenet_v3_small":
        torch.testing.assert_close(maps[-1], network.features(images))
    if (library, name) == ("torchvision", "resnet18"):
        torch.testing.assert_close(network.fc(maps[-1].mean((2, 3))), network(images))
    assert backbone.name == f"{library}-{name}-weights" and str(file) in backbone.source


def test_weights_under_other_names_are_matched_by_order(saved, tmp_path):
    network = torchvision.models.resnet18()
    file = tmp_path / "renamed.pth"
    torch.save({f"net.{i}": tensor for i, tensor in enumerate(network.state_dict().values()) if tensor.ndim}, file)
    backbone = open_backbone(f"torchvision:resnet18={file}", tmp_path, None, seed=0)
    assert backbone.source.endswith("matched by order")
    torch.testing.assert_close(next(backbone.network.parameters()), network.conv1.weight)


@pytest.mark.parametrize(
    ("weights", "dn", "message"),
    [
        ("timm:no_such", None, "no model 'no_such'"),
        ("torchvision:no_such", None, "no classifier 'no_such'"),
        ("timm:resnet18=gone.pth", None, "there is no file gone.pth"),
        ("torchvision:vit_b_16={file}", None, "does not fit|other shapes|lacks"),
        ("timm:vit_tiny_patch16_224={file}", None, "lacks"),
        ("timm:resnet18={file}", "c8-d1111", "leave it out"),
        ("other", None, "--weights other: give run, random"),
        ("run", None, "--dn is missing"),
        ("random", "w0.50", "w0.50"),
    ],
)
def test_unusable_weights_are_refused(finished, saved, weights, dn, message):
    file = saved(torchvision.models.mobilenet_v3_small())
    with pytest.raises(InputError, match=message):
        open_backbone(weights.format(file=file), finished, dn, seed=0)


def test_random_weights_depend_on_the_seed_and_have_their_own_results(finished, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_rcnn, "CHANNELS", 32)
    first, again, other = (open_backbone("random", finished, "c8-d1111", seed).network for seed in (0, 0, 1))
    weights = [next(network.parameters()) for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    assert run(tmp_path / "run", "--dn=c8-d1111", "--weights=random", "--boxes-only", "--coco", shapes) == DONE
    report = json.loads((tmp_path / "run" / "evaluation" / "detect" / "c8-d1111-random.json").read_text())
    assert report["from"] == "random weights"


def test_published_weights_need_no_run(shapes, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mask_rcnn, "CHANNELS", 32)
    file = saved(timm.create_model("mobilenetv3_small_050"), "weights.pth")
    assert (
        run(tmp_path / "new", "--coco", shapes, "--boxes-only", f"--weights=timm:mobilenetv3_small_050={file}") == DONE
    )
    assert (tmp_path / "new" / "evaluation" / "detect" / "timm-mobilenetv3_small_050-weights.json").is_file()
    assert run(tmp_path / "new", "--coco", shapes) == WRONG_INPUT
    assert "--dn is missing" in capsys.readouterr().err


class Detector(torch.nn.Module):
    """A model whose loss is the first image's mean times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, images, targets):
        return {"loss": self.weight * self.norm(images[0][None]).mean() + images[0].mean() * self.weight}


def test_non_finite_steps_change_nothing_and_end_the_training(read, content):
    model = Detector()
    training = DetectionTraining(model, Hyperparameters(9, (), 1, 0.1, 0.9, 0.0, 0, 0), torch.device("cpu"))
    good = read(content).load(0)
    bad = good._replace(image=torch.full_like(good.image, float("nan"), dtype=torch.float32))
    training.train_step([good])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert not training.train_step([bad]).isfinite() and training.step == 2
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert training.guard.new_messages() == ["step 2  skipped: its numbers were not finite (1 steps so far)"]
    training.train_step([good])
    with pytest.raises(InputError, match=f"{MAX_IN_A_ROW} consecutive steps, up to step 6"):
        for _ in range(MAX_IN_A_ROW):
            training.train_step([bad])
