"""Pretrain a family of networks from Python, export it, and search images with its features.

    python examples/pretrain_family.py [OUT]

The images are drawn here: coloured discs, squares and stripes. Real use differs in `data`, `network`, `dns` and
`epochs` only: see `dspnet-pretrain --help`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from dspnet_fast.train.embed import embed
from dspnet_fast.train.export import export
from dspnet_fast.train.pretrain import PretrainConfig, pretrain
from PIL import Image

import dspnet_fast.exported

SHAPES = ("disc", "square", "stripes")


def draw(shape: str, random: np.random.Generator, size: int = 32) -> Image.Image:
    """An image of a shape at a random place, in random colours."""
    background, colour = random.integers(0, 256, (2, 3))
    y, x = np.mgrid[:size, :size] - random.integers(size // 4, 3 * size // 4, (2, 1, 1))
    mask = {"disc": x**2 + y**2 < 49, "square": np.maximum(abs(x), abs(y)) < 7, "stripes": x % 6 < 3}[shape]
    return Image.fromarray(np.where(mask[..., None], colour, background).astype(np.uint8))


def main(out: Path) -> None:
    """Draw 600 images, pretrain for 90 steps, export, and look for each image's most similar one."""
    random = np.random.default_rng(0)
    files, labels = [], []
    for shape in SHAPES:
        (out / "images" / shape).mkdir(parents=True)
        for i in range(200):
            files.append(out / "images" / shape / f"{i:03}.png")
            labels.append(shape)
            draw(shape, random).save(files[-1])

    config = PretrainConfig(
        data=str(out / "images"),
        network="resnet",
        stem="small",
        dns="c8-d1111,c16-d1111",  # two networks: 8 and 16 channels in the first stage
        image_size=16,
        hidden_features=64,
        out_features=32,
        batch_size=60,
        epochs=10,
        warmup_epochs=1,
        base_lr=1.0,
        fast_kernels=True,
        workers=0,
        out=str(out / "run"),
    )
    run = pretrain(config)

    for folder in export(run):
        network = dspnet_fast.exported.load(folder)  # an ordinary torch.nn.Module
        features = torch.from_numpy(embed(folder, files))  # [600, F]
        similarity = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(features).T
        nearest = similarity.fill_diagonal_(-1).argmax(1).tolist()
        hits = sum(labels[i] == labels[n] for i, n in enumerate(nearest)) / len(files)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"{folder.name}: {parameters:,} parameters, the most similar image has the same shape in {hits:.0%}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
