"""open_images of image folders: layouts, splits, links, and left-out files."""

from pathlib import Path

import pytest
import torch

from dspnet_fast.errors import InputError
from tests.data.image_files import draw, error_of
from train.data.datasets import open_images
from train.data.datasets.folder_files import EXTENSIONS
from train.data.datasets.images import ImageDataset, require_labels


def files_of(images: ImageDataset, root: Path) -> list[str]:
    return [Path(images.file(i)).relative_to(root).as_posix() for i in range(len(images))]


def test_train_and_test_folders(tmp_path):
    for split, counts in {"train": {"b": 3, "a": 2}, "test": {"a": 1, "b": 1}}.items():
        for name, count in counts.items():
            for i in range(count):
                draw(tmp_path / split / name / f"{i}.png", value=100 * (name == "b") + i)
    train, test = open_images(str(tmp_path), "train"), open_images(str(tmp_path), "test")
    assert (len(train), len(test)) == (5, 2)
    assert train.classes == test.classes == ["a", "b"]
    assert train.labels.dtype == torch.int64
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert [train.load(i).getpixel((0, 0))[0] for i in range(5)] == [0, 1, 100, 101, 102]
    assert train.file(2) == str(tmp_path / "train" / "b" / "0.png")


def test_val_folder_is_the_test_split(tmp_path):
    draw(tmp_path / "train" / "a" / "0.png")
    draw(tmp_path / "val" / "a" / "1.png")
    assert open_images(str(tmp_path), "test").file(0).endswith("1.png")


def test_class_folders_are_split_by_tenths(tmp_path):
    for name, count in {"a": 21, "b": 2}.items():
        for i in range(count):
            draw(tmp_path / name / f"{i:02}.png", size=(2, 2))
    train, test = open_images(str(tmp_path), "train"), open_images(str(tmp_path), "test")
    names = [Path(test.file(i)).relative_to(tmp_path).as_posix() for i in range(len(test))]
    assert names == ["a/00.png", "a/10.png", "b/00.png"]
    assert test.labels.tolist() == [0, 0, 1]
    files = {train.file(i) for i in range(len(train))} | {test.file(i) for i in range(len(test))}
    assert len(files) == len(train) + len(test) == 23


def test_folder_without_classes(tmp_path):
    for i in range(11):
        draw(tmp_path / f"{i:02}.PNG", size=(2, 2))
    train, test = open_images(str(tmp_path), "train"), open_images(str(tmp_path), "test")
    assert (len(train), len(test)) == (11, 2)
    assert train.labels is None
    assert train.classes == []
    with pytest.raises(InputError, match=r"no labels.*folder per class"):
        require_labels(train)


def test_train_folder_without_classes(tmp_path):
    draw(tmp_path / "train" / "0.png")
    draw(tmp_path / "test" / "1.png")
    assert open_images(str(tmp_path), "train").labels is None
    assert open_images(str(tmp_path), "test").labels is None


def test_subfolders_are_read_and_hidden_and_other_files_are_left_out(tmp_path):
    for name in ("a/deep/1.jpg", "a/0.jpg", "a/.hidden.jpg", "a/.thumbs/2.jpg", ".git/3.jpg", ".4.jpg"):
        draw(tmp_path / "train" / name)
    draw(tmp_path / "test" / "a" / "5.jpg")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    images = open_images(str(tmp_path), "train")
    assert files_of(images, tmp_path / "train" / "a") == ["0.jpg", "deep/1.jpg"]
    assert images.note == "left out: 1 files ending in .txt"


def test_missing_folder_is_named_in_the_error(tmp_path):
    message = error_of(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "fashion-mnist" in message
    assert "cifar10" in message


def test_folder_without_images_lists_extensions(tmp_path):
    assert ".jpg" in error_of(tmp_path)
    (tmp_path / "b").mkdir()
    assert ".png" in error_of(tmp_path)


def test_different_classes_in_train_and_test_raise_input_error(tmp_path):
    for name in ("train/a", "train/b", "test/a"):
        draw(tmp_path / name / "0.png")
    message = error_of(tmp_path, "test")
    assert "'b'" in message
    assert str(tmp_path / "test") in message
    assert len(open_images(str(tmp_path), "train")) == 2, "pretraining needs no test classes"
    draw(tmp_path / "test" / "b" / "0.png")
    draw(tmp_path / "test" / "c" / "0.png")
    assert "'c'" in error_of(tmp_path, "test")


def test_test_folder_without_train_folder_raises_input_error(tmp_path):
    draw(tmp_path / "test" / "a" / "0.png")
    assert "no folder train" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "valid"),
        ("Train", "Test"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("TRAIN", "validation"),
    ],
)
def test_usual_names_of_splits_are_recognised(tmp_path, train, test):
    for i in range(3):
        draw(tmp_path / train / "a" / f"{i}.png")
    draw(tmp_path / test / "a" / "9.png")
    assert files_of(open_images(str(tmp_path), "train"), tmp_path) == [f"{train}/a/{i}.png" for i in range(3)]
    assert files_of(open_images(str(tmp_path), "test"), tmp_path) == [f"{test}/a/9.png"]


def test_validation_folder_beside_a_test_folder_is_named_as_unused(tmp_path):
    for split in ("train", "val", "test"):
        draw(tmp_path / split / "a" / "0.png")
    assert open_images(str(tmp_path), "train").note == "not used: val"
    assert files_of(open_images(str(tmp_path), "test"), tmp_path) == ["test/a/0.png"]


def test_train_folder_alone_is_split_by_tenths(tmp_path):
    for i in range(12):
        draw(tmp_path / "train" / "a" / f"{i:02}.png"), draw(tmp_path / "train" / "b" / f"{i:02}.png")
    assert (len(open_images(str(tmp_path), "train")), len(open_images(str(tmp_path), "test"))) == (22, 2)


def test_folder_named_train_among_others_is_a_class(tmp_path):
    for name in ("bus", "train", "tram"):
        draw(tmp_path / name / "0.png"), draw(tmp_path / name / "1.png")
    assert open_images(str(tmp_path), "train").classes == ["bus", "train", "tram"]


def test_two_folders_of_one_split_raise_input_error(tmp_path):
    for name in ("train2014", "train2017", "val2017"):
        draw(tmp_path / name / "0.png")
    assert "train2014 and train2017" in error_of(tmp_path)


def test_images_beside_class_folders_are_left_out_and_counted(tmp_path):
    draw(tmp_path / "a" / "0.png"), draw(tmp_path / "a" / "1.png")
    draw(tmp_path / "loose.png")
    images = open_images(str(tmp_path), "train")
    assert files_of(images, tmp_path) == ["a/1.png"]
    assert "1 images beside the class folders are left out (--unlabelled takes them)" in images.note
    assert len(open_images(str(tmp_path), "train", unlabelled=True)) == 3


def test_class_with_one_image_is_trained_on(tmp_path):
    draw(tmp_path / "a" / "0.png"), draw(tmp_path / "a" / "1.png"), draw(tmp_path / "rare" / "0.png")
    images = open_images(str(tmp_path), "train")
    assert images.labels.tolist() == [0, 1] and images.classes == ["a", "rare"]
    assert "rare" in images.note
    assert files_of(open_images(str(tmp_path), "test"), tmp_path) == ["a/0.png"]


def test_folders_of_one_image_each_are_no_classes(tmp_path):
    for i in range(20):
        draw(tmp_path / f"p{i:03}" / "scan.png")
    images = open_images(str(tmp_path), "train")
    assert len(images) == 20 and images.labels is None
    assert len(open_images(str(tmp_path), "test")) == 2


def test_empty_and_foreign_folders_are_no_classes(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / name / "0.png"), draw(tmp_path / name / "1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "a" / "._0.png").write_bytes(b"\0")
    images = open_images(str(tmp_path), "train")
    assert images.classes == ["a", "b"]
    assert "empty: folder without images" in images.note


def test_unlabelled_folders_of_dates_are_one_list(tmp_path):
    for name in ("2021/05/camera/1.png", "2021/06/2.png", "2022/3.png"):
        draw(tmp_path / name)
    images = open_images(str(tmp_path), "train", unlabelled=True)
    assert len(images) == 3 and images.labels is None


def test_link_cycles_and_doubled_files_are_met_once(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        draw(tmp_path / name)
    (tmp_path / "a" / "latest").symlink_to(".")
    (tmp_path / "a" / "parent").symlink_to("..")
    (tmp_path / "a" / "other").symlink_to("../b")
    (tmp_path / "a" / "copy.png").symlink_to("0.png")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    images = open_images(str(tmp_path), "train")
    assert files_of(images, tmp_path) == ["a/1.png", "b/1.png"]
    assert "3 links to folders met before" in images.note and "1 links to files met before" in images.note
    assert "1 links that lead nowhere" in images.note


def test_linked_files_and_folders_are_followed(tmp_path):
    for i in range(2):
        draw(tmp_path / "store" / f"{i}.png"), draw(tmp_path / "other" / f"{i}.png")
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "0.png").symlink_to(tmp_path / "store" / "0.png")
    (tmp_path / "set" / "a" / "1.png").symlink_to(tmp_path / "store" / "1.png")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "other")
    images = open_images(str(tmp_path / "set"), "train")
    assert images.classes == ["a", "b"] and len(images) == 2


def test_endings_that_pillow_reads_are_images_and_others_are_counted(tmp_path):
    for name in ("0.gif", "1.jfif", "2.jp2", "3.webp", "4.tga", "5.png"):
        draw(tmp_path / name)
    (tmp_path / "6.heic").write_bytes(b"")
    (tmp_path / "7.nef").write_bytes(b"")
    images = open_images(str(tmp_path), "train")
    assert len(images) == 6 + (".heic" in EXTENSIONS) and all(images.load(i).size == (12, 10) for i in range(6))
    assert "1 files ending in .nef" in images.note


def test_yolo_voc_and_roboflow_folders_are_opened_without_classes(tmp_path):
    for name in ("yolo/images/train/0", "yolo/images/val/1", "voc/JPEGImages/0", "voc/SegmentationClass/0"):
        draw(tmp_path / f"{name}.png")
    for name in ("roboflow/train/images/0", "roboflow/valid/images/1"):
        draw(tmp_path / f"{name}.png")
    for name in ("yolo/labels/train", "voc/Annotations", "roboflow/train/labels", "roboflow/valid/labels"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.txt").write_text("0 0 0 1 1")
    expected = {"yolo": "images/train/0.png", "voc": "JPEGImages/0.png", "roboflow": "train/images/0.png"}
    for name, file in expected.items():
        images = open_images(str(tmp_path / name), "train")
        assert images.labels is None and files_of(images, tmp_path / name) == [file]
    assert files_of(open_images(str(tmp_path / "yolo"), "test"), tmp_path / "yolo") == ["images/val/1.png"]


def classes(root: Path, *names: str, count: int = 3) -> None:
    for name in names:
        for i in range(count):
            draw(root / name / f"{i}.png", size=(2, 2))


@pytest.mark.parametrize(
    ("train", "test", "note"),
    [
        ("seg_train/seg_train", "seg_test/seg_test", ""),
        ("images_train", "images_test", ""),
        ("01_train", "02_val", ""),
        ("train_224", "val_224", ""),
        ("data/train/images", "data/dev/images", ""),
        ("MyTrainSet", "MyTestSet", ""),
        ("set/archive/train", "set/archive/eval", "left out: 1 files ending in .csv"),
    ],
)
def test_splits_are_recognised_by_the_word_in_which_their_names_differ(tmp_path, train, test, note):
    classes(tmp_path, f"{train}/a", f"{train}/b", f"{test}/a", f"{test}/b")
    if note:
        (tmp_path / train).parents[0].joinpath("labels.csv").write_text("")
    images = open_images(str(tmp_path), "train")
    assert (len(images), images.classes, images.note) == (6, ["a", "b"], note)
    assert {name[: len(test)] for name in files_of(open_images(str(tmp_path), "test"), tmp_path)} == {test}


@pytest.mark.parametrize("folders", [("trainA", "trainB", "testA", "testB"), ("train_A", "train_B", "test_A")])
def test_several_training_splits_raise_input_error(tmp_path, folders):
    classes(tmp_path, *folders)
    assert f"{folders[0]} and {folders[1]}: give one of them" in error_of(tmp_path)


def test_train_folder_with_classes_beside_unlabelled_images_is_a_split(tmp_path):
    classes(tmp_path, "train/a", "train/b", "unlabeled/x")
    images = open_images(str(tmp_path), "train")
    assert images.classes == ["a", "b"] and images.note.startswith("not used: unlabeled")


@pytest.mark.parametrize("test", ["test", "test/images", "test/a/.hidden", "test/other"])
def test_test_folder_without_the_classes_is_not_used(tmp_path, test):
    classes(tmp_path, "train/a", "train/b", count=10)
    classes(tmp_path, test)
    images = open_images(str(tmp_path), "train")
    assert len(images) == 18 and images.note.startswith("not used: test (")
    assert len(open_images(str(tmp_path), "test")) == 2


@pytest.mark.parametrize("wrapper", ["archive", "archive/Images", "ILSVRC/Data/CLS-LOC"])
def test_folders_around_a_set_and_folders_without_images_are_no_classes(tmp_path, wrapper):
    classes(tmp_path, f"{wrapper}/cat", f"{wrapper}/dog")
    (tmp_path / "archive" / "attributes").mkdir(parents=True, exist_ok=True)
    (tmp_path / "README.md").write_text("")
    images = open_images(str(tmp_path), "train")
    assert images.classes == ["cat", "dog"] and "1 files ending in .md" in images.note


def test_single_class_is_no_label(tmp_path):
    classes(tmp_path, "jpg")
    images = open_images(str(tmp_path), "train")
    assert len(images) == 3 and images.labels is None


def test_numbered_parts_are_joined(tmp_path):
    classes(tmp_path / "folds", "fold1/a", "fold1/b", "fold2/a", "fold2/b")
    images = open_images(str(tmp_path / "folds"), "train")
    assert images.labels.tolist() == [0] * 5 + [1] * 5 and "fold1 to fold2 are parts" in images.note
    classes(tmp_path / "parts", "images_001/images", "images_002/images")
    assert len(open_images(str(tmp_path / "parts"), "train")) == 6


def test_class_folder_with_splits_raises_input_error(tmp_path):
    classes(tmp_path, "raw/a", "raw/b", "split/train/a", "split/test/a")
    assert f"give {tmp_path / 'split'} as --data" in error_of(tmp_path)
    assert len(open_images(str(tmp_path), "train", unlabelled=True)) == 12


def test_improbable_classes_are_noted(tmp_path):
    classes(tmp_path / "case", "Cat", "cat")
    assert "Cat and cat differ only in capitals" in open_images(str(tmp_path / "case"), "train").note
    classes(tmp_path / "dates", "2021/May", "2021/June", "2022/May", "2022/June")
    assert "every class has the same folders (June, May)" in open_images(str(tmp_path / "dates"), "train").note


def test_masks_are_left_out(tmp_path):
    for name in ("0.png", "0_mask.png", "0_mask_1.png", "1_mask.png", "2.png"):
        draw(tmp_path / "beside" / name)
    images = open_images(str(tmp_path / "beside"), "train")
    assert files_of(images, tmp_path / "beside") == ["0.png", "1_mask.png", "2.png"]
    assert images.note == "left out: 2 masks beside their images"
    classes(tmp_path / "ids", "x/image", "x/masks", "y/image", "y/masks")
    images = open_images(str(tmp_path / "ids"), "train", unlabelled=True)
    assert len(images) == 6 and "2 folders masks beside images" in images.note


@pytest.mark.parametrize("image", ["images", "JPEGImages", "data/img"])
def test_annotation_folders_beside_the_image_folder_are_noted(tmp_path, image):
    classes(tmp_path, image, f"{image}/../masks", f"{image}/../depth")
    images = open_images(str(tmp_path), "train")
    assert len(images) == 3 and images.labels is None
    assert images.note == "left out: 1 folders depth beside images, 1 folders masks beside images"


def test_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"")
    assert "holds no images, but 1 files ending in .zip (unpack them)" in error_of(tmp_path)


def test_list_of_images_and_folders(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        draw(tmp_path / name)
    (tmp_path / "list.txt").write_text("# images\nb/2.png\n\na\n")
    images = open_images(str(tmp_path / "list.txt"), "train")
    assert files_of(images, tmp_path) == ["b/2.png", "a/0.png", "a/1.png"] and images.labels is None
    (tmp_path / "list.txt").write_text("nowhere.png\n")
    assert "nowhere.png does not exist" in error_of(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("content", "expected", "note"),
    [
        ("a 0.png\r\nb.png\r\n".encode("utf-8-sig"), ["a 0.png", "b.png"], ""),
        ("a 0.png\nb.png\n".encode("utf-16"), ["a 0.png", "b.png"], ""),
        (b"'a 0.png'\n  # b.png\n", ["a 0.png"], ""),
        (b"a 0.png 3\nb.png,cat,1\n", ["a 0.png", "b.png"], "labels of list.TXT are not used"),
        (b"sub\\c.png\nsub\nsub/c.png\n", ["sub/c.png"], "left out: 2 files met before"),
        (b"b.png\nlist.TXT\n", ["b.png"], "left out: 1 files ending in .txt"),
    ],
    ids=["Windows", "UTF-16", "quotes", "labels", "twice", "other files"],
)
def test_lists_as_programs_write_them(tmp_path, content, expected, note):
    for name in ("a 0.png", "b.png", "sub/c.png"):
        draw(tmp_path / name)
    (tmp_path / "list.TXT").write_bytes(content)
    images = open_images(str(tmp_path / "list.TXT"), "train")
    assert (files_of(images, tmp_path), images.note) == (expected, note)


def test_file_that_is_no_list_is_refused_with_what_to_give(tmp_path):
    draw(tmp_path / "a.png")
    assert "a.png is a file: give a folder of images, a list" in error_of(tmp_path / "a.png")


def test_results_of_runs_among_the_images_are_no_images(tmp_path):
    classes(tmp_path, "a", "b")
    for run in (tmp_path, tmp_path / "run"):
        draw(run / "report" / "curves.png")
        draw(run / "evaluation" / "knn.png")
        (run / "data_used.json").write_text("{}")
    images = open_images(str(tmp_path), "train")
    assert images.classes == ["a", "b"] and images.note == "left out: 1 files ending in .json"
    assert len(open_images(str(tmp_path), "train", unlabelled=True)) == 6
