"""Images per second and core of the augmentation backends: two BYOL views of photographs, and decoding alone.

The images are JPEGs of 400 x 400 pixels, crops of scikit-learn's two sample photographs at several scales, or those of
--data. One process runs on one core, with one thread each for PyTorch and DALI. Times are medians of processor time;
samples of the variants are interleaved.

`torchvision on PIL` and `torchvision on tensors` implement BYOL's augmentation with torchvision's own transforms (v2);
`torchvision` and `dali-cpu` are this project's backends. Timing starts only if the views of the two backends agree
within the limit in docs/data.md.

The last line is machine-readable: dali_cpu_vs_best_torchvision=X, relative to the faster of torchvision on PIL and on
tensors.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from dspnet_fast.errors import InputError
from dspnet_fast.machine import cpu_model
from train import cli
from train.data.backends import choose_backend, open_batches
from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.data.datasets.images import ImageDataset, Subset
from train.data.inspect import compute_views
from train.data.sampler import EpochSampler
from train.data.views.augmentation import ViewSpec, byol
from train.run.progress import Monitor

from .quiet import QuietWait, interleave, relative_half_iqr

EPILOG = """\
examples:
  python -m benchmarks.data
  python -m benchmarks.data --data photos --image-size 224 --rounds 20 --json data.json
"""

PIL, TENSORS, OURS, DALI = "torchvision on PIL", "torchvision on tensors", "torchvision", "dali-cpu"
DECODE_PIL, DECODE_DALI = "decode only, Pillow", "decode only, DALI"
SIZE, SCALES = 400, (0.65, 0.8, 1.0)  # side of a photograph in pixels; side of a crop relative to the sample
MAX_DIFFERENCE = 2.0  # grey levels, mean over all pixels


def photographs(folder: Path, count: int, size: int = SIZE) -> None:
    """Write `count` JPEGs of size x size pixels, quality 90: random squares of scikit-learn's sample photographs."""
    from sklearn.datasets import load_sample_images

    samples = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random = np.random.default_rng(0)
    for k in range(count):
        sample = samples[k % len(samples)]
        side = int(min(sample.size) * SCALES[k % len(SCALES)])
        left, top = (int(random.integers(0, extent - side + 1)) for extent in sample.size)
        crop = sample.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        crop.save(folder / f"{k:04}.jpg", quality=90)


def transform(view: ViewSpec, on_tensors: bool) -> v2.Transform:
    """The augmentation of a view with torchvision's own transforms."""
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                view.image_size,
                (view.min_scale, view.max_scale),
                view.ratio,
                InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(view.flip_probability),
            v2.RandomApply([jitter], view.jitter_probability),
            v2.RandomGrayscale(view.grey_probability),
            v2.RandomApply([v2.GaussianBlur(view.blur_kernel, view.blur_sigma)], view.blur_probability),
            v2.RandomSolarize(view.solarize_threshold, view.solarize_probability),
            *([] if on_tensors else [v2.PILToTensor()]),
        ]
    )


def _decode_pillow(images: ImageDataset) -> None:
    for i in range(len(images)):
        images.load(i)


def _plain_torchvision(images: ImageDataset, specs: Sequence[ViewSpec], on_tensors: bool) -> Callable[[], object]:
    transforms = [transform(view, on_tensors) for view in specs]

    def load(i: int) -> Image.Image | Tensor:
        content = images.encoded(i)
        if on_tensors:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        return Image.open(io.BytesIO(content)).convert("RGB")

    def run() -> Tensor:
        loaded = map(load, range(len(images)))
        pairs = [[of_view(image) for of_view in transforms] for image in loaded]
        return torch.stack([pixels for view in zip(*pairs, strict=True) for pixels in view])

    return run


def _decode_dali(images: ImageDataset, batch_size: int) -> Callable[[], object]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decoding():
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True)

    pipeline = decoding()
    pipeline.build()

    def run() -> None:
        for first in range(0, len(images), batch_size):
            batch = [np.frombuffer(images.encoded(i), np.uint8) for i in range(first, first + batch_size)]
            pipeline.feed_input("encoded", batch)
            pipeline.run()

    return run


def _backend(
    name: str, images: ImageDataset, specs: tuple[ViewSpec, ViewSpec], batch_size: int
) -> Callable[[], object]:
    order = EpochSampler(len(images), batch_size, seed=0, epochs=1)
    batches = open_batches(name, images, specs, order, 0, BadImages(), torch.device("cpu"))

    def run() -> None:
        for _ in batches:
            pass

    return run


def variants(images: ImageDataset, image_size: int, batch_size: int) -> dict[str, Callable[[], object]]:
    """Functions by name that each decode all images once, or also compute two views of them."""
    specs = byol(image_size)
    runs: dict[str, Callable[[], object]] = {
        DECODE_PIL: lambda: _decode_pillow(images),
        PIL: _plain_torchvision(images, specs, on_tensors=False),
        TENSORS: _plain_torchvision(images, specs, on_tensors=True),
        OURS: _backend(OURS, images, specs, batch_size),
    }
    try:
        choose_backend(DALI, images, torch.device("cpu"))
    except InputError as error:
        print(f"DALI is skipped: {error}", file=sys.stderr)
        return runs
    return runs | {DECODE_DALI: _decode_dali(images, batch_size), DALI: _backend(DALI, images, specs, batch_size)}


def check(images: ImageDataset, image_size: int) -> float:
    """Mean difference of the backends' views in grey levels; exits with 1 if it exceeds MAX_DIFFERENCE."""
    sample = Subset(images, range(min(32, len(images))))
    made = [compute_views(name, sample, byol(image_size), seed=0).float() for name in (OURS, DALI)]
    difference = (made[0] - made[1]).abs().mean().item()
    if not difference <= MAX_DIFFERENCE:
        sys.exit(f"error: the views of the backends differ by {difference:.2f} grey levels, more than {MAX_DIFFERENCE}")
    return difference


def measure(options: argparse.Namespace, images: ImageDataset) -> dict:
    """Time all variants, with interleaved samples."""
    runs = variants(images, options.image_size, options.batch_size)
    difference = check(images, options.image_size) if DALI in runs else None
    with Monitor("data", len(runs) * (options.rounds + 1), console=Console(stderr=True, highlight=False)) as monitor:

        def tick(status: str) -> None:
            monitor.status(status)
            monitor.advance()

        for name, run in runs.items():
            tick(f"{name}: warm-up")
            run()
        seconds = interleave(runs, options.rounds, QuietWait(options.wait_seconds, 5), tick, time.process_time)
    rates = {name: len(images) / statistics.median(samples) for name, samples in seconds.items()}
    best = max(rates[PIL], rates[TENSORS])
    return {
        "processor": cpu_model(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "images": len(images),
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "grey_level_difference": difference,
        "variants": {
            name: {
                "images/s": rate,
                "x": rate / best,
                "share of decoding": rate / rates[DECODE_DALI if name == DALI else DECODE_PIL],
                "relative_half_iqr": relative_half_iqr(seconds[name]),
                "seconds": seconds[name],
            }
            for name, rate in rates.items()
        },
    }


def report(results: dict, console: Console) -> None:
    """Print the table."""
    console.print(
        f"{results['images']} JPEGs, two views of {results['image_size']} px, one core of {results['processor']}, "
        f"torch {results['torch']}"
    )
    table = Table("variant", "images/s per core", "±", "x best torchvision", "of decoding")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, line in results["variants"].items():
        decoding = name in (DECODE_PIL, DECODE_DALI)
        table.add_row(
            name,
            f"{line['images/s']:.0f}",
            f"{line['relative_half_iqr']:.0%}",
            "" if decoding else f"{line['x']:.2f}",
            "" if decoding else f"{line['share of decoding']:.0%}",
            style="bold" if name == DALI else "",
        )
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder of JPEGs [400 x 400 pixels of scikit-learn's sample photographs]"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=256,
        metavar="N",
        help="images per sample, a multiple of the batch size [%(default)s]",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images per batch, with two views each [%(default)s]"
    )
    parser.add_argument(
        "--image-size", type=int, default=128, metavar="N", help="height and width of a view [%(default)s]"
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="samples of each variant [%(default)s]")
    parser.add_argument(
        "--wait-seconds",
        type=float,
        default=60,
        metavar="S",
        help="total wait for other processes, in seconds [%(default)s]",
    )
    parser.add_argument("--json", metavar="FILE", help="file for all measurements")
    parser.add_argument("--debug", action="store_true", help="show the traceback if an error occurs")
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print the results."""
    options = make_parser().parse_args(argv)
    if options.images < options.batch_size or options.images % options.batch_size:
        raise InputError(f"--images {options.images} is not a multiple of --batch-size {options.batch_size}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            photographs(Path(folder), options.images)
        images = open_images(options.data or folder, "train")
        results = measure(options, Subset.random(images, options.images, seed=0))
    console = Console(highlight=False)
    report(results, console if console.is_terminal else Console(highlight=False, width=120))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if DALI in results["variants"]:
        print(f"dali_cpu_vs_best_torchvision={results['variants'][DALI]['x']:.2f}")


if __name__ == "__main__":
    cli.run(main)
