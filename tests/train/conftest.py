"""Small images and small runs."""

import numpy as np
import pytest
from PIL import Image

from train.config import PretrainConfig
from train.pretrain import Pretraining

SMALL_RUN = {
    "network": "resnet",
    "dns": "c8-d1111,c8-d1121,c16-d2121",
    "stem": "small",
    "image_size": 12,
    "hidden_features": 16,
    "out_features": 8,
    "epochs": 2,
    "batch_size": 8,
    "subnets_per_step": 3,
    "base_lr": 4.0,
    "warmup_epochs": 0.5,
    "workers": 0,
    "probe_epochs": 1,
    "probe_images": 20,
    "log_steps": 1,
}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An image folder of two classes, stripes and blobs, 40 training and 20 test images each."""
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


@pytest.fixture
def small(images, tmp_path):
    """Make the configuration of a small run."""

    def make(**options):
        return PretrainConfig(**{**SMALL_RUN, "data": str(images), "out": str(tmp_path / "run"), **options})

    return make


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """The directory of a finished small run; other tests read it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    Pretraining(PretrainConfig(**{**SMALL_RUN, "data": str(images), "out": str(out)}), resume=False).run()
    return out


@pytest.fixture
def arguments(images, tmp_path):
    """Make the command line of a small run."""

    def make(**options):
        values = {**SMALL_RUN, "data": images, "out": tmp_path / "run", **options}
        return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]

    return make
