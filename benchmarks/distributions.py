"""Do all backends draw from the same distribution? Means, histograms and spectra of many views, operation by operation.

Every backend makes `--samples` views of test photographs (benchmarks/data.py), each from a draw of its own: no backend
sees another's draws. The reference is torchvision's own random transforms. Compared are the mean and the standard
deviation of all pixels in grey levels, the histogram of 32 bins (total variation), and the power spectrum in 8 rings of
frequencies (largest difference of its logarithm, base 10, among rings that hold 1e-5 of the power or more).

Two halves of the reference are compared as well: what they differ by is chance. A backend passes if it differs by no
more than the bounds, and the exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from train import cli
from train.data.augmentation import OPERATIONS, ViewSpec, byol, only
from train.data.backends import choose_backend, open_batches
from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.data.images import ImageSet
from train.data.inspect import EVERYTHING
from train.data.sampler import EpochSampler
from train.run.progress import Monitor

from .data import photographs, transform

BINS, RINGS = 32, 8
FAINT = 1e-5
BOUNDS = {"mean": 2.0, "std": 2.0, "histogram": 0.03, "spectrum": 0.10}  # at 10,000 samples


@dataclass(frozen=True)
class Summary:
    """Sums over views, from which everything that is compared follows."""

    count: int
    histogram: Tensor  # int64 [256], of all channels
    power: Tensor  # float64 [RINGS], of the mean of the channels

    def __add__(self, other: Summary) -> Summary:
        return Summary(self.count + other.count, self.histogram + other.histogram, self.power + other.power)


def summarize(batch: Tensor) -> Summary:
    """Of uint8 [N, 3, S, S]."""
    size = batch.shape[-1]
    grey = batch.float().mean(1)
    spectrum = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    frequency = torch.fft.fftfreq(size).square()
    ring = ((frequency[:, None] + frequency).sqrt() * 2 * RINGS).long().clamp(max=RINGS - 1)
    power = torch.zeros(RINGS, dtype=torch.float64).index_add_(0, ring.flatten(), spectrum.flatten().double())
    return Summary(len(batch), torch.bincount(batch.flatten(), minlength=256), power * len(batch))


def differences(found: Summary, expected: Summary) -> dict[str, float]:
    """By the names of BOUNDS."""
    levels = torch.arange(256, dtype=torch.float64)
    shares = [summary.histogram.double() / summary.histogram.sum() for summary in (found, expected)]
    means = [(share * levels).sum() for share in shares]
    stds = [(share * (levels - mean).square()).sum().sqrt() for share, mean in zip(shares, means, strict=True)]
    bins = [share.view(BINS, -1).sum(1) for share in shares]
    powers = [summary.power / summary.count for summary in (found, expected)]
    strong = powers[1] >= FAINT * powers[1].sum()
    return {
        "mean": (means[0] - means[1]).abs().item(),
        "std": (stds[0] - stds[1]).abs().item(),
        "histogram": (bins[0] - bins[1]).abs().sum().item() / 2,
        "spectrum": (powers[0] / powers[1]).log10().abs()[strong].max().item(),
    }


def _total(batches: Iterable[Tensor]) -> Summary:
    total = None
    for batch in batches:
        summary = summarize(batch.expand(-1, 3, -1, -1))
        total = summary if total is None else total + summary
    assert total is not None
    return total


def of_backend(
    name: str, images: ImageSet, specs: tuple[ViewSpec, ViewSpec], samples: int, batch_size: int, seed: int
) -> Summary:
    """Of `samples` views, half of them by each specification."""
    order = EpochSampler(len(images), batch_size, seed, epochs=-(-samples // (2 * len(images))))
    return _total(open_batches(name, images, specs, order, 0, BadImages(), torch.device("cpu")))


def of_torchvision(images: ImageSet, specs: tuple[ViewSpec, ViewSpec], samples: int, batch_size: int) -> list[Summary]:
    """The same of torchvision's own transforms, in two halves, each of all images."""
    transforms = [transform(view, on_tensors=False) for view in specs]
    loaded = [images.load(i) for i in range(len(images))]
    steps = -(-samples // (4 * batch_size))
    halves = []
    for _ in range(2):
        chosen = (np.arange(batch_size) + batch_size * step for step in range(steps))
        halves.append(
            _total(
                torch.stack([view(loaded[k % len(loaded)]) for k in positions for view in transforms])
                for positions in chosen
            )
        )
    return halves


def measure(images: ImageSet, options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Differences by operation and backend."""
    names = [name.strip() for name in options.backends.split(",")]
    for name in names:
        choose_backend(name, images, torch.device("cpu"))
    whole = byol(options.image_size)
    results: dict[str, dict[str, dict[str, float]]] = {}
    operations = [name.strip() for name in options.operations.split(",")]
    with Monitor("distributions", len(operations), console=Console(stderr=True, highlight=False)) as monitor:
        for k, operation in enumerate(operations):
            specs = whole if operation == EVERYTHING else (only(whole[0], operation), only(whole[1], operation))
            halves = of_torchvision(images, specs, options.samples, options.batch_size)
            expected = halves[0] + halves[1]
            results[operation] = {"two halves of the reference": differences(*halves)}
            for place, name in enumerate(names):
                seed = options.seed + 100 * k + place
                found = of_backend(name, images, specs, options.samples, options.batch_size, seed)
                results[operation][name] = differences(found, expected)
            monitor.advance()
            monitor.status(operation)
    return results


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of images [the test photographs of benchmarks.data, 64 of them]")
    parser.add_argument("--backends", default="torchvision,dali-cpu", help="backends to test [%(default)s]")
    parser.add_argument(
        "--operations",
        default=",".join((*OPERATIONS, EVERYTHING)),
        help="what is compared [all, and everything]",
    )
    parser.add_argument("--samples", type=int, default=10_000, help="views of each [%(default)s]")
    parser.add_argument("--image-size", type=int, default=64, help="height and width of a view [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a batch [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of all draws [%(default)s]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    options = make_parser().parse_args(argv)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            photographs(Path(folder), 64, size=160)
        results = measure(open_images(options.data or folder, "train"), options)
    table = Table("operation", "backend", *(f"{name} (bound {bound})" for name, bound in BOUNDS.items()))
    failed = False
    for operation, of_backends in results.items():
        for name, found in of_backends.items():
            within = all(found[key] <= bound for key, bound in BOUNDS.items())
            failed |= not within
            table.add_row(operation, name, *(f"{found[key]:.3f}" for key in BOUNDS), style="" if within else "bold red")
    Console(highlight=False, width=120).print(table)
    sys.exit(int(failed))


if __name__ == "__main__":
    cli.run(main)
