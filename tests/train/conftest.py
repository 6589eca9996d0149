"""Fixtures: small image folders, small runs and features."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast.models import build, family
from dspnet_fast.statistics import post_statistics
from tests.commands import as_arguments
from tests.small_run import SMALL_RUN
from tests.train.coco_set import draw
from train.config import PretrainConfig
from train.data.datasets import coco, data_folder, open_images
from train.data.datasets.images import Subset
from train.data.loader import evaluation_batches
from train.data.normalization import normalize
from train.evaluation.features import extract
from train.pretraining.run import PretrainRun


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An image folder with two classes, blobs and stripes, of 40 training and 20 test images each."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for name in ("blobs", "stripes"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                y, x = np.mgrid[:16, :16] + random.uniform(0, 8, (2, 1, 1))
                wave = np.sin(y / 2) if name == "stripes" else np.sin(y / 2) * np.sin(x / 2)
                pixels = 128 + 100 * wave[..., None] * random.uniform(0.5, 1, 3) + random.normal(0, 10, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{index:03}.png")
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """Images of a bright square on stripes, with masks of the classes 0 and 3: 24 for training and 10 for tests."""
    root = tmp_path_factory.mktemp("masked")
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 10)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for k in range(count):
            mask = np.zeros((16, 16), np.uint8)
            top, left = random.integers(0, 8, 2)
            mask[top : top + 8, left : left + 8] = 3
            stripes = 90 + 40 * np.sin(np.arange(16))[:, None] + random.normal(0, 5, (16, 16))
            pixels = np.stack([np.where(mask > 0, 230, stripes)] * 3, -1).clip(0, 255)
            mask[:3] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / "images" / f"{k}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{k}.png")
    return root


@pytest.fixture
def small(images, tmp_path):
    """small(**options): the configuration of a small run."""

    def make(**options):
        return PretrainConfig(**{**SMALL_RUN, "data": str(images), "out": str(tmp_path / "run"), **options})

    return make


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """The directory of a finished small run, for reading only."""
    out = tmp_path_factory.mktemp("finished") / "run"
    PretrainRun(PretrainConfig(**{**SMALL_RUN, "data": str(images), "out": str(out)}), resume=False).run()
    return out


@pytest.fixture
def trained(finished, tmp_path):
    """A copy of the finished run, for writing."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("features", "evaluation"))


@pytest.fixture(scope="session")
def real_features():
    """Features for training and for testing: ({network: [N, F]}, labels [N]) each.

    Features of CIFAR-10 by untrained networks if the dataset exists locally, otherwise overlapping Gaussian classes.
    """
    dns = ["c8-d1111", "c16-d1111"]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not (data_folder() / "cifar10").is_dir():
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 10, (5000,), generator=generator)
        made = {}
        for name, size in zip(dns, (64, 128)):
            centres = torch.randn(10, size, generator=generator)
            made[name] = (centres[labels] + 5 * torch.randn(5000, size, generator=generator)).float()
        parts = (slice(3000), slice(3000, None))
        return [({name: rows[part] for name, rows in made.items()}, labels[part]) for part in parts]
    networks = family("resnet", dns)
    encoder = build("resnet", networks.full, "small")
    result = []
    for split, count in (("train", 3000), ("test", 2000)):
        images = Subset.random(open_images("cifar10", split), count, seed=0)
        batches = [normalize(batch) for batch in evaluation_batches(images, range(count), 16, 256, 0)]
        if split == "train":
            post_statistics(encoder, networks, batches)
        result.append((extract(encoder, networks, batches), images.labels))
    return result


@pytest.fixture
def arguments(images, tmp_path):
    """arguments(**options): the command line of a small run."""

    def make(**options):
        return as_arguments({**SMALL_RUN, "data": images, "out": tmp_path / "run", **options})

    return make


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
