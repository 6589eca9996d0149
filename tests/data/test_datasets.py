"""open_images: single images, named datasets, and the error messages."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dspnet_fast.errors import InputError
from tests.data.image_files import draw, error_of
from train.data.datasets import DatasetSize, cifar10, data_folder, dataset_size, fashion_mnist, open_images


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
