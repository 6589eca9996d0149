"""Fixtures: one fork server, one run without faults, and a lab for each test."""

import shutil

import numpy as np
import pytest
from fault_lab import ForkServer, Lab
from PIL import Image


@pytest.fixture(scope="session")
def fork_server():
    made = ForkServer()
    yield made
    made.close()


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """A folder of 40 images."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(random.integers(0, 256, (14, 14, 3), dtype=np.uint8)).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="session")
def whole(fork_server, noise, tmp_path_factory):
    """The directory of a run without faults."""
    lab = Lab(fork_server, noise, tmp_path_factory.mktemp("none"), tmp_path_factory.mktemp("whole"))
    lab.run()
    return lab.out


@pytest.fixture
def lab(fork_server, noise, whole, tmp_path):
    return Lab(fork_server, shutil.copytree(noise, tmp_path / "images"), whole, tmp_path)
