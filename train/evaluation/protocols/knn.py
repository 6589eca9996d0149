"""kNN evaluation: classification by nearest neighbours in feature space, without training.

As in the paper's appendix A.2: K = 20, cosine similarity, the most frequent label of the neighbours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspnet_fast.errors import InputError

from ...data.datasets.images import ImageDataset, Subset
from ...data.loader import evaluation_batches
from ...distributed.process_group import end_sharing
from ...run.options import Workers, check_options, count, option
from ...run.progress import Monitor
from ...run.tables import Table, cost_cells, percent
from ..knn import check_neighbours, knn
from ..plot_data import points
from ..pretrained import BATCH, EvaluatedFamily, PretrainedFamily
from ..results import Report, origin_of, publish
from ..verdict import RAW_PIXELS, UNTRAINED, Baseline, Score, Verdict, judge
from .common import FOLDER, EvaluationOptions, EvaluationSetup

MAX_RAW_SIZE = 64  # pixels; the raw-pixel baseline reduces larger images to this or to the run's image size
DESCRIPTION = """\
Classify test images by their nearest neighbours among the training images, with the features of every network of a
run. Features are computed once and saved in OUT/features, which may be deleted.
Writes OUT/evaluation/knn.json, knn.md and knn.png."""
EXAMPLE = """\
  dspnet-evaluate knn runs/first --baselines
  dspnet-evaluate knn runs/resnet18 --weights torchvision:resnet18=moco.pth --data DIR"""


@dataclass(kw_only=True)
class KnnOptions(EvaluationOptions):
    """Options of `train.evaluate knn`."""

    references: int | None = count(None, "training images to search neighbours among, drawn at random [all]")
    k: int = count(20, "number of neighbours that vote")
    baselines: bool = option(False, "also evaluate untrained networks and raw pixels")


def evaluate_knn(out: Path, options: KnnOptions) -> Report:
    """kNN accuracies of all networks of a run.

    Args:
        out: run directory.
        options: options of the protocol.

    Returns:
        The report that `publish_knn` writes.

    Raises:
        InputError: if the run or the images cannot be used.
    """
    check_options(options)
    if options.baselines and options.published:
        raise InputError("--baselines evaluates untrained networks of a run: leave it out with --weights")
    setup = EvaluationSetup(out, options)
    trained, queries = setup.trained, setup.test
    references = setup.train
    if options.references is not None:
        references = Subset.random(references, options.references, seed=0)
    check_neighbours(options.k, len(references))
    assert references.labels is not None
    train_labels = references.labels

    def score(train: Tensor, test: Tensor) -> dict[str, float]:
        found = knn(train, train_labels, test, setup.test_labels, num_classes=setup.classes, k=options.k)
        return asdict(found)

    def features(family: EvaluatedFamily, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
        subnets = list(family.family)
        family.measure_statistics(subnets, setup.train, setup.data, options.workers, prefix)
        train = family.features(subnets, references, f"{prefix}train", options.workers)
        test = family.features(subnets, queries, f"{prefix}test", options.workers)
        return {name: (train[name], test[name]) for name in train}

    of_pretrained, of_untrained = features(trained, ""), {}
    if options.baselines:
        of_untrained = features(PretrainedFamily(out, trained.device, True, setup.world), "untrained ")
    end_sharing(setup.world)
    pretrained, untrained = (
        {name: score(train, test) for name, (train, test) in found.items()} for found in (of_pretrained, of_untrained)
    )
    networks: dict[str, Any] = {
        name: {
            **costs,
            "pretrained": pretrained[name],
            **({"untrained": untrained[name]} if untrained else {}),
        }
        for name, costs in setup.networks.items()
    }
    report: Report = {
        "protocol": "knn",
        "k": options.k,
        "data": setup.data,
        "references": len(references),
        "queries": len(queries),
        **setup.origin,
        "networks": networks,
    }
    if options.baselines:
        size = max(trained.image_size, min(*references.load(0).size, MAX_RAW_SIZE))
        pixels = [_pixels(images, size, options.workers) for images in (references, queries)]
        report["raw_pixels"] = {"size": size, **score(*pixels)}
        report["verdict"] = _verdict(report).to_json()
    return report


def _pixels(images: ImageDataset, image_size: int, workers: Workers) -> Tensor:
    """Pixels of the evaluation views as features, float32 [N, C * S * S]: from 0 to 1, or normalised if not 8-bit."""
    batches = evaluation_batches(images, range(len(images)), image_size, BATCH, workers)
    with Monitor("raw pixels", -(-len(images) // BATCH)) as monitor:
        rows = []
        for batch in batches:
            rows.append(batch.flatten(1) if batch.is_floating_point() else batch.flatten(1).float() / 255)
            monitor.advance()
    return torch.cat(rows)


def _verdict(report: Report) -> Verdict:
    def scores(state: str) -> dict[str, Score]:
        return {name: _score(network[state]) for name, network in report["networks"].items()}

    baselines = [Baseline(UNTRAINED, scores("untrained")), Baseline(RAW_PIXELS, _score(report["raw_pixels"]))]
    return judge(scores("pretrained"), baselines, f"kNN accuracy on {report['queries']:,} test images")


def _score(result: dict[str, float]) -> Score:
    return Score(result["majority"], result["interval"])


def _table(report: Report) -> Table:
    baselines = "raw_pixels" in report
    heading = ["network", "params", "MACs", *(["untrained"] if baselines else []), "pretrained", "weighted vote"]
    rows = []
    for name, network in report["networks"].items():
        untrained = [_majority(network["untrained"])] if baselines else []
        pretrained = network["pretrained"]
        rows.append([name, *cost_cells(network), *untrained, _majority(pretrained), percent(pretrained["weighted"])])
    if baselines:
        pixels = report["raw_pixels"]
        name = f"raw pixels {pixels['size']}x{pixels['size']}"
        rows.append([name, "", "", "", _majority(pixels), percent(pixels["weighted"])])
    title = (
        f"kNN accuracy on {report['data']}, K = {report['k']}, cosine similarity, majority and weighted vote: "
        f"{report['queries']:,} test images, {report['references']:,} references, {origin_of(report)}. "
        "± is the half-width of the 95 % interval."
    )
    return Table(title, heading, rows)


def _majority(result: dict[str, float]) -> str:
    return percent(result["majority"], result["interval"])


def publish_knn(out: Path, report: Report) -> None:
    """Write the report to OUT/evaluation and print it."""
    states = [state for state in ("pretrained", "untrained") if state in next(iter(report["networks"].values()))]
    series = {state: points(report["networks"], state, "majority") for state in states}
    lines = {"raw pixels": report["raw_pixels"]["majority"]} if "raw_pixels" in report else {}
    publish(out / FOLDER, "knn", report, _table(report), "kNN accuracy", series, lines)
    if "verdict" in report:
        print(*report["verdict"]["details"], report["verdict"]["conclusion"], sep="\n")
