"""Does a backend keep its memory? Thousands of batches, with the resident memory of this process and its workers.

The first tenth warms up: buffers grow to the largest image that they met. After it, resident memory (the highest of
each tenth) may not grow by more than 2 %; the exit code is 1 if it does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from train import cli
from train.data.augmentation import byol
from train.data.backends import choose_backend, open_batches
from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.data.sampler import EpochSampler
from train.run.progress import Monitor

from .data import photographs

GROWTH = 0.02
TENTHS = 10


def resident() -> int:
    """Bytes in memory of this process and the worker processes that it has."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = 0
    for process in processes:
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue  # it ended meanwhile
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of images [the test photographs of benchmarks.data, 256 of them]")
    parser.add_argument("--data-backend", default="dali-cpu", help="the backend [%(default)s]")
    parser.add_argument("--batches", type=int, default=2000, help="how many [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a batch [%(default)s]")
    parser.add_argument("--image-size", type=int, default=64, help="height and width of a view [%(default)s]")
    parser.add_argument("--workers", type=int, default=1, help="processes of torchvision's, threads of DALI's [1]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    highest = [0] * TENTHS
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            photographs(Path(folder), 256, size=200)
        images = open_images(options.data or folder, "train")
        name = choose_backend(options.data_backend, images, torch.device("cpu"))
        steps = len(images) // options.batch_size
        order = EpochSampler(len(images), options.batch_size, 0, epochs=-(-options.batches // steps))
        specs = byol(options.image_size)
        batches = iter(open_batches(name, images, specs, order, options.workers, BadImages(), torch.device("cpu")))
        began = time.monotonic()
        with Monitor("soak", options.batches, console=Console(stderr=True, highlight=False)) as monitor:
            for k in range(options.batches):
                next(batches)
                tenth = k * TENTHS // options.batches
                highest[tenth] = max(highest[tenth], resident())
                monitor.advance()
                monitor.status(f"{highest[tenth] / 2**20:.0f} MiB")
        seconds = time.monotonic() - began
        del batches
    growth = max(highest[1:]) / highest[1] - 1
    print("resident MiB, the highest of each tenth:", " ".join(f"{value / 2**20:.1f}" for value in highest))
    print(f"{name}: {options.batches} batches in {seconds:.0f} s, growth {growth:.2%} ({GROWTH:.0%} allowed)")
    sys.exit(int(growth > GROWTH))


if __name__ == "__main__":
    cli.run(main)
