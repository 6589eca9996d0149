"""Each image once per epoch, for every backend, kind of dataset and number of ranks, also after resuming."""

import importlib.util
import itertools
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.backends import open_batches
from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.data.sampler import EpochSampler
from train.data.shard import ShardOptions, write_shards
from train.data.views.augmentation import byol, only

IMAGES, BATCH, EPOCHS = 20, 4, 2
STEPS = IMAGES // BATCH
STOP = STEPS + 2  # in the middle of the second epoch
VIEWS = tuple(only(view, "resize") for view in byol(16))  # crops only, so that the images can be recognised

has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
backends = pytest.mark.parametrize(
    "backend",
    ["torchvision", pytest.param("dali-cpu", marks=pytest.mark.skipif(not has_dali, reason="DALI is not installed"))],
)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The same images in three formats. Each has a different grey level, 10 apart, and slight noise."""
    path = tmp_path_factory.mktemp("sets")
    noise = np.random.default_rng(0).integers(-3, 4, (IMAGES, 28, 28))
    pixels = (noise + 10 * np.arange(IMAGES)[:, None, None] + 30).astype(np.uint8)
    (path / "folder").mkdir()
    for k in range(IMAGES):
        Image.fromarray(pixels[k]).convert("RGB").save(path / "folder" / f"{k:02}{('.jpg', '.png')[k % 2]}", quality=95)
    write_shards(ShardOptions(data=str(path / "folder"), out=str(path / "shards"), shards=3))
    named = path / "data" / "fashion-mnist"
    named.mkdir(parents=True)
    for name, values in (("images-idx3", pixels), ("labels-idx1", np.arange(IMAGES, dtype=np.uint8) % 10)):
        header = struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape)
        (named / f"train-{name}-ubyte").write_bytes(header + values.tobytes())
    return path


def identify(batch: torch.Tensor) -> list[int]:
    """Return the images in a batch, and check that both views agree."""
    found = ((batch.float().mean((1, 2, 3)) - 30) / 10).round().int()
    first, second = found.chunk(2)
    assert torch.equal(first, second)
    return first.tolist()


@backends
@pytest.mark.parametrize("kind", ["folder", "shards", "fashion-mnist"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_within_an_epoch_continues_the_order(datasets, monkeypatch, backend, kind, ranks):
    """The batches equal those of an uninterrupted run bit for bit."""
    monkeypatch.setenv("DSPNET_DATA", str(datasets / "data"))
    names = {"folder": str(datasets / "folder"), "shards": f"{datasets}/shards/{{000..002}}.tar"}
    images = open_images(names.get(kind, kind), "train")

    def batches(rank: int, start: int = 0):
        order = EpochSampler(len(images), BATCH, 1, EPOCHS, start, rank, ranks)
        return iter(open_batches(backend, images, VIEWS, order, 0, BadImages(), torch.device("cpu")))

    seen: list[list[int]] = [[] for _ in range(EPOCHS)]
    for rank in range(ranks):
        interrupted = batches(rank)
        found = list(itertools.islice(interrupted, STOP))
        interrupted.close()  # discards prefetched batches
        found += batches(rank, STOP)
        whole = list(batches(rank))
        assert len(found) == len(whole) == EPOCHS * STEPS
        assert all(torch.equal(one, other) for one, other in zip(found, whole))
        for step, batch in enumerate(found):
            seen[step // STEPS] += identify(batch)
    for of_epoch in seen:
        assert sorted(of_epoch) == list(range(IMAGES))
    assert seen[0] != seen[1]
