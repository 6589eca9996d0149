"""Unusual and damaged files: every backend decodes them correctly or leaves them out and counts them by name."""

import importlib.util
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast.errors import InputError
from train.data.backends import open_batches
from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.data.sampler import EpochSampler
from train.data.views.augmentation import ViewSpec

SIZE = 64
WHOLE = ViewSpec(
    image_size=SIZE,
    min_scale=1.0,
    ratio=(1.0, 1.0),
    flip_probability=0.0,
    jitter_probability=0.0,
    grey_probability=0.0,
    blur_probability=0.0,
    blur_kernel=3,
    blur_sigma=(1.0, 1.0),
    solarize_probability=0.0,
)
has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
backends = pytest.mark.parametrize(
    "backend",
    ["torchvision", pytest.param("dali-cpu", marks=pytest.mark.skipif(not has_dali, reason="DALI is not installed"))],
)


def quarters() -> Image.Image:
    """A smooth image with another colour in each corner, so that rotations and swapped channels are detected."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1)
    return Image.fromarray(np.stack([255 * x, 255 * y, 128 * (1 - x * y)], axis=2).astype(np.uint8))


def save(path: Path, kind: str) -> None:
    image = quarters()
    if kind == "cmyk":
        image.convert("CMYK").save(path, "jpeg", quality=95)
    elif kind == "16 bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path, "png")
    elif kind == "grey jpeg":
        image.convert("L").save(path, "jpeg", quality=95)
    elif kind == "grey png":
        image.convert("L").save(path, "png")
    elif kind == "alpha":
        image.convert("RGBA").save(path, "png")
    elif kind == "palette":
        image.quantize(256).save(path, "png")
    elif kind == "animated":
        image.save(path, "webp", save_all=True, append_images=[Image.new("RGB", image.size)], quality=100)
    elif kind == "animated png":
        image.save(path, "png", save_all=True, append_images=[Image.new("RGB", image.size)])
    elif kind == "pages":
        image.save(path, "tiff", save_all=True, append_images=[Image.new("RGB", image.size)])
    elif kind == "16 bit tiff":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path, "tiff")
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn clockwise
        image.transpose(Image.Transpose.ROTATE_90).save(path, "jpeg", quality=95, exif=exif)
    elif kind == "turned png":
        exif = Image.Exif()
        exif[0x0112] = 3
        image.transpose(Image.Transpose.ROTATE_180).save(path, "png", exif=exif)
    elif kind == "exif, not turned":
        exif = Image.Exif()
        exif[0x0112] = 1
        image.save(path, "jpeg", quality=95, exif=exif)
    elif kind == "progressive":
        image.save(path, "jpeg", quality=95, progressive=True)
    elif kind == "trailing bytes":
        image.save(path, "jpeg", quality=95)
        path.write_bytes(path.read_bytes() + b"rest of something else")
    elif kind == "trailing zeros":
        image.save(path, "jpeg", quality=95)
        path.write_bytes(path.read_bytes() + b"\0" * 4096)
    elif kind == "png called jpg":
        image.save(path, "png")
    else:
        image.save(path, "jpeg", quality=95)


GOOD = {
    "plain": ".jpg",
    "cmyk": ".jpg",
    "16 bit": ".png",
    "grey jpeg": ".jpg",
    "grey png": ".png",
    "alpha": ".png",
    "palette": ".png",
    "animated": ".webp",
    "animated png": ".png",
    "pages": ".tif",
    "16 bit tiff": ".tif",
    "turned": ".jpg",
    "turned png": ".png",
    "exif, not turned": ".jpg",
    "progressive": ".jpg",
    "trailing bytes": ".jpg",
    "trailing zeros": ".jpg",
    "png called jpg": ".jpg",
}


def damage(path: Path, kind: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    image.save(path, "png" if path.suffix == ".png" else "jpeg", quality=95)
    content = path.read_bytes()
    half = len(content) // 2
    if kind == "empty":
        content = b""
    elif kind == "half":
        content = content[:half]
    elif kind == "half, with an end":
        content = content[:200] + b"\xff\xd9"
    elif kind == "no image":
        content = b"<html>404</html>"
    elif kind == "enormous":  # a header of 60,000 x 60,000 pixels
        header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        content = content[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    elif kind == "header only":
        content = content[:30]
    path.write_bytes(content)


BAD = {
    "empty": ".jpg",
    "half": ".jpg",
    "half png": ".png",
    "half, with an end": ".jpg",
    "no image": ".jpg",
    "enormous": ".png",
    "header only": ".png",
}


def tar(folder: Path, shard: Path) -> Path:
    """Pack the files of a folder into a shard without index and without checks."""
    with tarfile.open(shard, "w") as out:
        for path in sorted(folder.iterdir()):
            out.add(path, path.name)
    return shard


def batches(source: Path, backend: str, limit: int, batch_size: int, epochs: int = 1) -> tuple[list, BadImages]:
    images, bad = open_images(str(source), "train"), BadImages(limit)
    order = EpochSampler(len(images), batch_size, 0, epochs)
    made = open_batches(backend, images, (WHOLE, WHOLE), order, 0, bad, torch.device("cpu"))
    return list(made), bad


@backends
@pytest.mark.parametrize("kind", GOOD)
def test_unusual_files_are_decoded_correctly(tmp_path, backend, kind):
    save(tmp_path / f"0{GOOD[kind]}", kind)
    ((batch,), bad) = batches(tmp_path, backend, 0, 1)
    expected = quarters().convert("L").convert("RGB") if "grey" in kind or "16 bit" in kind else quarters()
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
    apart = (batch[0].expand(3, -1, -1).float() - expected).abs()
    assert apart.mean() < (12 if kind in ("cmyk", "palette") else 2), kind
    assert apart.max() < (60 if kind in ("cmyk", "palette", "animated") else 30)
    assert len(bad) == 0


@backends
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_files_are_left_out_and_counted_by_name(tmp_path, backend, sharded):
    """Every batch is full, and every damaged file is counted once in two epochs."""
    files = tmp_path / "files"
    files.mkdir()
    for k, kind in enumerate(BAD):
        damage(files / f"{k}-bad{BAD[kind]}", kind.removesuffix(" png"))
    for k, kind in enumerate(GOOD):
        save(files / f"{k}-good{GOOD[kind]}", kind)
    made, bad = batches(tar(files, tmp_path / "0.tar") if sharded else files, backend, len(BAD), 5, epochs=2)
    assert len(made) == 2 * ((len(BAD) + len(GOOD)) // 5) and all(batch.shape[0] == 10 for batch in made)
    news = [line for line in bad.new_messages() if "upper 8 bits" not in line]
    assert len(news) == len(bad) == len(BAD)
    for k, kind in enumerate(BAD):
        assert sum(f"{k}-bad{BAD[kind]}" in line for line in news) == 1, kind


@backends
def test_one_image_above_the_limit_raises_after_the_preceding_batches(tmp_path, backend):
    for k in range(8):
        save(tmp_path / f"{k}.jpg", "plain")
    order = [i for batch in EpochSampler(8, 2, 0, 1) for _, i in batch]
    (tmp_path / f"{order[5]}.jpg").write_bytes(b"")
    images = open_images(str(tmp_path), "train")
    bad = BadImages(0)
    made = open_batches(backend, images, (WHOLE, WHOLE), EpochSampler(8, 2, 0, 1), 0, bad, torch.device("cpu"))
    seen = []
    with pytest.raises(InputError, match=rf"{order[5]}\.jpg"):
        for batch in made:
            seen.append(batch)
    assert len(seen) == 2


@backends
def test_files_removed_during_a_run_are_left_out(tmp_path, backend):
    for k in range(40):
        save(tmp_path / f"{k:02}.jpg", "plain")
    images, bad = open_images(str(tmp_path), "train"), BadImages(3)
    order = EpochSampler(40, 4, 0, 3)
    made = iter(open_batches(backend, images, (WHOLE, WHOLE), order, 0, bad, torch.device("cpu")))
    next(made)
    for k in (3, 17, 29):
        (tmp_path / f"{k:02}.jpg").unlink()
    assert sum(1 for _ in made) == 29
    assert sorted(line.split("/")[-1].split(":")[0] for line in bad.new_messages()) == ["03.jpg", "17.jpg", "29.jpg"]
    shutil.rmtree(tmp_path)
    order = EpochSampler(40, 4, 0, 1)
    with pytest.raises(InputError, match="that is more than --max-bad-images 3"):
        list(open_batches(backend, images, (WHOLE, WHOLE), order, 0, BadImages(3), torch.device("cpu")))


@backends
def test_shards_damaged_during_a_run_are_left_out(tmp_path, backend):
    """One shard is removed and one truncated: their images are counted, and those of the third replace them."""
    for k in range(3):
        (tmp_path / f"files{k}").mkdir()
        for j in range(8):
            save(tmp_path / f"files{k}" / f"{k}{j}.jpg", "plain")
        tar(tmp_path / f"files{k}", tmp_path / f"{k}.tar")
    images, bad = open_images(f"{tmp_path}/{{0..2}}.tar", "train"), BadImages(16)
    order = EpochSampler(24, 4, 0, 2)
    made = iter(open_batches(backend, images, (WHOLE, WHOLE), order, 0, bad, torch.device("cpu")))
    next(made)
    (tmp_path / "0.tar").unlink()
    with open(tmp_path / "1.tar", "r+b") as shard:
        shard.truncate(100)
    assert sum(1 for _ in made) == 11
    assert sorted(bad.found) == [f"{tmp_path}/{k}.tar/{k}{j}.jpg" for k in (0, 1) for j in range(8)]
    (tmp_path / "2.tar").unlink()
    with pytest.raises(InputError, match="that is more than --max-bad-images 16"):
        list(open_batches(backend, images, (WHOLE, WHOLE), order, 0, BadImages(16), torch.device("cpu")))


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A folder with an image so large that Pillow warns, but opens it."""
    folder = tmp_path_factory.mktemp("huge")
    Image.new("RGB", (10_000, 9_500), (10, 200, 30)).save(folder / "0.jpg", quality=20)
    return folder


@backends
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_used(huge, backend):
    ((batch,), bad) = batches(huge, backend, 0, 1)
    assert len(bad) == 0
    assert (batch[0].float() - torch.tensor([10.0, 200, 30]).view(3, 1, 1)).abs().max() < 8
