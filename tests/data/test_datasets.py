"""open_images: the layouts of datasets, their splits, and the error messages."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast.errors import InputError
from train.data.datasets import DatasetSize, cifar10, data_folder, dataset_size, fashion_mnist, open_images
from train.data.datasets.folder_files import EXTENSIONS
from train.data.datasets.images import ImageDataset, require_labels


def draw(path: Path, value: int = 0, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


def error_of(name: Path | str, split: Literal["train", "test"] = "train") -> str:
    with pytest.raises(InputError) as caught:
        open_images(str(name), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder, no Debian package and no network."""
    monkeypatch.setenv("DSPNET_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")

    def offline(*args, **kwargs):
        raise OSError("network\nis unreachable")

    monkeypatch.setattr(fashion_mnist, "FashionMNIST", type("F", (), {"__init__": offline, "classes": ["a", "b"]}))
    monkeypatch.setattr(cifar10, "download_and_extract_archive", offline)
    return tmp_path / "data"


def files_of(images: ImageDataset, root: Path) -> list[str]:
    return [Path(images.file(i)).relative_to(root).as_posix() for i in range(len(images))]


# image folders


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
        draw(tmp_path / "train" / "a" / f"{i:02}.png")
    assert (len(open_images(str(tmp_path), "train")), len(open_images(str(tmp_path), "test"))) == (11, 1)


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


def test_list_of_images_and_folders(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        draw(tmp_path / name)
    (tmp_path / "list.txt").write_text("# images\nb/2.png\n\na\n")
    images = open_images(str(tmp_path / "list.txt"), "train")
    assert files_of(images, tmp_path) == ["b/2.png", "a/0.png", "a/1.png"] and images.labels is None
    (tmp_path / "list.txt").write_text("nowhere.png\n")
    assert "nowhere.png does not exist" in error_of(tmp_path / "list.txt")


# single images


@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.webp", "0.tif"])
@pytest.mark.parametrize("damage", ["truncated", "no image", "empty"])
def test_broken_image_is_named_when_loaded(tmp_path, name, damage):
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "no image": b"x" * 999, "empty": b""}[damage])
    images = open_images(str(tmp_path), "train")
    with pytest.raises(InputError) as caught:
        images.load(0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_removed_since_opening_is_named(tmp_path):
    draw(tmp_path / "0.png")
    images = open_images(str(tmp_path), "train")
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png"):
        images.load(0)


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("L", ".png", "L"),
        ("1", ".png", "L"),
        ("LA", ".png", "L"),
        ("RGB", ".jpg", "RGB"),
        ("RGBA", ".png", "RGB"),
        ("P", ".png", "RGB"),
        ("CMYK", ".jpg", "RGB"),
    ],
)
def test_image_modes_become_grey_or_rgb(tmp_path, mode, suffix, expected):
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / f"0{suffix}")
    image = open_images(str(tmp_path), "train").load(0)
    assert image.mode == expected
    assert np.asarray(image).min() >= 250


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_keep_the_upper_8(tmp_path, suffix):
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)).save(tmp_path / f"0{suffix}")
    image = open_images(str(tmp_path), "train").load(0)
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 0, 1, 128, 255]]


@pytest.mark.parametrize("values", [np.array([[0.5]], np.float32), np.array([[70000]], np.int32)])
def test_values_without_a_known_range_raise_input_error(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "0.tif")
    with pytest.raises(InputError, match=r"0\.tif.*no known range"):
        open_images(str(tmp_path), "train").load(0)


@pytest.mark.filterwarnings("error")
def test_transparent_palette_gives_no_warning(tmp_path):
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.save(tmp_path / "0.png", transparency=b"\x80\xff")
    assert open_images(str(tmp_path), "train").load(0).getpixel((0, 0)) == (10, 20, 30)


# Fashion-MNIST


def write_idx(folder: Path, count: int = 6, packed: bool = True, split: str = "train") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = fashion_mnist.PREFIXES[split]
    images = (np.arange(count * 4 * 5) % 256).astype(np.uint8)
    labels = (np.arange(count) % 2).astype(np.uint8)
    for name, sizes, values in (("images-idx3", (count, 4, 5), images), ("labels-idx1", (count,), labels)):
        content = struct.pack(f">BBBB{len(sizes)}i", 0, 0, 8, len(sizes), *sizes) + values.tobytes()
        path = folder / f"{prefix}-{name}-ubyte"
        if packed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)


def test_fashion_mnist_folders_are_searched_in_order(data):
    for count, folder in ((5, fashion_mnist.DEBIAN), (4, data / "FashionMNIST" / "raw"), (3, data / "fashion-mnist")):
        write_idx(folder, count, packed=count != 4)
        images = open_images("fashion-mnist", "train")
        assert len(images) == count
    assert images.labels.tolist() == [0, 1, 0]
    assert images.name == "fashion-mnist"
    assert np.array_equal(np.asarray(images.load(1)), np.arange(20, 40).reshape(4, 5))
    assert images.load(1).mode == "L"
    assert "image 1" in images.file(1)


def test_fashion_mnist_downloads_last(data, monkeypatch):
    def download(self, root, download):
        write_idx(Path(root) / "FashionMNIST" / "raw", packed=False)

    monkeypatch.setattr(fashion_mnist.FashionMNIST, "__init__", download)
    assert len(open_images("fashion-mnist", "train")) == 6


@pytest.mark.parametrize("download", [True, False])
def test_missing_fashion_mnist_error_names_the_three_sources(data, download):
    with pytest.raises(InputError) as caught:
        open_images("fashion-mnist", "train", download=download)
    message = str(caught.value)
    for way in (str(data / "fashion-mnist"), "dataset-fashion-mnist", "download"):
        assert way in message
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["truncated", "no gzip", "bits"])
def test_damaged_fashion_mnist_is_named(data, damage):
    write_idx(data / "fashion-mnist")
    path = data / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes({"truncated": content[:30], "no gzip": b"x" * 99, "bits": bytes(content)}[damage])
    assert str(path) in error_of("fashion-mnist")


def test_mismatched_fashion_mnist_files_raise_input_error(data):
    write_idx(data / "fashion-mnist", 6)
    images = (data / "fashion-mnist" / "train-images-idx3-ubyte.gz").read_bytes()
    write_idx(data / "fashion-mnist", 5)
    (data / "fashion-mnist" / "train-images-idx3-ubyte.gz").write_bytes(images)
    assert "do not match" in error_of("fashion-mnist")


def test_installed_fashion_mnist():
    try:
        train, test = (open_images("fashion-mnist", split, download=False) for split in ("train", "test"))
    except InputError as error:
        pytest.skip(str(error))
    assert (len(train), len(test)) == (60000, 10000)
    assert train.load(0).size == (28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert train.classes[train.labels[0]] == "Ankle boot"


# CIFAR-10


def write_cifar(folder: Path, monkeypatch, content: object = None) -> None:
    """Write every file of the published layout with two images each, and patch the expected checksums."""
    folder.mkdir(parents=True)
    pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    for split in ("train", "test"):
        for name in cifar10.MD5[split]:
            packed = pickle.dumps(content or {"data": pixels, "labels": [7, 3]}, protocol=4)
            (folder / name).write_bytes(packed)
            monkeypatch.setitem(cifar10.MD5[split], name, hashlib.md5(packed).hexdigest())


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_cifar_batches(data, monkeypatch, folder):
    write_cifar(data / folder, monkeypatch)
    train, test = open_images("cifar10", "train"), open_images("cifar10", "test")
    assert (len(train), len(test)) == (10, 2)
    assert test.labels.tolist() == [7, 3]
    assert test.classes[7] == "horse"
    image = test.load(1)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert image.getpixel((1, 0)) == tuple((3072 + 1024 * c + 1) % 256 for c in range(3))


def test_cifar_as_an_image_folder(data):
    draw(data / "cifar10" / "train" / "cat" / "0.png")
    assert open_images("cifar10", "train").classes == ["cat"]


def test_cifar_with_a_wrong_checksum_raises_input_error(data, monkeypatch):
    write_cifar(data / "cifar-10-batches-py", monkeypatch)
    with open(data / "cifar-10-batches-py" / "data_batch_3", "ab") as file:
        file.write(b"x")
    assert "data_batch_3" in error_of("cifar10")
    assert len(open_images("cifar10", "test")) == 2


def test_missing_cifar_error_names_the_sources(data):
    message = error_of("cifar10")
    for way in ("cifar-10-batches-py", "image folder", str(data), "download"):
        assert way in message


def test_cifar_downloads_last(data, monkeypatch):
    def download(url, root, filename, md5):
        write_cifar(Path(root) / "cifar-10-batches-py", monkeypatch)

    monkeypatch.setattr(cifar10, "download_and_extract_archive", download)
    assert len(open_images("cifar10", "train")) == 10


class Code:
    """Executes a command when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_code_in_a_cifar_batch_is_not_executed(data, tmp_path, monkeypatch):
    trace = tmp_path / "it ran".replace(" ", "_")
    write_cifar(data / "cifar-10-batches-py", monkeypatch, content={"data": Code(trace), "labels": [1]})
    message = error_of("cifar10")
    assert "system" in message
    assert "data_batch_1" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "asked", [b"cbuiltins\neval\n", b"c_codecs\nencode\n", b"cnumpy\nload\n", b"cnumpy\nndarray.tofile\n"]
)
def test_pickled_globals_other_than_arrays_raise_input_error(tmp_path, asked):
    (tmp_path / "batch").write_bytes(b"\x80\x02" + asked + b".")
    with pytest.raises(InputError, match="is not allowed"):
        cifar10.read_batch(tmp_path / "batch")


def test_cifar_batch_pickled_by_python_2_is_read(tmp_path):
    """As published: protocol 2, numpy's old module name, the array's bytes as a Python 2 string."""
    pixels = np.arange(3072).astype(np.uint8)
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR" + (
        b"(K\x01K\x01M\x00\x0c\x86" + dtype + b"\x89T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    )
    (tmp_path / "batch").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x05eu.")
    images, labels = cifar10.read_batch(tmp_path / "batch")
    assert labels == [5]
    assert np.array_equal(images[0].transpose(2, 0, 1).ravel(), pixels)


@pytest.mark.parametrize(
    "content",
    [
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
        {"data": np.zeros((1, 3072), np.uint8), "labels": [10]},
        {"data": np.zeros((1, 3072), np.float32), "labels": [1]},
        {"data": np.zeros((1, 100), np.uint8), "labels": [1]},
        {"labels": [1]},
        [1, 2],
    ],
)
def test_pickles_of_other_contents_raise_input_error(tmp_path, content):
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(InputError, match="is not a batch of cifar10"):
        cifar10.read_batch(tmp_path / "batch")


def test_dataset_size_is_counted_or_published(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dataset_size("imagenet") == DatasetSize(1_281_167, 50_000)
    assert dataset_size("cifar10") == DatasetSize(50_000, 10_000), "counting must not download"
    for k in range(40):
        draw(tmp_path / "imagenet" / "ab"[k % 2] / f"{k:02}.png")
    assert dataset_size("imagenet") == DatasetSize(36, 4, local=True)
    draw(tmp_path / "flat" / "0.png")
    for name in ("flat", "nowhere"):
        with pytest.raises(InputError):
            dataset_size(name)
    assert dataset_size("flat", labelled=False) == DatasetSize(1, 1, local=True)
    (tmp_path / "broken" / "imagenet").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        dataset_size("broken/imagenet")


def test_data_folder_is_dspnet_data_or_data(monkeypatch):
    monkeypatch.delenv("DSPNET_DATA", raising=False)
    assert data_folder() == Path("data")
    monkeypatch.setenv("DSPNET_DATA", "/somewhere")
    assert data_folder() == Path("/somewhere")
