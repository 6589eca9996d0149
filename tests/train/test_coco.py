"""Datasets in COCO format as people and annotation tools write them, and their errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask

from dspnet_fast.errors import InputError
from tests.train.coco_set import HEIGHT, WIDTH
from train.data.coco_loader import flip
from train.data.datasets import coco, coco_shapes


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
        (change("annotations", 1, segmentation=None), "annotation 1: it has no polygon"),
        (change("annotations", 1, segmentation="M 1 2"), "annotation 1: it has no segmentation"),
        (change("annotations", 1, iscrowd="yes"), "annotation 1: its iscrowd is 'yes', not 0 or 1"),
        (change("annotations", 1, iscrowd=2), "annotation 1: its iscrowd is 2, not 0 or 1"),
        (change("annotations", 1, image_id="1e"), "annotation 1: image '1e' is not in images"),
        (change("images", 1, width=64.5), "image 20: width and height are 64.5 and 48"),
        (change("images", 1, id=1.5), "each with an integer id"),
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
        (change("annotations", 1, image_id=[10]), "annotation 1: image [10] is not in images"),
        (change("annotations", 1, category_id={}), "annotation 1: category {} is not in categories"),
        (change("annotations", 1, category_id=True), "annotation 1: category True is not in categories"),
        (change("categories", 0, name=["disc"]), "category 7 has the name ['disc']"),
        (
            change("images", 1, id="3f-a"),
            "images must be a list of objects, each with an integer id, not {'id': '3f-a'",
        ),
        (
            lambda content: [one.update(bbox=[0.1, 0.2, 0.5, 0.5]) for one in content["annotations"]],
            "COCO's boxes are in pixels",
        ),
        (
            lambda content: content["images"].append({**content["images"][0], "id": 99}),
            "images 10 and 99 have the same file",
        ),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"\x1f\x8b\x08", "is an archive"),
        (b"[" * 100_000, "is not JSON"),
    ],
    ids=["empty", "LFS", "gzip", "deep"],
)
def test_annotations_that_are_no_json_say_what_they_are(shapes, tmp_path, text, message):
    (tmp_path / "set.json").write_bytes(text)
    with pytest.raises(InputError, match=f"set.json {message}"):
        coco.read(tmp_path / "set.json", shapes)
    with pytest.raises(InputError, match="gone.json: No such file.*of set"):
        coco.read(tmp_path / "gone.json", shapes)


def test_folders_in_file_names_and_missing_ids_are_mended(read, content, capsys):
    expected = read(content)
    for image in content["images"]:
        image["file_name"] = f"C:\\data\\images/{image['file_name']}"
    for annotation in content["annotations"]:
        del annotation["id"]
    made = read(content)
    assert made.images == expected.images and made.instances == expected.instances
    assert "folders in file_name are left out" in capsys.readouterr().out


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


def test_read_refuses_an_image_of_another_size(read, content):
    content["images"][0].update(width=70)
    with pytest.raises(InputError, match="001.png is 64 x 48, but its record says 70 x 48"):
        read(content)


def each(part, **values):
    def apply(content):
        for record in content[part]:
            record |= {key: value(record[key]) if callable(value) else value for key, value in values.items()}

    return apply


def flat(content):
    for annotation in content["annotations"]:
        (annotation["segmentation"],) = annotation["segmentation"]


@pytest.mark.parametrize(
    "change_content",
    [
        each("annotations", area=None),
        each("annotations", area=str),
        each("annotations", area="", iscrowd=None),
        each("annotations", iscrowd="0"),
        each("annotations", iscrowd=False),
        each("annotations", id=float, image_id=float, category_id=str),
        each("annotations", bbox=lambda box: [str(value) for value in box]),
        each("images", id=str, width=float, height=str),
        each("categories", id=float),
        flat,
    ],
)
def test_numbers_and_polygons_as_tools_write_them_are_the_same_dataset(read, content, change_content):
    expected = read(content)
    change_content(content)
    made = read(content)
    assert made.images == expected.images and made.categories == expected.categories
    for one, other in zip(sum(made.annotations.values(), []), sum(expected.annotations.values(), [])):
        assert {**one, "area": 0} == {**other, "area": 0}
        assert one["area"] == pytest.approx(other["area"], rel=0.25)  # the file has the box's
    assert all(torch.equal(a, b) for a, b in zip(made.load(0), expected.load(0)))


def test_a_root_category_without_annotations_is_left_out(read, content, capsys):
    root = {"id": 0, "name": "disc", "supercategory": "none"}
    for category in content["categories"]:
        category["supercategory"] = "disc"
    made = read({**content, "categories": [root, *content["categories"]]})
    assert [category["id"] for category in made.categories] == [3, 7]
    assert "the category 'disc', the root of others" in capsys.readouterr().out
    content["annotations"][0]["category_id"] = 0
    with pytest.raises(InputError, match="not unique"):
        read({**content, "categories": [root, *content["categories"]]})


def test_boxes_alone_need_boxes_only(read, content):
    each("annotations", segmentation=[], area=None)(content)
    with pytest.raises(InputError, match="give --boxes-only"):
        read(content)
    made = read(content, boxes_only=True)
    left, top, width, height = content["annotations"][0]["bbox"]
    assert made.annotations[10][0]["area"] == width * height
    one = made.load(0)
    assert one.masks is None and flip(one).masks is None
    assert one.boxes[0].tolist() == [left, top, left + width, top + height]


def test_crowds_can_be_objects(read, content):
    each("annotations", iscrowd=1)(content)
    with pytest.raises(InputError, match="--crowds-as-objects"):
        read(content).annotated()
    assert len(read(content, crowds_as_objects=True).annotated()) == 3


def test_images_are_read_as_annotated_with_or_without_orientation(read, content, shapes, tmp_path):
    image = Image.open(shapes / "val2017" / "001.png")
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    content["images"][0]["file_name"] = str(tmp_path / "turned.jpg")
    assert read(content).load(0).image.shape == (3, HEIGHT, WIDTH)
    content["images"][0].update(width=HEIGHT, height=WIDTH)
    content["annotations"] = content["annotations"][2:]
    assert read(content).load(0).image.shape == (3, WIDTH, HEIGHT)


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
