"""train.detect: average precision against pycocotools, Mask R-CNN."""

import copy
import importlib.util
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dspnet_fast import exported
from dspnet_fast.errors import InputError
from dspnet_fast.models import build, subnet
from dspnet_fast.slim import slim
from tests.commands import as_arguments
from tests.commands import run as run_command
from tests.interruption import interrupting
from tests.train.coco_set import NAMES
from train import detect, export
from train.cli import DONE, INTERRUPTED, WRONG_INPUT
from train.detection import mask_rcnn
from train.detection.average_precision import KINDS, MEASURES, average_precision
from train.detection.backbones import Backbone, pretrained_network
from train.detection.mask_rcnn import DetectorConfig, build_detector
from train.detection.training import DetectionTraining
from train.run.schedules import stepped_learning_rate

TINY = {
    "sizes": "32",
    "max_size": 64,
    "anchor_size": 8,
    "rois": 16,
    "batch_size": 2,
    "lr": 0.04,
    "lr_drops": "",
    "warmup_steps": 2,
    "workers": 0,
}


run = partial(run_command, detect)


def command(**options):
    return as_arguments({**TINY, **options})


def made_detections(truth, shift=0, noise=None):
    """Detections: the annotations shifted to the right, or with random boxes, labels and scores."""
    for i, record in enumerate(truth.images):
        one = truth.load(i)
        boxes, labels, scores = (
            one.boxes + torch.tensor([shift, 0, shift, 0]),
            one.labels,
            torch.full((len(one.boxes),), 0.9),
        )
        if noise is not None:
            boxes = torch.cat([boxes, boxes]) + 3 * torch.randn(2 * len(boxes), 4, generator=noise).clamp(-2, 2)
            labels = torch.randint(1, 3, (len(boxes),), generator=noise)
            scores = torch.rand(len(boxes), generator=noise)
        masks = torch.cat([one.masks, one.masks]) if noise is not None else one.masks
        masks = masks[:, None].roll(shift if noise is None else 2, -1).float()
        yield record["id"], {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}


def test_average_precision_of_perfect_and_missing_detections(read, content):
    truth = read(content)
    perfect = average_precision(truth, made_detections(truth))
    elsewhere = average_precision(truth, made_detections(truth, shift=30))
    nothing = average_precision(truth, [])
    for kind in KINDS:
        assert perfect[kind]["AP"] == perfect[kind]["AP50"] == perfect[kind]["AR100"] == 1.0
        assert elsewhere[kind]["AP"] == elsewhere[kind]["AP50"] == nothing[kind]["AP"] == nothing[kind]["AR100"] == 0.0
        assert perfect[kind]["APl"] is None, "no object is large"
    assert perfect["categories"] == {name: {"instances": 3, "box": 1.0, "mask": 1.0} for name in ("disc", "square")}


def test_average_precision_equals_pycocotools(read, content):
    """Detections are converted to pycocotools' format and evaluated by its own functions."""
    truth = read(content)
    content["annotations"] = [
        {**a, "id": a["id"] + 1} for a in content["annotations"]
    ]  # pycocotools treats id 0 as unmatched
    expected = COCO()
    expected.dataset = content
    expected.createIndex()
    found = list(made_detections(truth, noise=torch.Generator().manual_seed(0)))
    scores = average_precision(truth, found)
    ids = sorted(NAMES)
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        results = []
        for image, one in found:
            for box, label, score, shape in zip(one["boxes"], one["labels"], one["scores"], one["masks"]):
                left, top, right, bottom = box.tolist()
                form = (
                    {"bbox": [left, top, right - left, bottom - top]}
                    if kind == "box"
                    else {"segmentation": mask.encode(np.asfortranarray(shape[0].numpy().astype(np.uint8)))}
                )
                results.append({"image_id": image, "category_id": ids[label - 1], "score": score.item(), **form})
        direct = COCOeval(expected, expected.loadRes(copy.deepcopy(results)), iou_type)
        direct.evaluate()
        direct.accumulate()
        direct.summarize()
        assert [-1 if scores[kind][name] is None else scores[kind][name] for name in MEASURES] == direct.stats.tolist()
        assert 0 < scores[kind]["AP"] < scores[kind]["AP50"] < 1
        for place, number in enumerate(ids):
            precision = direct.eval["precision"][:, :, place, 0, -1]
            assert scores["categories"][NAMES[number]][kind] == precision[precision > -1].mean()


@pytest.mark.parametrize(("name", "dn"), [("mobilenet_v3_large", "w0.35"), ("resnet", "c8-d1121")])
def test_pyramid_uses_every_resolution(name, dn):
    network = slim(build(name, subnet(name, dn)), None)
    with torch.device("meta"):
        model = build_detector(Backbone(network.to("meta"), name, ""), 2, DetectorConfig((64,), 64, 8, 16), seed=0)
        maps = model.backbone(torch.empty(1, 3, 64, 96))
    assert [features.shape[1:] for features in maps.values()] == [(256, 64 // r, 96 // r) for r in (4, 8, 16, 32)] + [
        (256, 1, 2)
    ]
    model.train()
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(module.training and module.weight.requires_grad for module in norms)
    assert len(norms) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules()) + 8


def test_detector_uses_sync_batch_norm_with_several_processes(monkeypatch):
    network = slim(build("resnet", subnet("resnet", "c8-d1111")), None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = build_detector(Backbone(network, "one", ""), 2, DetectorConfig((64,), 64, 8, 16), seed=0)
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm}


def test_learning_rate_warms_up_and_drops():
    rates = [stepped_learning_rate(step, 4, 0.2, (6, 8)) for step in range(10)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])


@pytest.fixture
def unexported(trained):
    """A copy of the finished run without exported networks."""
    shutil.rmtree(trained / "exported", ignore_errors=True)
    return trained


def test_exported_network_is_preferred_to_the_checkpoint(unexported):
    """Both have the same weights; an export of an earlier step is refused."""
    cut, source = pretrained_network(unexported, "c8-d1121")
    assert source == "checkpoint, 20 steps"
    with pytest.raises(SystemExit):
        export.main([str(unexported), "--dn", "c8-d1121"])
    network, source = pretrained_network(unexported, "c8-d1121")
    assert source == "exported/c8-d1121, 20 steps"
    torch.testing.assert_close(dict(network.named_parameters()), dict(cut.named_parameters()), rtol=0, atol=0)
    manifest = unexported / "exported" / "c8-d1121" / exported.MANIFEST
    manifest.write_text(manifest.read_text().replace('"steps": 20', '"steps": 10'))
    with pytest.raises(InputError, match="was exported at step 10, the run is at 20: export it again"):
        pretrained_network(unexported, "c8-d1121")


@pytest.fixture
def losses(monkeypatch):
    """Losses of all training steps."""
    seen = []
    train_step = DetectionTraining.train_step

    def noting(self, batch):
        loss = train_step(self, batch)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(DetectionTraining, "train_step", noting)
    return seen


def test_detector_learns_and_resumes_with_the_same_weights(unexported, shapes, losses, monkeypatch, capsys):
    monkeypatch.setattr(mask_rcnn, "CHANNELS", 32)  # an eighth of the computation
    arguments = [unexported, "--dn", "c8-d1111", "--coco", shapes, *command(steps=12)]
    assert run(*arguments) == DONE
    assert "batch normalisation over the images of one process" in capsys.readouterr().out
    whole = list(losses)
    assert len(whole) == 12 and sum(whole[-3:]) < 0.85 * sum(whole[:3])
    folder = unexported / "evaluation" / "detect"
    report = json.loads((folder / "c8-d1111.json").read_text())
    assert (report["train"]["images"], report["val"]["images"], report["val"]["instances"]) == (8, 4, 6)
    assert report["box"].keys() == report["mask"].keys() == set(MEASURES) and report["from"] == "checkpoint, 20 steps"
    page = (folder / "c8-d1111.md").read_text()
    assert "| mask |" in page and "| square | 3 |" in page
    (checkpoints,) = folder.glob("c8-d1111-*")
    last = torch.load(checkpoints / "step-00000012.pt", weights_only=True)["model"]
    for path in checkpoints.iterdir():
        path.unlink()
    losses.clear()
    with interrupting(DetectionTraining, 5):
        assert run(*arguments) == INTERRUPTED
    assert "error: interrupted; the same command continues from what was saved" in capsys.readouterr().err
    assert run(*arguments, "--evaluate-steps", "10") == DONE
    assert losses == whole
    assert "step 10  box AP" in capsys.readouterr().out
    again = torch.load(checkpoints / "step-00000012.pt", weights_only=True)["model"]
    torch.testing.assert_close(again, last, rtol=0, atol=0)
    assert json.loads((folder / "c8-d1111.json").read_text()) == report


def test_invalid_options_are_refused(finished, shapes, tmp_path, monkeypatch, capsys):
    for arguments, message in (
        ((), "--coco is missing"),
        (("--coco", tmp_path / "none"), "is not a folder"),
        (("--coco", shapes, "--train-annotations", "none"), "cannot read the annotations"),
        (("--coco", shapes, "--batch-size", "99"), "a batch of 99"),
        (("--sizes", "800,x"), "--sizes '800,x'"),
        (("--sizes", "1400"), "--sizes 1400: give whole numbers from 1 to --max-size, 1333"),
        (("--lr-drops", "200000"), "give steps before the last of 180000"),
        (("--lr", "0"), "--lr must be above 0"),
    ):
        assert run(finished, "--dn", "c8-d1111", *arguments) == WRONG_INPUT
        assert message in capsys.readouterr().err
    assert run(finished, "--dn", "c99-d1111", "--coco", shapes) == WRONG_INPUT
    assert "no part of c16-d2121" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pycocotools" else find(name, *a))
    assert run(finished, "--dn", "c8-d1111", "--coco", shapes) == WRONG_INPUT
    assert "pip install 'dspnet-fast[detect]'" in capsys.readouterr().err


def test_sets_with_different_categories_are_refused(finished, shapes, content, tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").symlink_to(shapes / "val2017")
        content["categories"][0]["name"] = split
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    assert run(finished, "--dn", "c8-d1111", "--coco", tmp_path) == WRONG_INPUT
    assert "have different categories: (7, 'train'), (7, 'val')" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(finished, shapes, tmp_path, workers, monkeypatch, capsys):
    monkeypatch.setattr(mask_rcnn, "CHANNELS", 32)
    root = shutil.copytree(shapes, tmp_path / "set")
    for path in (root / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    out = shutil.copytree(finished, tmp_path / "run")
    assert run(out, "--dn", "c8-d1111", "--coco", root, *command(steps=2, workers=workers)) == WRONG_INPUT
    error = capsys.readouterr().err
    assert "cannot read the image" in error and "train2017/00" in error and "Traceback" not in error


def test_non_finite_loss_ends_the_training(unexported, shapes, monkeypatch, capsys):
    monkeypatch.setattr(mask_rcnn, "CHANNELS", 32)
    arguments = ("--dn", "c8-d1111", "--coco", shapes, *command(steps=9, lr=1e30, warmup_steps=0))
    assert run(unexported, *arguments) == WRONG_INPUT
    assert "start again with a smaller --lr" in capsys.readouterr().err


def test_boxes_alone_train_faster_rcnn_in_roboflows_layout(unexported, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mask_rcnn, "CHANNELS", 32)
    for split, name in (("train", "train"), ("valid", "val")):
        folder = shutil.copytree(shapes / f"{name}2017", tmp_path / "set" / split)
        content = json.loads((shapes / "annotations" / f"instances_{name}2017.json").read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"], annotation["area"]
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    arguments = ("--dn", "c8-d1111", "--coco", tmp_path / "set", *command(steps=2))
    assert run(unexported, *arguments) == WRONG_INPUT
    assert "--boxes-only" in capsys.readouterr().err
    assert run(unexported, *arguments, "--boxes-only") == DONE
    report = json.loads((unexported / "evaluation" / "detect" / "c8-d1111.json").read_text())
    assert set(report["box"]) == set(MEASURES) and "mask" not in report
    assert list(report["categories"]["disc"]) == ["instances", "box"]
    assert "Faster R-CNN on c8-d1111" in capsys.readouterr().out
