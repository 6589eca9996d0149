"""`python -m train.data.inspect`: compare the views that the backends compute from the same parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dspnet_fast import atomic
from dspnet_fast.errors import InputError

from .. import cli
from ..config import option
from .backends import choose_backend, open_batches
from .bad_images import BadImages
from .datasets import open_images
from .datasets.images import ImageDataset, Subset
from .normalization import MEAN, STD
from .sampler import EpochSampler
from .views.augmentation import OPERATIONS, ViewSpec, byol, only

DESCRIPTION = """\
Compute two views of some images with every backend, from the same parameters, and compare them pixel by pixel with
those of the first backend: each operation alone, the colour jitter in random order, and everything together.
Writes OUT/views.png, OUT/differences.md and OUT/differences.json."""
EXAMPLE = """\
  dspnet-inspect --data photos --backends torchvision,dali-cpu --out runs/views"""

EVERYTHING = "everything"
HEADER = 16  # pixels above the images, for the names of the backends


@dataclass(kw_only=True)
class InspectOptions:
    """Options of `train.data.inspect`."""

    data: str = option("fashion-mnist", "image dataset, as in dspnet-pretrain")
    backends: str = option("torchvision,dali-cpu", "backends to compare; the first is the reference")
    out: str = option("", "output folder")
    image_size: int = option(128, "height and width of the views in pixels")
    images: int = option(64, "images to compare, chosen at random")
    rows: int = option(8, "images in views.png")
    seed: int = option(0, "random seed")


@dataclass(frozen=True)
class Difference:
    """Difference between the pixels of two backends in grey levels, over both views of all images.

    Attributes:
        operation: one of `OPERATIONS`, or `EVERYTHING`.
        backend: compared with the reference.
        mean: of the absolute difference.
        quantile: the 99th percentile of the absolute difference.
        largest: absolute difference.
        shift: mean of the backend minus mean of the reference.
    """

    operation: str
    backend: str
    mean: float
    quantile: float
    largest: float
    shift: float


def compute_views(backend: str, images: ImageDataset, specs: tuple[ViewSpec, ViewSpec], seed: int) -> torch.Tensor:
    """Compute both views of all images, in the order of epoch 0.

    Args:
        backend: one of `BACKENDS`.
        images: the dataset.
        specs: the distributions of the two views.
        seed: of the order and the parameters.

    Returns:
        uint8 [2, N, 3, S, S].

    Raises:
        InputError: an image cannot be read.
    """
    device = torch.device("cuda" if backend == "dali-gpu" else "cpu")
    sampler = EpochSampler(len(images), len(images), seed, epochs=1)
    (batch,) = open_batches(backend, images, specs, sampler, 0, BadImages(), device)
    if batch.is_floating_point():
        mean, deviation = (torch.tensor(values, device=batch.device).view(3, 1, 1) for values in (MEAN, STD))
        batch = ((batch * deviation + mean) * 255).round().clamp(0, 255).byte()
    batch = batch.cpu().expand(-1, 3, -1, -1)
    return torch.stack(batch.chunk(2))


def compare(backends: Sequence[str], images: ImageDataset, image_size: int, seed: int) -> list[Difference]:
    """Compare every backend with the first, for each operation and for everything together."""
    differences = []
    whole = byol(image_size)
    for operation in (*OPERATIONS, EVERYTHING):
        specs = whole if operation == EVERYTHING else (only(whole[0], operation), only(whole[1], operation))
        reference = compute_views(backends[0], images, specs, seed).float()
        for backend in backends[1:]:
            difference = compute_views(backend, images, specs, seed).float() - reference
            absolute = difference.abs().flatten()
            differences.append(
                Difference(
                    operation,
                    backend,
                    mean=round(absolute.mean().item(), 3),
                    quantile=float(np.quantile(absolute.numpy(), 0.99)),
                    largest=absolute.max().item(),
                    shift=round(difference.mean().item(), 3),
                )
            )
    return differences


def view_grid(backends: Sequence[str], images: ImageDataset, image_size: int, seed: int) -> Image.Image:
    """Return a picture with a row for each image and two columns, one for each view, for each backend."""
    made = [compute_views(backend, images, byol(image_size), seed) for backend in backends]
    columns = torch.cat([pair for both in made for pair in both.unsqueeze(0)])  # 2 * backends, N, 3, S, S
    grid = columns.permute(1, 3, 0, 4, 2).reshape(len(images) * image_size, len(columns) * image_size, 3)
    result = Image.new("RGB", (grid.shape[1], grid.shape[0] + HEADER), "white")
    result.paste(Image.fromarray(grid.numpy()), (0, HEADER))
    pen = ImageDraw.Draw(result)
    for k, backend in enumerate(backends):
        pen.text((2 * k * image_size + 2, 2), backend, fill="black")
    return result


def markdown_table(differences: Sequence[Difference], reference: str) -> str:
    """Return the differences from the backend `reference` as a Markdown table."""
    lines = [
        f"Difference from {reference} in grey levels (of 255), over all pixels of both views:",
        "",
        "| operation | backend | mean | 99 % within | largest | change of brightness |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for d in differences:
        row = f"{d.operation} | {d.backend} | {d.mean:.2f} | {d.quantile:.0f} | {d.largest:.0f} | {d.shift:+.2f}"
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the arguments `argv`, by default those of the process."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("inspect", DESCRIPTION, EXAMPLE)
    cli.add_options(parser, InspectOptions)
    options = cli.to_config(InspectOptions, parser.parse_args(argv))
    if not options.out:
        raise InputError("--out is missing: give an output folder")
    atomic.check_writable(Path(options.out))
    images = open_images(options.data, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name.strip() for name in options.backends.split(",")]
    backends = [choose_backend(name, images, device) for name in names]
    images = Subset.random(images, min(options.images, len(images)), options.seed)
    differences = compare(backends, images, options.image_size, options.seed)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    shown = Subset(images, range(min(options.rows, len(images))))
    grid = view_grid(backends, shown, options.image_size, options.seed)
    atomic.write_atomically(out / "views.png", lambda path: grid.save(path, "png"))
    text = markdown_table(differences, backends[0])
    atomic.write_text(out / "differences.md", text)
    atomic.write_text(out / "differences.json", json.dumps([asdict(d) for d in differences], indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
