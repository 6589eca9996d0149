"""Image files for the tests of datasets, and the error of a dataset."""

from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from dspnet_fast.errors import InputError
from train.data.datasets import open_images


def draw(path: Path, value: int = 0, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


def error_of(name: Path | str, split: Literal["train", "test"] = "train") -> str:
    with pytest.raises(InputError) as caught:
        open_images(str(name), split)
    message = str(caught.value)
    assert "\n" not in message
    return message
