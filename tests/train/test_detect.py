"""train.detect: datasets in COCO format and their errors, average precision against pycocotools, Mask R-CNN."""

import copy
import importlib.util
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dspnet_fast import exported
from dspnet_fast.errors import InputError
from dspnet_fast.models import build, subnet
from dspnet_fast.slim import slim
from train import detect, export
from train.cli import DONE, FAILED, WRONG_INPUT
from train.data.coco_loader import flip
from train.data.datasets import coco, coco_shapes
from train.detect import pretrained_network
from train.detection import mask_rcnn
from train.detection.average_precision import KINDS, MEASURES, average_precision
from train.detection.mask_rcnn import DetectorConfig, build_mask_rcnn
from train.detection.training import DetectionTraining
from train.run.schedules import stepped_learning_rate

WIDTH, HEIGHT = 64, 48
NAMES = {3: "disc", 7: "square"}  # ids with gaps, as in COCO
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


def run(*argv):
    with pytest.raises(SystemExit) as end:
        detect.main([str(argument) for argument in argv])
    return end.value.code


def command(**options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **options}.items()]


def draw(folder, count, seed):
    """Draw bright discs and squares on noise; returns their annotations. The last image is empty."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture = Image.fromarray(random.integers(0, 80, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(picture)
        for place, (category, name) in enumerate(NAMES.items() if number < count else ()):
            side = int(random.integers(14, 24))
            left, top = int(random.integers(0, 32 - side)) + 32 * place, int(random.integers(0, HEIGHT - side))
            if name == "disc":
                pen.ellipse((left, top, left + side - 1, top + side - 1), (250, 60, 60))
                angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                outline = np.stack([np.cos(angles), np.sin(angles)], 1) * side / 2 + side / 2 + (left, top)
                polygon = outline.ravel().tolist()
            else:
                pen.rectangle((left, top, left + side - 1, top + side - 1), (60, 250, 60))
                polygon = [left, top, left + side, top, left + side, top + side, left, top + side]
            annotations.append(
                {
                    "id": len(annotations),  # starts at 0
                    "image_id": number * 10,
                    "category_id": category,
                    "bbox": [left, top, side, side],
                    "segmentation": [polygon],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        picture.save(folder / f"{number:03}.png")
        images.append({"id": number * 10, "file_name": f"{number:03}.png", "width": WIDTH, "height": HEIGHT})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in reversed(NAMES.items())],
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A dataset in COCO format with 9 training and 4 test images."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "annotations").mkdir()
    for split, count in (("train", 9), ("val", 4)):
        content = draw(root / f"{split}2017", count, seed=count)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def content(shapes):
    return json.loads((shapes / "annotations" / "instances_val2017.json").read_text())


@pytest.fixture
def read(shapes, tmp_path):
    """read(content, **options): a dataset with these annotations and the test images."""

    def read(content, **options):
        file = tmp_path / "set.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return coco.read(file, shapes / "val2017", **options)

    return read


def test_read_gives_images_boxes_labels_and_masks(read, content):
    crowd = {"counts": [0, HEIGHT * WIDTH], "size": [HEIGHT, WIDTH]}
    bbox = [-0.5, 0, WIDTH + 0.5, HEIGHT]  # beyond the image by rounding, as in published annotations
    content["annotations"].append(
        {"id": 99, "image_id": 10, "category_id": 7, "bbox": bbox, "segmentation": crowd, "iscrowd": 1}
    )
    made = read(content)
    assert [category["name"] for category in made.categories] == ["disc", "square"]
    assert (len(made), made.instances, made.left_out) == (4, 7, [])
    assert made.annotations[10][2]["area"] == HEIGHT * WIDTH
    assert len(made.annotated()) == 3
    one = made.load(0)
    assert one.image.shape == (3, HEIGHT, WIDTH) and one.image.dtype == torch.uint8
    assert one.labels.tolist() == [1, 2], "crowds are excluded from training"
    for box, shape in zip(one.boxes.int().tolist(), one.masks):
        ys, xs = shape.nonzero(as_tuple=True)
        assert all(abs(a - b) <= 1 for a, b in zip(box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)))
    # masks cover the drawn shapes: discs are red, squares green
    assert one.image[0][one.masks[0].bool()].float().mean() > 200 > one.image[0][one.masks[1].bool()].float().mean()
    empty = made.load(3)
    assert (empty.boxes.shape, empty.labels.shape, empty.masks.shape) == ((0, 4), (0,), (0, HEIGHT, WIDTH))


def test_flipping_twice_restores_the_image(read, content):
    one = read(content).load(1)
    other = flip(one)
    for box, shape in zip(other.boxes.int().tolist(), other.masks):
        xs = shape.any(0).nonzero()
        assert abs(int(xs.min()) - box[0]) <= 1 and abs(int(xs.max()) + 1 - box[2]) <= 1
    assert not torch.equal(one.image, other.image)
    for before, after in zip(one, flip(other)):
        torch.testing.assert_close(before, after)


def change(part, place, **values):
    def apply(content):
        content[part][place].update(values)

    return apply


def repeat(part):
    def apply(content):
        content[part].append({**content[part][0], "name": "other"})

    return apply


RUNS = {"size": [HEIGHT, WIDTH]}


@pytest.mark.parametrize(
    ("change_content", "message"),
    [
        (repeat("images"), "the id of image 10 is used more than once"),
        (repeat("annotations"), "the id of annotation 0 is used more than once"),
        (repeat("categories"), "the id of category 7 is used more than once"),
        (change("categories", 0, name="disc"), "category 7 has the name 'disc', which is missing or not unique"),
        (change("images", 1, width=0), "image 20: width and height are 0 and 48"),
        (change("images", 1, file_name="gone.png"), "gone.png of image 20"),
        (change("annotations", 2, image_id=5), "annotation 2: image 5 is not in images"),
        (change("annotations", 2, category_id=5), "annotation 2: category 5 is not in categories"),
        (change("annotations", 1, bbox=[1, 2, 3]), "annotation 1: its box is [1, 2, 3], not four numbers"),
        (change("annotations", 1, bbox=[1, 2, float("nan"), 3]), "annotation 1: its box is [1, 2, nan, 3]"),
        (change("annotations", 1, bbox=[1, 2, 3, 0]), "annotation 1: its box [1, 2, 3, 0] has no area"),
        (change("annotations", 1, bbox=[60, 2, 9, 9]), "annotation 1: its box [60, 2, 9, 9] lies outside its image"),
        (change("annotations", 1, bbox=[64, 2, 1, 9]), "annotation 1: its box [64, 2, 1, 9] has no area in its image"),
        (change("annotations", 1, segmentation=[]), "annotation 1: it has no polygon"),
        (change("annotations", 1, segmentation=None), "annotation 1: it has no segmentation"),
        (change("annotations", 1, segmentation=[[1, 2, 3, 4]]), "annotation 1: one of its polygons is not three"),
        (change("annotations", 1, segmentation=[[1, 2, 3, 4, 5, "6"]]), "annotation 1: one of its polygons is not"),
        (
            change("annotations", 1, segmentation={"counts": [9], "size": [3, 3]}),
            "annotation 1: its run lengths have size",
        ),
        (
            change("annotations", 1, segmentation={"counts": [9], **RUNS}),
            "its run lengths add up to 9 pixels, its image has 3072",
        ),
        (change("annotations", 1, segmentation={"counts": [-1, 3073], **RUNS}), "are not integers from 0"),
        (change("annotations", 1, segmentation={"counts": "o", **RUNS}), "its compressed run lengths are damaged"),
        (change("annotations", 1, segmentation={"counts": "\x01", **RUNS}), "its compressed run lengths are damaged"),
        (lambda content: content.pop("annotations"), "annotations must be a list of objects"),
        (lambda content: content["images"].clear(), "there is no image"),
    ],
)
def test_read_names_the_invalid_annotation(read, content, change_content, message):
    change_content(content)
    with pytest.raises(InputError, match=r"set\.json") as error:
        read(content)
    assert message in str(error.value)


def test_read_refuses_files_in_another_format(read, shapes, tmp_path):
    for text in ("{", "[]"):
        with pytest.raises(InputError, match=r"set\.json"):
            read(text)
    with pytest.raises(InputError, match="cannot read the annotations"):
        coco.read(tmp_path / "none.json", shapes)


def test_invalid_annotations_are_skipped_up_to_a_limit(read, content):
    for annotation in content["annotations"][:2]:
        annotation["bbox"] = [0, 0, 0, 0]
    made = read(content, max_bad=2)
    assert [line.split(":")[0] for line in made.left_out] == ["annotation 0", "annotation 1"] and made.instances == 4
    with pytest.raises(InputError, match="--max-bad-annotations allows 1"):
        read(content, max_bad=1)
    with pytest.raises(InputError, match="--max-bad-annotations allows 0"):
        read(content)
    many = [{**content["annotations"][0], "id": number} for number in range(25)]
    with pytest.raises(InputError, match="annotation 9: .*; and 15 more"):
        read({**content, "annotations": many})


def test_load_refuses_an_image_of_another_size(read, content):
    content["images"][0].update(width=70)
    with pytest.raises(InputError, match="001.png is 64 x 48, but .* says 70 x 48"):
        read(content).load(0)


@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_compressed_run_lengths_decode_as_in_pycocotools(density):
    pixels = (np.random.default_rng(0).random((37, 300)) < density).astype(np.uint8)
    text = mask.encode(np.asfortranarray(pixels))["counts"].decode()
    flat = np.concatenate([[0], pixels.ravel(order="F")])
    changes = np.flatnonzero(np.diff(flat))
    assert coco_shapes._decompressed(text) == np.diff([0, *changes, pixels.size]).tolist()


def test_polygons_and_run_lengths_give_the_same_mask(read, content):
    rle = mask.frPyObjects(content["annotations"][0]["segmentation"], HEIGHT, WIDTH)[0]
    pixels = mask.decode(rle)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], pixels.ravel(order="F")])))
    plain = {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, pixels.size]).tolist()}
    compressed = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    for form in (content["annotations"][0]["segmentation"], plain, compressed):
        content["annotations"][0]["segmentation"] = form
        assert np.array_equal(read(content).load(0).masks[0].numpy(), pixels)


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
        model = build_mask_rcnn(network.to("meta"), 2, DetectorConfig((64,), 64, 8, 16), seed=0)
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
    model = build_mask_rcnn(network, 2, DetectorConfig((64,), 64, 8, 16), seed=0)
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


def test_exported_network_is_preferred_to_the_checkpoint(unexported, capsys):
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

    train_step = DetectionTraining.train_step

    def interrupting(self, batch):
        loss = train_step(self, batch)
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)
        return loss

    for path in checkpoints.iterdir():
        path.unlink()
    losses.clear()
    monkeypatch.setattr(DetectionTraining, "train_step", interrupting)
    assert run(*arguments) == FAILED
    assert "the same command continues" in capsys.readouterr().out
    monkeypatch.setattr(DetectionTraining, "train_step", train_step)
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


def test_help_has_an_example(capsys):
    assert run("--help") == DONE
    assert "example:" in capsys.readouterr().out
