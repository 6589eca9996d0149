"""`python -m train.embed`: compute features of images with a pretrained or exported network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dspnet_fast.exported
from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.slim import slim

from . import cli
from .data.datasets.folder import open_files
from .data.datasets.folder_files import is_image
from .data.datasets.images import ImageDataset
from .data.datasets.pixels import PixelFormat
from .data.datasets.registry import open_images
from .data.pixel_options import read_as
from .distributed.process_group import SINGLE_PROCESS, World, end_sharing, init_sharing
from .evaluation.pretrained import BATCH, evaluation_views
from .evaluation.trained import TrainedRun
from .run.device import choose_device
from .run.interruption import NOTHING
from .run.options import DEVICE_HELP, WORKERS_HELP, Workers

DESCRIPTION = """\
Compute the features of images with a network of a run of dspnet-pretrain, or with an exported network. Networks of a
run of dspnet-finetune give logits.
Writes them to --out as a NumPy array [images, features], float32, and the names of the images, in the same order,
to a JSON file beside it: features.json for features.npy."""
EXAMPLE = """\
  dspnet-embed runs/first --dn w0.50 --data photos/ --out features.npy
  dspnet-embed runs/first/exported/w0.50 --data cifar10 --split test --out features.npy"""


@dataclass(frozen=True)
class Embedder:
    """A network in evaluation mode on its device, and the size in pixels and the format of its images."""

    network: nn.Module
    image_size: int
    device: torch.device
    format: PixelFormat

    def batches(
        self, images: ImageDataset, workers: Workers = "auto", world: World = SINGLE_PROCESS
    ) -> Iterator[np.ndarray]:
        """Features [B, F] in float32 of consecutive images, with a progress bar; of all ranks on rank 0, else none."""
        views = evaluation_views(
            read_as(images, self.format), self.image_size, self.device, "embed", workers, world=world
        )
        with torch.no_grad():
            mine = (self.network(batch).float().cpu().numpy() for batch in views)
            yield from world.gather_in_order(mine, -(-len(images) // BATCH))


def open_embedder(
    source: str | os.PathLike[str],
    dn: str | None = None,
    device: str | torch.device = "auto",
    world: World = SINGLE_PROCESS,
) -> Embedder:
    """Load a network to compute features with.

    Args:
        source: run directory of a pretraining or fine-tuning, or folder of an exported network.
        dn: the subnet of a run; by default its largest network.
        device: "auto", "cpu", "cuda" or "mps", or a device.
        world: the ranks, of which rank 0 measures post-statistics that the run does not have.

    Raises:
        InputError: if there is no such network.
    """
    folder, chosen = Path(source), choose_device(device) if isinstance(device, str) else device
    if (folder / dspnet_fast.exported.MANIFEST).is_file():
        if dn is not None:
            raise InputError(f"{folder} is one exported network: leave --dn out, or give the run directory")
        network = dspnet_fast.exported.load(folder)
        manifest = json.loads((folder / dspnet_fast.exported.MANIFEST).read_text())
        image_size, format = manifest["image_size"], PixelFormat.of_manifest(manifest)
    else:
        network, image_size, format = _cut(folder, dn, world)
    return Embedder(network.to(chosen).to(memory_format=torch.channels_last).eval(), image_size, chosen, format)


def _cut(out: Path, dn: str | None, world: World) -> tuple[nn.Module, int, PixelFormat]:
    """A subnet of a run as an ordinary network, with its post-statistics, and the size and format of its images."""
    run = TrainedRun(out)
    (subnet,) = run.subnets([dn or run.family.full.name])
    return slim(run.load([subnet], world).model, subnet), run.image_size, run.format


def embed(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dn: str | None = None,
    *,
    device: str = "auto",
    workers: Workers = "auto",
) -> np.ndarray:
    """Features of images: the Python form of this command.

    Args:
        source, dn, device: see `open_embedder`.
        images: a folder, whose images are taken in the order of their paths, or paths of images.
        workers: image loading processes.

    Returns:
        Features [N, F] in float32; logits [N, classes] of a classifier.

    Raises:
        InputError: if the network or an image cannot be read.

    Example:
        >>> features = embed("runs/first/exported/w0.50", ["a.jpg", "b.jpg"])  # doctest: +SKIP
        >>> features.shape  # doctest: +SKIP
        (2, 480)
    """
    single = isinstance(images, str | os.PathLike)
    opened = open_files([images] if single else images)  # type: ignore[list-item, arg-type]
    return np.concatenate(list(open_embedder(source, dn, device).batches(opened, workers)))


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("embed", DESCRIPTION, EXAMPLE, "[options] --data IMAGES --out FILE.npy RUN_OR_EXPORT")
    parser.add_argument("network", metavar="RUN_OR_EXPORT", help="run directory, or folder of an exported network")
    parser.add_argument("--dn", metavar="NAME", help="network of a run [its largest]")
    parser.add_argument(
        "--data", metavar="IMAGES", required=True, help="folder of images, an image, dataset name or shards"
    )
    parser.add_argument("--split", choices=("train", "test"), default="train", help="split of a dataset or shards")
    parser.add_argument("--out", metavar="FILE.npy", required=True, type=Path, help="file for the features")
    parser.add_argument("--workers", type=Workers, default="auto", metavar="N", help=WORKERS_HELP)
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=DEVICE_HELP)
    options: Any = parser.parse_args(argv)
    if options.out.suffix != ".npy":
        raise InputError(f"--out {options.out}: give a file that ends in .npy")
    if options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder: give a file that ends in .npy")
    atomic.check_writable(options.out.absolute().parent)
    listed = Path(options.data).is_dir() or (is_image(options.data) and Path(options.data).is_file())
    images = open_files([options.data]) if listed else open_images(options.data, options.split)
    world, device = init_sharing(choose_device(options.device))
    embedder = open_embedder(options.network, options.dn, device, world)
    features = list(embedder.batches(images, options.workers, world))
    end_sharing(world)
    table = np.concatenate(features)
    atomic.write_atomically(options.out, lambda path: _save(path, table))
    names = options.out.with_suffix(".json")
    files = [images.file(i) for i in range(len(images))]
    atomic.write_text(
        names, json.dumps({"network": options.network, "dn": options.dn, "files": files}, indent=1) + "\n"
    )
    print(f"{options.out}: {table.shape[0]:,} images, {table.shape[1]} features each; their names: {names}")


def _save(path: Path, features: np.ndarray) -> None:
    with open(path, "wb") as file:  # given a path, np.save would append .npy
        np.save(file, features)


main = cli.command(_main, several_ranks=True, interrupted=NOTHING)

if __name__ == "__main__":
    main()
