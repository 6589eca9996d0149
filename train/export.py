"""`python -m train.export`: cut the networks out of a pretrained family."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import dspnet_fast
from dspnet_fast import exported
from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.errors import InputError
from dspnet_fast.models import Network, subnet
from dspnet_fast.slim import slim

from . import cli
from .data.loader import MEAN, STD
from .data.sets import open_images
from .trained import TrainedFamily

DESCRIPTION = """\
Write each desired network of a run as OUT/exported/<dn>/model.safetensors and manifest.json: an ordinary network
whose weights load into timm's and torchvision's classes."""
EXAMPLE = """\
  python -m train.export runs/first --dn w0.50"""


def export(out: Path, dns: Sequence[str] = ()) -> list[Path]:
    """Export the named subnets of the run in `out`, those of its family by default; returns their folders.

    Any subnet within the largest can be exported, also one that the run did not train by name. Statistics that an
    evaluation measured are used; without them they are measured here.
    """
    trained = TrainedFamily(out, torch.device("cpu"))
    config, encoder = trained.config, trained.encoder
    subnets = [subnet(config.network, dn) for dn in dns] or list(trained.family)
    for wanted in subnets:
        if not wanted.within(trained.family.full):
            raise InputError(f"{wanted} is no part of {trained.family.full}, the largest network of {out}")
    missing = [wanted for wanted in subnets if wanted.name not in trained.recall(subnets)]
    if missing:
        trained.measure(missing, open_images(config.data, "train"), config.data)
    sources = trained.recall(subnets)
    folders = []
    for wanted in subnets:
        network = slim(encoder, wanted)
        assert isinstance(network, Network)
        manifest = {
            "parameters": parameter_count(network),
            "macs": mac_count(network, config.image_size),
            "image_size": config.image_size,
            "normalization": {"mean": MEAN, "std": STD},
            "batch_norm": {"statistics": "measured after training", **sources[wanted.name]},
            "pretraining": {"data": config.data, "steps": trained.step, "family": trained.family.names},
            "made_by": {"dspnet_fast": dspnet_fast.__version__, "commit": _commit()},
        }
        exported.save(out / "exported" / wanted.name, network, wanted, manifest)
        folders.append(out / "exported" / wanted.name)
    return folders


def _commit() -> str | None:
    """The commit of the code that runs, None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("export", DESCRIPTION, EXAMPLE)
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory of train.pretrain")
    parser.add_argument("--dn", action="append", help="a network to export, may be repeated [all of the run]")
    options = parser.parse_args(argv)
    for folder in export(options.out, options.dn or ()):
        print(folder)


if __name__ == "__main__":
    main()
