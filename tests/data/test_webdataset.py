"""Shards: writing and reading them, random access, and incomplete or damaged files."""

import gzip
import os
import resource
import shutil
import subprocess
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast.errors import InputError
from tests.commands import run as run_command
from train.data import shard as command
from train.data.datasets import open_images, webdataset
from train.data.datasets.images import ArrayDataset
from train.data.shard import ShardOptions, write_shards


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 training and 4 test images of two classes."""
    path = tmp_path_factory.mktemp("images")
    for k in range(23):
        draw(path / "train" / ("cat", "dog")[k % 2] / f"{k:02}.jpg", k)
    for k in range(4):
        draw(path / "test" / ("cat", "dog")[k % 2] / f"{k:02}.png", 100 + k)
    return path


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    assert write_shards(ShardOptions(data=str(folder), out=str(out), shards=4)) == 27
    return out


def contents(images) -> dict[bytes, int]:
    return {images.encoded(i): int(images.labels[i]) for i in range(len(images))}


def test_shards_contain_the_files_and_labels(folder, written):
    assert sorted(path.name for path in written.glob("*.tar")) == ["000.tar", "001.tar", "002.tar", "003.tar"]
    for split in ("train", "test"):
        for name in (str(written), f"{written}/{{000..003}}.tar", f"{written}/*.tar"):
            found = open_images(name, split)
            assert contents(found) == contents(open_images(str(folder), split))
            assert found.classes == ["cat", "dog"]
            assert found.load(0).size == (24, 20)
    assert "000.tar/" in open_images(str(written), "train").file(0)


def test_shards_follow_webdatasets_conventions(written):
    """The members of a sample are adjacent and share their name."""
    with tarfile.open(written / "000.tar") as tar:
        names = tar.getnames()
    assert len(names) == 12
    assert all(
        image.endswith(".jpg") and label == image.replace(".jpg", ".cls")
        for image, label in zip(names[::2], names[1::2])
    )


def test_index_has_the_format_of_wds2idx(written):
    header, *lines = (written / "000.idx").read_text().splitlines()
    assert header == "v1.2 6" and len(lines) == 6
    extension, offset, size, name, *label = lines[0].split()
    assert extension == "jpg" and label[0] == "cls"
    with tarfile.open(written / "000.tar") as tar:
        assert (written / "000.tar").read_bytes()[int(offset) :][: int(size)] == tar.extractfile(name).read()


def test_foreign_shards_need_neither_index_nor_labels(tmp_path):
    for k in range(3):
        with tarfile.open(tmp_path / f"{k}.tar", "w") as tar:
            for j in range(5):
                draw(tmp_path / "x.jpg", 10 * k + j)
                tar.add(tmp_path / "x.jpg", arcname=f"./part/{k}{j}.JPG")
                (tmp_path / "note").write_text("{}")
                tar.add(tmp_path / "note", arcname=f"./part/{k}{j}.json")
    (tmp_path / "x.jpg").unlink()
    (tmp_path / "note").unlink()
    train, test = (open_images(f"{tmp_path}/{{0..2}}.tar", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (15, 2) and train.labels is None
    assert train.load(7).size == (24, 20)
    assert len(open_images(f"{tmp_path}/{{0,2}}.tar", "train")) == 10


def test_shards_with_labels_but_no_test_folder_are_split_like_folders(written, tmp_path):
    for path in written.glob("*.*"):
        shutil.copy(path, tmp_path)
    train, test = (open_images(str(tmp_path), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (21, 2)
    assert test.labels.bincount().tolist() == [1, 1]
    assert not set(contents(train)) & set(contents(test))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/{000..002}.tar", ["a/000.tar", "a/001.tar", "a/002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_expanded(pattern, names):
    assert webdataset._braces(pattern) == names


def error_of(name) -> str:
    with pytest.raises(InputError) as caught:
        open_images(str(name), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_shards_are_named(written):
    assert "004.tar" in error_of(f"{written}/{{000..015}}.tar")
    assert "nowhere" in error_of("/nowhere/*.tar")


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("cut", [700, 10_240, 12_000])
def test_incomplete_shard_raises_input_error(written, tmp_path, index, cut):
    whole = (written / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(whole[: len(whole) - cut])
    if index:
        shutil.copy(written / "001.idx", tmp_path)
    assert "001.tar" in error_of(tmp_path / "001.tar")


@pytest.mark.parametrize("damage", ["", "v1.2 9\n", "v1.2 1\njpg 10\n", "v1.2 1\njpg 99999999 5 a.jpg\n", "v1.1 0\n"])
def test_damaged_index_raises_input_error(written, tmp_path, damage):
    shutil.copy(written / "000.tar", tmp_path)
    (tmp_path / "000.idx").write_text(damage)
    assert "000.idx" in error_of(tmp_path / "000.tar") and "delete it" in error_of(tmp_path / "000.tar")


def test_index_older_than_its_shard_is_ignored(written, tmp_path):
    shutil.copy(written / "000.tar", tmp_path)
    (tmp_path / "000.idx").write_text("v1.2 0\n")
    os.utime(tmp_path / "000.idx", (0, 0))
    assert len(open_images(str(tmp_path / "000.tar"), "train")) == 4  # one of each class is the test split


def shard_of(tmp_path: Path, *members: tuple[str, str]) -> str:
    """A shard of images and texts, by member name; the text of an image is ignored."""
    draw(tmp_path / "image.jpg", 0)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, text in members:
            (tmp_path / "text").write_text(text)
            tar.add(tmp_path / ("image.jpg" if name.endswith(("jpg", "png")) else "text"), arcname=name)
    return str(tmp_path / "0.tar")


def members(images) -> list[str]:
    return [images.file(i).split(".tar/")[1] for i in range(len(images))]


def test_missing_label_drops_the_labels_and_says_so(tmp_path):
    images = open_images(shard_of(tmp_path, ("a.jpg", ""), ("b.jpg", ""), ("b.cls", "1")), "train")
    assert len(images) == 2 and images.labels is None and images.note.endswith("a.jpg has none")


def test_text_labels_are_classes(tmp_path):
    files = [(f"{i}.{kind}", ("cat", "dog")[i % 2]) for i in range(4) for kind in ("jpg", "cls")]
    images = open_images(shard_of(tmp_path, *files), "train")
    assert images.classes == ["cat", "dog"] and members(images) == ["2.jpg", "3.jpg"]
    assert images.labels.tolist() == [0, 1]


def test_labels_at_the_end_of_a_shard_belong_to_their_images(tmp_path):
    files = [(f"{i}.jpg", "") for i in range(4)] + [(f"{i}.cls", str(i % 2)) for i in range(4)]
    assert open_images(shard_of(tmp_path, *files), "train").labels.tolist() == [0, 1]


def test_images_whose_names_have_dots_are_members(tmp_path):
    names = ["IMG.2024.01.jpg", "photo.jpg", "IMG.2024.02.jpg", "sample.input.jpg"]
    images = open_images(shard_of(tmp_path, *((name, "") for name in names)), "train")
    assert sorted(members(images)) == sorted(names)


def test_further_images_of_a_sample_are_named(tmp_path):
    images = open_images(shard_of(tmp_path, ("a.jpg", ""), ("a.mask.png", ""), ("b.png", ""), ("b.jpg", "")), "train")
    assert members(images) == ["a.jpg", "b.png"]
    assert images.note == "left out: 2 further images of samples, such as a.mask.png"


def test_members_that_are_not_used_are_counted(tmp_path):
    images = open_images(shard_of(tmp_path, ("a.jpg", ""), ("a.json", "{}"), ("b.jpg", ""), ("b.txt", "x")), "train")
    assert images.labels is None and images.note == "left out: 1 files ending in .json, 1 files ending in .txt"


def test_folders_in_a_shard_without_labels_are_noted(tmp_path):
    images = open_images(shard_of(tmp_path, ("cat/a.jpg", ""), ("dog/b.jpg", "")), "train")
    assert images.labels is None and images.note == "no labels: folders in shards are no classes"


def test_appended_samples_with_equal_names_are_kept(tmp_path):
    files = [("0.jpg", ""), ("0.cls", "0"), ("1.jpg", ""), ("1.cls", "0"), ("0.jpg", ""), ("0.cls", "1")]
    shard = shard_of(tmp_path, *files, ("2.jpg", ""), ("2.cls", "1"))
    train, test = (open_images(shard, split) for split in ("train", "test"))
    assert (members(train), train.labels.tolist()) == (["1.jpg", "2.jpg"], [0, 1])
    assert (members(test), test.labels.tolist()) == (["0.jpg", "0.jpg"], [0, 1])


def test_files_of_macos_are_ignored(tmp_path):
    images = open_images(shard_of(tmp_path, ("._a.jpg", ""), ("a.jpg", ""), ("__MACOSX/._b.jpg", "")), "train")
    assert members(images) == ["a.jpg"]


@pytest.mark.parametrize(("labels", "note"), [(("-1", "-1", "-1"), "has none"), (("x", "y", "z"), "another one")])
def test_labels_that_name_no_classes_are_dropped_with_a_note(tmp_path, labels, note):
    files = [(f"{i}.{kind}", label) for i, label in enumerate(labels) for kind in ("jpg", "cls")]
    for split in ("train", "test"):
        images = open_images(shard_of(tmp_path, *files), split)
        assert images.labels is None and images.note.startswith("no labels") and note in images.note


def test_large_numbers_are_names_of_classes(tmp_path):
    files = [(f"{i}.{kind}", ("99999999999", "7")[i % 2]) for i in range(4) for kind in ("jpg", "cls")]
    assert open_images(shard_of(tmp_path, *files), "train").classes == ["7", "99999999999"]


def split_shards(tmp_path: Path, train: str, test: str) -> None:
    names = [("cat", "dog", "cat", "dog"), ("dog", "dog")]
    for target, labels in zip((train, test), names, strict=True):
        files = [(f"{i}.{kind}", label) for i, label in enumerate(labels) for kind in ("jpg", "cls")]
        shard = shard_of(tmp_path, *files)
        (tmp_path / "set" / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(shard, tmp_path / "set" / target)


@pytest.mark.parametrize(
    ("train", "test"),
    [("train-000.tar", "val-000.tar"), ("train/0.tar", "validation/0.tar"), ("0.tar", "test/0.tar")],
)
def test_split_of_shards_follows_their_names_or_folders(tmp_path, train, test):
    split_shards(tmp_path, train, test)
    images, tests = (open_images(str(tmp_path / "set"), split) for split in ("train", "test"))
    assert (images.classes, images.labels.tolist()) == (["cat", "dog"], [0, 1, 0, 1])
    assert (tests.classes, tests.labels.tolist()) == (["cat", "dog"], [1, 1]), "numbered as in the training shards"


def test_patterns_join_lists_and_refuse_empty_ranges(tmp_path):
    split_shards(tmp_path, "a.tar", "b.tar")
    assert len(webdataset.expand(f"{tmp_path}/set/a.tar::{tmp_path}/set/b.tar")) == 2
    assert "ranges go up" in error_of(f"{tmp_path}/set/{{9..0}}.tar")


def test_empty_shards_are_read_and_other_files_are_named(tmp_path):
    shard_of(tmp_path, ("a.jpg", ""), ("b.jpg", ""))
    tarfile.open(tmp_path / "1.tar", "w").close()
    assert len(open_images(f"{tmp_path}/*.tar", "train")) == 2
    (tmp_path / "1.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "no tar file, it is a pointer of Git LFS" in error_of(f"{tmp_path}/*.tar")


def test_compressed_shards_are_refused_with_the_reason(tmp_path):
    shard = Path(shard_of(tmp_path, ("a.jpg", "")))
    compressed = gzip.compress(shard.read_bytes())
    for name in ("1.tar", "1.tar.gz"):
        (tmp_path / name).write_bytes(compressed)
        assert "compressed with gzip" in error_of(tmp_path / name)


def test_tar_file_beside_class_folders_is_ignored(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    with tarfile.open(tmp_path / "images" / "backup.tar", "w"):
        pass
    assert len(open_images(str(tmp_path / "images"), "train")) == 23


def test_shard_truncated_during_a_run_is_named(written, tmp_path):
    shutil.copy(written / "000.tar", tmp_path)
    images = open_images(str(tmp_path / "000.tar"), "train")
    with open(tmp_path / "000.tar", "r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=r"000\.tar.*truncated"):
        images.load(0)
    (tmp_path / "000.tar").unlink()
    with pytest.raises(InputError, match=r"000\.tar"):
        images.load(0)


# writing


run = partial(run_command, command)


def test_command_writes_shards_and_refuses_an_existing_folder(folder, tmp_path, capsys):
    assert run("--data", folder, "--out", tmp_path / "a" / "b", "--shards", 2) == 0
    assert f"wrote 27 images to {tmp_path / 'a' / 'b'}" in capsys.readouterr().out
    assert run("--data", folder, "--out", tmp_path / "a" / "b") == 2
    assert "exists already" in capsys.readouterr().err
    assert run("--out", tmp_path / "c") == 2
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_unreadable_images_are_left_out_and_named(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "train" / "cat" / "04.jpg").write_bytes(b"\xff\xd8 no image")
    assert run("--data", tmp_path / "images", "--out", tmp_path / "out") == 2
    assert "04.jpg" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    assert run("--data", tmp_path / "images", "--out", tmp_path / "out", "--max-bad-images", 1) == 0
    printed = capsys.readouterr().out
    assert "04.jpg" in printed and "wrote 26 images" in printed
    assert len(open_images(str(tmp_path / "out"), "train")) == 22


def test_images_in_memory_are_written_as_png(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    images = ArrayDataset("drawn", "drawn's split", pixels, torch.arange(6) % 2, ["a", "b"])
    monkeypatch.setattr(command, "open_images", lambda name, split: images)
    write_shards(ShardOptions(data="drawn", out=str(tmp_path / "out"), shards=2))
    found = open_images(str(tmp_path / "out"), "train")
    assert found.classes == ["a", "b"] and found.file(0).endswith(".png")
    expected = {pixels[i].tobytes(): i % 2 for i in range(6)}
    assert {np.asarray(found.load(i)).tobytes(): int(found.labels[i]) for i in range(6)} == expected


def test_images_with_more_than_8_bits_are_written_unchanged(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            values = np.full((4, 5), -0.5, np.float32)
            Image.fromarray(values).save(tmp_path / "images" / name / f"{i}.tif")
    assert write_shards(ShardOptions(data=str(tmp_path / "images"), out=str(tmp_path / "out"), shards=1)) == 4


def test_interrupted_writing_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupt(images, i, load=command._file):
        if i == 5:
            raise KeyboardInterrupt
        return load(images, i)

    monkeypatch.setattr(command, "_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shards(ShardOptions(data=str(folder), out=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of a given size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_full_disk_leaves_nothing(folder, disk, capsys, size):
    """The disk is full in the first shard or in a later one."""
    small = disk(size)
    assert run("--data", folder, "--out", small / "out", "--shards", 4) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(small.iterdir()) == []


@pytest.mark.parametrize(
    "allowed, message", [(0, "cannot write to"), (700, "nothing was kept"), (12_000, "nothing was kept")]
)
def test_a_write_that_fails_leaves_nothing(folder, tmp_path, capsys, allowed, message):
    """Limits the file size instead of filling a disk, which needs root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
    try:
        code = run("--data", folder, "--out", tmp_path / "out", "--shards", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
