"""`python -m train.data.inspect`: what the backends make of the same draws, as a picture and as numbers."""

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
from .datasets.images import ImageSet, Subset
from .normalization import MEAN, STD
from .sampler import EpochSampler
from .views.augmentation import OPERATIONS, ViewSpec, byol, only

DESCRIPTION = """\
Draw the two views of some images once, have every backend carry the draws out, and compare them pixel by pixel with the
first backend named: each operation alone, the four of the colour jitter in random order, and everything together.
Writes OUT/views.png, OUT/differences.md and OUT/differences.json."""
EXAMPLE = """\
  dspnet-inspect --data photos --backends torchvision,dali-cpu --out runs/views"""

EVERYTHING = "everything"
MARGIN = 16  # pixels above the picture, for the names


@dataclass(kw_only=True)
class InspectOptions:
    """Options of `train.data.inspect`."""

    data: str = option("fashion-mnist", "set of images, as in dspnet-pretrain")
    backends: str = option("torchvision,dali-cpu", "backends to compare, the first with each of the others")
    out: str = option("", "folder for the picture and the table")
    image_size: int = option(128, "height and width of the views, in pixels")
    images: int = option(64, "images that are compared, drawn at random")
    rows: int = option(8, "images in the picture")
    seed: int = option(0, "seed of all draws")


@dataclass(frozen=True)
class Difference:
    """Of the bytes of two backends: in grey levels, over all pixels of both views of all images."""

    operation: str
    backend: str
    mean: float  # of the absolute difference
    quantile: float  # 99 % of pixels are no further apart
    largest: float
    shift: float  # of the mean brightness: backend less reference


def views(backend: str, images: ImageSet, specs: tuple[ViewSpec, ViewSpec], seed: int) -> torch.Tensor:
    """Both views of all images in order of epoch 0, uint8 [2, N, 3, S, S]; InputError if an image cannot be used."""
    device = torch.device("cuda" if backend == "dali-gpu" else "cpu")
    order = EpochSampler(len(images), len(images), seed, epochs=1)
    (batch,) = open_batches(backend, images, specs, order, 0, BadImages(), device)
    if batch.is_floating_point():
        centre, spread = (torch.tensor(values, device=batch.device).view(3, 1, 1) for values in (MEAN, STD))
        batch = ((batch * spread + centre) * 255).round().clamp(0, 255).byte()
    batch = batch.cpu().expand(-1, 3, -1, -1)
    return torch.stack(batch.chunk(2))


def compare(backends: Sequence[str], images: ImageSet, image_size: int, seed: int) -> list[Difference]:
    """Every operation of the specification, by every backend but the first, against the first."""
    differences = []
    whole = byol(image_size)
    for operation in (*OPERATIONS, EVERYTHING):
        specs = whole if operation == EVERYTHING else (only(whole[0], operation), only(whole[1], operation))
        reference = views(backends[0], images, specs, seed).float()
        for backend in backends[1:]:
            apart = views(backend, images, specs, seed).float() - reference
            size = apart.abs().flatten()
            differences.append(
                Difference(
                    operation,
                    backend,
                    mean=round(size.mean().item(), 3),
                    quantile=float(np.quantile(size.numpy(), 0.99)),
                    largest=size.max().item(),
                    shift=round(apart.mean().item(), 3),
                )
            )
    return differences


def picture(backends: Sequence[str], images: ImageSet, image_size: int, seed: int) -> Image.Image:
    """A row for each image; for each backend its first and second view."""
    made = [views(backend, images, byol(image_size), seed) for backend in backends]
    columns = torch.cat([pair for both in made for pair in both.unsqueeze(0)])  # 2 * backends, N, 3, S, S
    grid = columns.permute(1, 3, 0, 4, 2).reshape(len(images) * image_size, len(columns) * image_size, 3)
    result = Image.new("RGB", (grid.shape[1], grid.shape[0] + MARGIN), "white")
    result.paste(Image.fromarray(grid.numpy()), (0, MARGIN))
    pen = ImageDraw.Draw(result)
    for k, backend in enumerate(backends):
        pen.text((2 * k * image_size + 2, 2), backend, fill="black")
    return result


def table(differences: Sequence[Difference], reference: str) -> str:
    """Markdown."""
    lines = [
        f"Grey levels (of 255) from {reference}, over all pixels of both views:",
        "",
        "| operation | backend | mean | 99 % within | largest | brighter by |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for d in differences:
        row = f"{d.operation} | {d.backend} | {d.mean:.2f} | {d.quantile:.0f} | {d.largest:.0f} | {d.shift:+.2f}"
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("inspect", DESCRIPTION, EXAMPLE)
    cli.add_options(parser, InspectOptions)
    options = cli.to_config(InspectOptions, parser.parse_args(argv))
    if not options.out:
        raise InputError("--out is missing: name a folder for the picture and the table")
    images = open_images(options.data, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name.strip() for name in options.backends.split(",")]
    backends = [choose_backend(name, images, device) for name in names]
    images = Subset.random(images, min(options.images, len(images)), options.seed)
    differences = compare(backends, images, options.image_size, options.seed)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    shown = Subset(images, range(min(options.rows, len(images))))
    grid = picture(backends, shown, options.image_size, options.seed)
    atomic.write_atomically(out / "views.png", lambda path: grid.save(path, "png"))
    text = table(differences, backends[0])
    atomic.write_text(out / "differences.md", text)
    atomic.write_text(out / "differences.json", json.dumps([asdict(d) for d in differences], indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
