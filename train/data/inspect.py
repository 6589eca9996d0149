"""`python -m train.data.inspect`: show the pixels and views of images, and compare the views of the backends."""

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
from ..config import PixelOptions
from ..run.interruption import NOTHING
from ..run.options import check_options, count, option
from ..run.tables import Table
from .backends import choose_backend, open_batches
from .bad_images import BadImages
from .datasets import open_images
from .datasets.images import ImageDataset, Subset
from .datasets.pixels import PixelFormat
from .pixel_options import read_as, resolve_pixels
from .sampler import EpochSampler
from .views.augmentation import OPERATIONS, ViewSpec, byol, only

DESCRIPTION = """\
Print the channels, range, mean and std that dspnet-pretrain would use for a set of images. Compute two views of some
images with every backend, from the same parameters, and compare them pixel by pixel with those of the first backend:
each operation alone, the colour jitter in random order, and everything together.
Writes OUT/views.png, OUT/differences.md and OUT/differences.json. Of images with other than one or three channels
views.png shows the first channel, or the first three as RGB."""
EXAMPLE = """\
  dspnet-inspect --data photos --backends torchvision,dali-cpu --out runs/views"""

EVERYTHING = "everything"
EIGHT_BIT_RGB = PixelFormat()
HEADER = 16  # pixels above the images, for the names of the backends


@dataclass(kw_only=True)
class InspectOptions(PixelOptions):
    """Options of `train.data.inspect`."""

    data: str = option("fashion-mnist", "images, as in dspnet-pretrain", metavar="IMAGES")
    backends: str | None = option(
        None,
        "backends to compare; the first is the reference [torchvision,dali-cpu; torchvision alone if not 8-bit]",
        metavar="NAMES",
    )
    out: str = option("", "folder for the results", metavar="DIR")
    image_size: int = count(128, "height and width of the views, in pixels")
    images: int = count(64, "images to compare, drawn at random")
    rows: int = count(8, "images in views.png")
    seed: int = option(0, "seed of the images and the views")


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


def compute_views(
    backend: str,
    images: ImageDataset,
    specs: tuple[ViewSpec, ViewSpec],
    seed: int,
    format: PixelFormat = EIGHT_BIT_RGB,
) -> torch.Tensor:
    """Compute both views of all images, in the order of epoch 0.

    Args:
        backend: one of `BACKENDS`.
        images: the dataset.
        specs: the distributions of the two views.
        seed: of the order and the parameters.
        format: of the images.

    Returns:
        uint8 [2, N, 3, S, S]; 0 and 255 are the ends of the range.

    Raises:
        InputError: an image cannot be read.
    """
    device = torch.device("cuda" if backend == "dali-gpu" else "cpu")
    sampler = EpochSampler(len(images), len(images), seed, epochs=1)
    (batch,) = open_batches(backend, images, specs, sampler, 0, BadImages(), device)
    if batch.is_floating_point():
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (format.mean, format.std))
        batch = ((batch.cpu() * deviation + mean) * 255).round().clamp(0, 255).byte()
    shown = batch.cpu()[:, : 3 if format.channels >= 3 else 1]
    return torch.stack(shown.expand(-1, 3, -1, -1).chunk(2))


def compare(
    backends: Sequence[str], images: ImageDataset, image_size: int, seed: int, format: PixelFormat = EIGHT_BIT_RGB
) -> list[Difference]:
    """Compare every backend with the first, for each operation and for everything together."""
    differences = []
    whole = byol(image_size)
    for operation in (*OPERATIONS, EVERYTHING):
        specs = whole if operation == EVERYTHING else (only(whole[0], operation), only(whole[1], operation))
        reference = compute_views(backends[0], images, specs, seed, format).float()
        for backend in backends[1:]:
            difference = compute_views(backend, images, specs, seed, format).float() - reference
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


def view_grid(
    backends: Sequence[str], images: ImageDataset, image_size: int, seed: int, format: PixelFormat = EIGHT_BIT_RGB
) -> Image.Image:
    """Return a picture with a row for each image and two columns, one for each view, for each backend."""
    made = [compute_views(backend, images, byol(image_size), seed, format) for backend in backends]
    columns = torch.cat([pair for both in made for pair in both.unsqueeze(0)])  # 2 * backends, N, 3, S, S
    grid = columns.permute(1, 3, 0, 4, 2).reshape(len(images) * image_size, len(columns) * image_size, 3)
    result = Image.new("RGB", (grid.shape[1], grid.shape[0] + HEADER), "white")
    result.paste(Image.fromarray(grid.numpy()), (0, HEADER))
    pen = ImageDraw.Draw(result)
    for k, backend in enumerate(backends):
        pen.text((2 * k * image_size + 2, 2), backend, fill="black")
    return result


def difference_table(differences: Sequence[Difference], reference: str) -> Table:
    """The differences from the backend `reference`."""
    rows = [
        [d.operation, d.backend, f"{d.mean:.2f}", f"{d.quantile:.0f}", f"{d.largest:.0f}", f"{d.shift:+.2f}"]
        for d in differences
    ]
    title = f"Difference from {reference} in grey levels (of 255), over all pixels of both views:"
    return Table(title, ["operation", "backend", "mean", "99 % within", "largest", "change of brightness"], rows)


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("inspect", DESCRIPTION, EXAMPLE, "[options] --out DIR")
    cli.add_options(parser, InspectOptions)
    options = cli.to_config(InspectOptions, parser.parse_args(argv))
    check_options(options)
    if not options.out:
        raise InputError("--out is missing: name a folder for the results, such as --out runs/views")
    atomic.check_writable(Path(options.out))
    images = open_images(options.data, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    format = PixelFormat.of(resolve_pixels(options, images))
    print(f"pixels  {format.describe()}")
    given = options.backends or ("torchvision,dali-cpu" if format.eight_bit else "torchvision")
    backends = [choose_backend(name.strip(), images, device, format.eight_bit) for name in given.split(",")]
    images = read_as(images, format)
    images = Subset.up_to(options.images, images, options.seed)
    differences = compare(backends, images, options.image_size, options.seed, format)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    shown = Subset(images, range(min(options.rows, len(images))))
    grid = view_grid(backends, shown, options.image_size, options.seed, format)
    atomic.write_atomically(out / "views.png", lambda path: grid.save(path, "png"))
    text = f"{backends[0]} alone: nothing to compare\n"
    if differences:
        text = difference_table(differences, backends[0]).markdown()
    atomic.write_text(out / "differences.md", text)
    atomic.write_text(out / "differences.json", json.dumps([asdict(d) for d in differences], indent=2) + "\n")
    print(text)
    print(f"{out}: views.png, differences.md, differences.json")


main = cli.command(_main, interrupted=NOTHING)

if __name__ == "__main__":
    main()
