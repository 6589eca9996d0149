"""Images with masks: layouts, pairs, COCO's annotations, the views, and files that are no masks."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast.errors import InputError
from tests.train.coco_set import draw as draw_coco
from train.data.datasets.images import decode
from train.data.datasets.masks import UNKNOWN, open_masked
from train.data.loader import evaluation_batches
from train.data.mask_loader import mask_view, mask_views


def draw(image, mask, value=1, size=(12, 10), mode="P"):
    """A grey image, and a mask with a square of a class."""
    image.parent.mkdir(parents=True, exist_ok=True)
    mask.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 90)).save(image)
    made = Image.new(mode, size, 0)
    if mode == "P":
        made.putpalette([0, 0, 0, 200, 10, 10] * 128)
    made.paste(value, (2, 2, 6, 6))
    made.save(mask)


def voc(root):
    for k in range(6):
        draw(root / f"JPEGImages/{k}.jpg", root / f"SegmentationClass/{k}.png")
    draw(root / "JPEGImages/9.jpg", root / "SegmentationObject/9.png")  # in no list, without a mask
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n3\n")
    (lists / "val.txt").write_text("4\n5\n")


def ade(root):
    for split, names in (("training", "0123"), ("validation", "45")):
        for name in names:
            draw(root / f"images/{split}/{name}.jpg", root / f"annotations/{split}/{name}.png")


def cityscapes(root):
    for split, names in (("train", "0123"), ("val", "45"), ("test", "6")):
        for name in names:
            mask = root / f"gtFine/{split}/ulm/{name}_gtFine_labelIds.png"
            draw(root / f"leftImg8bit/{split}/ulm/{name}_leftImg8bit.png", mask, mode="L")
            for other in ("color", "instanceIds", "labelTrainIds"):
                shutil.copy(mask, mask.with_name(f"{name}_gtFine_{other}.png"))


def by_split(root):
    for split, names in (("Train", "0123"), ("Test", "45")):
        for name in names:
            draw(root / f"{split}/img/{name}.jpg", root / f"{split}/labels/{name}_mask.png")


def unsplit(root):
    for k in range(10):
        draw(root / f"images/{k}.jpg", root / f"masks/{k}.png")


def trimaps(root):
    for k in range(10):
        draw(root / f"images/{k}.jpg", root / f"annotations/trimaps/{k}.png")


LAYOUTS = {voc: (4, 2), ade: (4, 2), cityscapes: (4, 2), by_split: (4, 2), unsplit: (9, 1), trimaps: (9, 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("around", ["", "archive/set"])
def test_usual_layouts_are_recognised(layout, around, tmp_path):
    layout(tmp_path / around)
    train, test = (open_masked(str(tmp_path), split) for split in ("train", "test"))
    assert (len(train.images), len(test.images)) == LAYOUTS[layout]
    files = [part.images.file(i) for part in (train, test) for i in range(len(part.images))]
    assert len(set(files)) == len(files)
    for part in (train, test):
        for i in range(len(part.images)):
            assert part.mask(i).shape == (10, 12) and part.mask(i).sum() == 16
            assert part.images.file(i).split("/")[-1][0] == part.masks[i].split("/")[-1][0]
    if layout is cityscapes:
        assert all("labelTrainIds" in mask for mask in train.masks)


def two_names(mask):
    shutil.copy(mask, mask.with_name("3_gt.png"))
    mask.rename(mask.with_name("3_mask.png"))


def test_folder_of_masks_can_be_named(tmp_path):
    for k in range(4):
        draw(tmp_path / f"images/{k}.jpg", tmp_path / f"mine/{k}.png", 2)
        draw(tmp_path / f"images/{k}.jpg", tmp_path / f"labels/{k}.png")
    assert open_masked(str(tmp_path), "train", "mine").mask(0).max() == 2
    assert open_masked(str(tmp_path), "train").mask(0).max() == 1
    (tmp_path / "mine").rename(tmp_path / "masks")
    with pytest.raises(InputError, match="has the folders labels and masks: name the folder of masks with --masks"):
        open_masked(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "masks/3.png").unlink(), r"1 of 10 images have no mask in .*masks, such as .*3.jpg"),
        (
            lambda root: shutil.rmtree(root / "masks"),
            "has no images beside masks: give a folder with images/ and masks/",
        ),
        (lambda root: two_names(root / "masks/3.png"), "3.jpg has several masks: .*3_gt.png, .*3_mask.png; leave one"),
    ],
)
def test_incomplete_folders_are_refused(damage, message, tmp_path):
    unsplit(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        open_masked(str(tmp_path), "train")


def save(image, path, **options):
    image.save(path, **options)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: save(Image.new("RGB", (12, 10)), path), r"has colours \(RGB\), not the index of a class"),
        (lambda path: save(Image.new("L", (12, 9)), path), "mask .* is 12 x 9 pixels, and its image .* is 12 x 10"),
        (lambda path: save(Image.new("L", (12, 10)), path, format="jpeg"), "is a JPEG, which changes the indices"),
        (lambda path: path.write_bytes(b""), "it is empty"),
    ],
    ids=["colours", "size", "jpeg", "empty"],
)
def test_files_that_are_no_masks_are_refused(write, message, tmp_path):
    unsplit(tmp_path)
    write(tmp_path / "masks/3.png")
    masked = open_masked(str(tmp_path), "train")
    with pytest.raises(InputError, match=message):
        mask_views(masked, 8, "masks", 0)


def test_views_of_masks_belong_to_views_of_images(tmp_path):
    """Grey levels are the classes: the views of image and mask agree where no edge is near."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    random = np.random.default_rng(0)
    for k, (height, width) in enumerate([(80, 80), (60, 90), (90, 60)] * 2):
        blocks = random.integers(0, 4, (height // 20 + 1, width // 20 + 1)).repeat(20, 0).repeat(20, 1)[:height, :width]
        Image.fromarray((blocks * 60).astype(np.uint8)).save(tmp_path / f"images/{k}.png")
        Image.fromarray(blocks.astype(np.uint8)).save(tmp_path / f"masks/{k}.png")
    masked = open_masked(str(tmp_path), "train")
    views = mask_views(masked, 32, "masks", 0)
    (images,) = evaluation_batches(masked.images, range(len(views)), 32, len(views), 0)
    agree = (images[:, 0].float() / 60).round() == views
    assert views.shape == (5, 32, 32) and agree.float().mean() > 0.85
    assert not (images[:, 0].float() / 60).round().flip(2).eq(views).float().mean() > 0.6
    values = masked.mask(0)[:60, :60]
    assert torch.equal(mask_view(values, 60), torch.from_numpy(values))


def test_annotations_of_coco_become_masks(tmp_path):
    pytest.importorskip("pycocotools")
    (tmp_path / "annotations").mkdir()
    for split, count in (("train", 4), ("val", 3)):
        content = draw_coco(tmp_path / f"{split}2017", count, seed=count)
        if split == "val":
            content["annotations"][0]["iscrowd"] = 1
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    train, test = (open_masked(str(tmp_path), split) for split in ("train", "test"))
    assert train.names == test.names == {0: "background", 1: "disc", 2: "square"}
    assert len(train.images) == 4 and test.mask(2).max() == 0, "the last image is empty"
    assert set(np.unique(test.mask(0))) == {0, 2, UNKNOWN}
    with open(train.images.file(0), "rb") as file:
        pixels = np.asarray(decode(file.read(), "a")).astype(int)
    mask = train.mask(0)
    assert (pixels[mask == 1][:, 0] > 200).mean() > 0.9 and (pixels[mask == 2][:, 1] > 200).mean() > 0.9
    assert (pixels[mask == 0].max(axis=1) < 90).mean() > 0.95
