"""Choice of the data backend, and its error messages."""

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast.errors import InputError
from train.data import backends
from train.data.backends import choose_backend
from train.data.datasets import open_images

CPU = torch.device("cpu")


@pytest.fixture
def photographs(tmp_path):
    for k in range(4):
        pixels = np.random.default_rng(k).integers(0, 256, (130, 140, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.jpg")
    return open_images(str(tmp_path), "train")


@pytest.fixture
def installed(monkeypatch):
    def decide(available: bool) -> None:
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if available else None)

    return decide


def test_auto_chooses_dali_for_photographs(photographs, installed):
    installed(True)
    assert choose_backend("auto", photographs, CPU) == "dali-cpu"
    installed(False)
    assert choose_backend("auto", photographs, CPU) == "torchvision"


@pytest.mark.parametrize(("name", "size"), [("0.png", 200), ("0.jpg", 32)])
def test_auto_chooses_torchvision_for_other_images(installed, tmp_path, name, size):
    installed(True)
    Image.new("RGB", (size, size)).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert choose_backend("auto", open_images(str(tmp_path), "train"), CPU) == "torchvision"


def test_unavailable_backends_raise_input_error(photographs, installed):
    installed(False)
    for name in ("dali-cpu", "dali-gpu"):
        with pytest.raises(InputError, match=r"pip install 'dspnet-fast\[dali\]'"):
            choose_backend(name, photographs, CPU)
    installed(True)
    with pytest.raises(InputError, match="dali-gpu needs a CUDA device"):
        choose_backend("dali-gpu", photographs, CPU)
    assert choose_backend("torchvision", photographs, CPU) == "torchvision"


def test_dali_is_imported_only_if_chosen(run_python):
    code = "import sys, train.pretrain, train.data.inspect; print('nvidia.dali' in sys.modules)"
    assert run_python("-c", code).strip() == "False"
