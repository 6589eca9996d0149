"""`python -m train.evaluate knn`: how good the representation of every network of a pretrained family is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.slim import slim

from . import atomic, cli
from .config import Workers, option
from .data.images import ImageSet, Subset, require_labels
from .data.loader import evaluation_batches
from .data.sets import open_images
from .device import choose_device
from .features import extract
from .knn import knn
from .plots import accuracy_over_macs
from .progress import Monitor
from .trained import BATCH, TrainedFamily

DESCRIPTION = """\
Evaluate every desired network of a run. Writes OUT/evaluation/knn.json, knn.md and knn.png."""
EXAMPLE = """\
  python -m train.evaluate knn runs/first --baselines"""


LARGEST_RAW = 64  # pixels; small images are compared as they are, large ones reduced to this or to the run's size


@dataclass(kw_only=True)
class KnnOptions:
    """Options of `train.evaluate knn`."""

    data: str | None = option(None, "set of images with labels [the one that the run was pretrained on]")
    references: int | None = option(None, "training images whose labels vote, drawn at random [all]")
    k: int = option(20, "neighbours that vote")
    baselines: bool = option(False, "also evaluate the networks before training, and the raw pixels")
    workers: Workers = option("auto", "data loading processes: auto (one per core) or a number; 0 is none")
    device: str = option("auto", "auto, cpu or cuda")


def evaluate_knn(out: Path, options: KnnOptions) -> dict[str, Any]:
    """Post-statistics for all subnets in one pass over the references, then kNN for each; returns what knn.json holds.

    Raises InputError if the run or the images cannot be used.
    """
    device = choose_device(options.device)
    trained = TrainedFamily(out, device)
    data = options.data or trained.config.data
    references = open_images(data, "train")
    if options.references is not None:
        references = Subset.random(references, options.references, seed=0)
    queries = open_images(data, "test")
    train_labels, test_labels = require_labels(references), require_labels(queries)

    def score(train: Tensor, test: Tensor) -> dict[str, float]:
        classes = len(references.classes)
        return asdict(knn(train, train_labels, test, test_labels, num_classes=classes, k=options.k))

    def score_family(family: TrainedFamily, what: str) -> dict[str, dict[str, float]]:
        subnets = list(family.family)
        family.measure(subnets, references, data, options.workers)
        train = extract(family.encoder, subnets, family.batches(references, f"{what}references", options.workers))
        test = extract(family.encoder, subnets, family.batches(queries, f"{what}queries", options.workers))
        return {name: score(train[name], test[name]) for name in train}

    pretrained = score_family(trained, "")
    untrained = score_family(TrainedFamily(out, device, untrained=True), "untrained ") if options.baselines else {}
    networks = {}
    for subnet in trained.family:
        network = slim(trained.encoder, subnet)
        networks[subnet.name] = {
            "parameters": parameter_count(network),
            "macs": mac_count(network, trained.config.image_size),
            "pretrained": pretrained[subnet.name],
            **({"untrained": untrained[subnet.name]} if untrained else {}),
        }
    report: dict[str, Any] = {
        "protocol": "knn",
        "k": options.k,
        "data": data,
        "references": len(references),
        "queries": len(queries),
        "step": trained.step,
        "networks": networks,
    }
    if options.baselines:
        size = max(trained.config.image_size, min(*references.load(0).size, LARGEST_RAW))
        pixels = [_pixels(images, size, options.workers) for images in (references, queries)]
        report["raw_pixels"] = {"size": size, **score(*pixels)}
    return report


def _pixels(images: ImageSet, image_size: int, workers: Workers) -> Tensor:
    """The evaluation views themselves as features, float32 [N, C * S * S] from 0 to 1."""
    batches = evaluation_batches(images, range(len(images)), image_size, BATCH, workers)
    with Monitor("raw pixels", -(-len(images) // BATCH)) as monitor:
        rows = []
        for batch in batches:
            rows.append(batch.flatten(1).float() / 255)
            monitor.advance()
    return torch.cat(rows)


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the report's table."""
    baselines = "raw_pixels" in report
    heading = ["network", "params", "MACs", *(["untrained"] if baselines else []), "pretrained", "weighted"]
    cells = []
    for name, network in report["networks"].items():
        untrained = [_percent(network["untrained"])] if baselines else []
        scores = [_percent(network["pretrained"]), f"{network['pretrained']['weighted']:.1%}"]
        cells.append([name, f"{network['parameters']:,}", f"{network['macs'] / 1e6:,.1f} M", *untrained, *scores])
    if baselines:
        pixels = report["raw_pixels"]
        name = f"raw pixels {pixels['size']}x{pixels['size']}"
        cells.append([name, "", "", "", _percent(pixels), f"{pixels['weighted']:.1%}"])
    return heading, cells


def _percent(result: dict[str, float]) -> str:
    return f"{result['majority']:.1%} ± {result['interval']:.1%}"


def _title(report: dict[str, Any]) -> str:
    return (
        f"kNN accuracy on {report['data']}, K = {report['k']}, cosine, majority or weighted: {report['queries']:,} "
        f"test images, {report['references']:,} references, after {report['step']:,} steps"
    )


def _markdown(report: dict[str, Any]) -> str:
    heading, cells = rows(report)
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *cells]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{_title(report)}. ± is half the 95 % interval.\n\n{table}\n"


def _print(report: dict[str, Any]) -> None:
    heading, cells = rows(report)
    table = Table(
        box=SIMPLE, pad_edge=False, caption=f"{_title(report)}. ± is half the 95 % interval.", caption_justify="left"
    )
    for index, name in enumerate(heading):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("evaluate", DESCRIPTION, EXAMPLE)
    protocols = parser.add_subcommands(dest="protocol")
    knn_parser = cli.parser("evaluate knn", evaluate_knn.__doc__ or "", EXAMPLE)
    knn_parser.add_argument("out", type=Path, metavar="OUT", help="run directory of train.pretrain")
    cli.add_options(knn_parser, KnnOptions)
    protocols.add_subcommand("knn", knn_parser, help="nearest neighbours' votes, nothing trained")
    options = parser.parse_args(argv).knn
    report = evaluate_knn(options.out, cli.to_config(KnnOptions, options))
    folder = options.out / "evaluation"
    atomic.write_text(folder / "knn.json", json.dumps(report, indent=2) + "\n")
    atomic.write_text(folder / "knn.md", _markdown(report))
    accuracy_over_macs(report, folder / "knn.png")
    _print(report)
    print(f"{folder}/knn.json, knn.md, knn.png")


if __name__ == "__main__":
    main()
