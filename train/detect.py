"""`python -m train.detect`: object detection and instance segmentation with a network of a pretrained family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from dspnet_fast import atomic, exported
from dspnet_fast.errors import InputError
from dspnet_fast.models import Network, subnet
from dspnet_fast.slim import slim

from . import cli
from .config import WORKERS_HELP, Workers, flag, option, positive
from .data.coco_loader import training_batches
from .data.datasets import coco
from .data.datasets.coco import CocoDataset, Instances
from .data.sampler import EpochSampler
from .detection.average_precision import KINDS, MEASURES
from .detection.mask_rcnn import Shape, build_mask_rcnn, normalization
from .detection.training import DetectionTraining, Hyperparameters, evaluate
from .evaluation.pretrained import PretrainedFamily
from .evaluation.protocols.common import FOLDER
from .evaluation.results import Report
from .run import checkpoint, fingerprint, loop
from .run.device import choose_device
from .run.tables import Table

DESCRIPTION = """\
Train Mask R-CNN with a feature pyramid on one network of a run, on a set in COCO's format, and evaluate its boxes and
masks (the paper's figure 6 and table 1(c)). The network is the one that dspnet-export wrote to OUT/exported/<dn>, else
it is cut out of the newest checkpoint. Writes AP, of every category too, to OUT/evaluation/detect/<dn>.json and .md.
The same command goes on where it was stopped. Needs pycocotools: pip install 'dspnet-fast[detect]'."""
EXAMPLE = """\
  dspnet-detect runs/first --dn w0.50 --coco coco --config recipes/detect/mask-rcnn_coco_180k.yaml
  dspnet-detect runs/first --dn w0.50 --coco coco --steps 9000 --lr-drops 6000,8000 --batch-size 8"""


@dataclass(kw_only=True)
class CocoOptions:
    """data"""

    coco: str | None = option(None, "folder of the set: annotations/NAME.json and folders of images")
    train_annotations: str = option("instances_train2017", "NAME of the annotations to train on")
    train_images: str = option("train2017", "folder of their images, below --coco")
    val_annotations: str = option("instances_val2017", "NAME of the annotations to evaluate on")
    val_images: str = option("val2017", "folder of their images, below --coco")
    keep_empty: bool = option(False, "train on images without annotations too: all in them is background")
    max_bad_annotations: int | None = option(None, "wrong boxes and masks to leave out in a set [1 in 1,000 of all]")
    workers: Workers = option("auto", WORKERS_HELP)


@dataclass(kw_only=True)
class DetectorOptions:
    """detector"""

    sizes: str = option("640,672,704,736,768,800", "shorter sides, px: training draws one, evaluation takes the last")
    max_size: int = option(1333, "longer side, at most, in pixels")
    anchor_size: int = option(32, "side of the smallest anchors in pixels; each level of the pyramid doubles it")
    rois: int = option(512, "regions of an image that the heads learn from in a step")


@dataclass(kw_only=True)
class DetectOptimizationOptions:
    """optimization"""

    steps: int = option(180_000, "steps of SGD")
    lr_drops: str = option("120000,160000", "steps at which the learning rate is divided by 10; may be empty")
    batch_size: int = option(16, "images per step")
    lr: float = option(0.02, "learning rate for 16 images; the peak is lr * batch_size / 16")
    warmup_steps: int = option(1000, "steps of linear learning rate warm-up")
    momentum: float = option(0.9, "SGD momentum")
    weight_decay: float = option(1e-4, "weight decay of tensors with more than one dimension")
    seed: int = option(0, "seed of the detector's new weights, order, flips and sampling")


@dataclass(kw_only=True)
class DetectOptions(DetectOptimizationOptions, DetectorOptions, CocoOptions):
    """Options of `train.detect`."""

    evaluate_steps: int = option(0, "steps between evaluations; 0 for the one at the end only")
    device: str = option("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        """Raise InputError for values that cannot be."""
        positive(
            max_size=self.max_size,
            anchor_size=self.anchor_size,
            rois=self.rois,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
        )
        for name in ("warmup_steps", "weight_decay", "evaluate_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{flag(name)} cannot be negative: {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum is 0 or more and below 1, not {self.momentum}")
        if self.max_bad_annotations is not None and self.max_bad_annotations < 0:
            raise InputError(f"--max-bad-annotations cannot be negative: {self.max_bad_annotations}")
        if min(self.chosen_sizes(), default=0) < 1 or max(self.chosen_sizes()) > self.max_size:
            raise InputError(f"--sizes {self.sizes}: give whole numbers from 1 to --max-size, {self.max_size}")
        if any(not 0 < drop < self.steps for drop in self.recipe().drops):
            raise InputError(f"--lr-drops {self.lr_drops}: give steps before the last of {self.steps}")

    def chosen_sizes(self) -> list[int]:
        """Shorter sides."""
        return _whole_numbers("sizes", self.sizes)

    def shape(self) -> Shape:
        """What detector to build."""
        return Shape(tuple(self.chosen_sizes()), self.max_size, self.anchor_size, self.rois)

    def recipe(self) -> Hyperparameters:
        """How to train."""
        return Hyperparameters(
            steps=self.steps,
            drops=tuple(_whole_numbers("lr_drops", self.lr_drops)),
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            seed=self.seed,
        )

    def sets(self) -> tuple[CocoDataset, CocoDataset]:
        """To train and to evaluate on, checked; InputError if they cannot be used or have other categories."""
        if self.coco is None:
            raise InputError("--coco is missing: name the folder of a set in COCO's format")
        root = Path(self.coco).expanduser()
        if not root.is_dir():
            raise InputError(f"--coco {root} is no folder: give one with annotations/ and images")
        train, val = (
            coco.read(root / "annotations" / f"{name}.json", root / folder, self.max_bad_annotations)
            for name, folder in (
                (self.train_annotations, self.train_images),
                (self.val_annotations, self.val_images),
            )
        )
        ids = [{category["id"]: category["name"] for category in of.categories} for of in (train, val)]
        if ids[0] != ids[1]:
            different = sorted({str(c) for c in ids[0].items() ^ ids[1].items()})
            raise InputError(f"{train.file} and {val.file} have other categories: {', '.join(different[:10])}")
        for of in (train, val):
            for problem in of.left_out[: coco.MAX_REPORTED]:
                print(f"left out of {of.file.name}: {problem}", flush=True)
            if len(of.left_out) > coco.MAX_REPORTED:
                print(f"left out of {of.file.name}: {len(of.left_out) - coco.MAX_REPORTED:,} more", flush=True)
        return (train if self.keep_empty else train.annotated()), val


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in str(text).split(",") if number.strip()]
    except ValueError as error:
        raise InputError(f"{flag(name)} {text!r}: give whole numbers with commas between") from error


def pretrained_network(out: Path, dn: str) -> tuple[Network, str]:
    """The network `dn` of a run in torch.nn layers, and where it comes from: exported, or cut out of a checkpoint.

    Raises InputError if there is neither, or if the run was trained further than the exported network.
    """
    folder = out / "exported" / dn
    if folder.is_dir():
        network = exported.load(folder)
        steps = json.loads((folder / exported.MANIFEST).read_text()).get("pretraining", {}).get("steps")
        newest = checkpoint.latest_step(out / "checkpoints")
        if newest and steps != newest:
            raise InputError(f"{folder} is of step {steps}, the run is at {newest}: export it again, or remove it")
        assert isinstance(network, Network)
        return network, f"exported/{dn}, {steps} steps"
    trained = PretrainedFamily(out, torch.device("cpu"))
    network = slim(trained.cut(subnet(trained.config.network, dn)), None)
    assert isinstance(network, Network)
    return network, f"checkpoint, {trained.step} steps"


def detect(out: Path, dn: str, options: DetectOptions) -> Report:
    """Train to the end and evaluate; returns what <dn>.json holds.

    Raises KeyboardInterrupt if it was stopped, after saving, and InputError if run or set cannot be used.
    """
    coco.require_pycocotools()
    device = choose_device(options.device)
    network, source = pretrained_network(out, dn)
    train, val = options.sets()
    recipe = options.recipe()
    epochs = _epochs(recipe, len(train))
    key = fingerprint.digest(*network.parameters(), recipe, options.shape(), train.digest, len(train), train.left_out)
    model = build_mask_rcnn(network, len(train.categories), options.shape(), recipe.seed).to(device)
    training = DetectionTraining(model, recipe, device)
    print(f"{dn}: {source}; {len(train):,} images, {train.instances:,} annotations; {normalization()}", flush=True)

    def batches(start: int) -> Iterator[list[Instances]]:
        order = EpochSampler(len(train), recipe.batch_size, recipe.seed, epochs, start)
        return islice(training_batches(train, order, options.workers), recipe.steps - start)

    def measure() -> str:
        scores = evaluate(model, val, options.workers, device)
        return "  ".join(f"{kind} AP {_percent(scores[kind]['AP'])}" for kind in KINDS)

    folder = out / FOLDER / "detect" / f"{dn}-{key}"
    loop.run(f"detector {dn}", training, batches, folder, device, None, measure, options.evaluate_steps)
    return {
        "protocol": "detect",
        "dn": dn,
        "from": source,
        "coco": options.coco,
        "train": {"annotations": options.train_annotations, **_counts(train)},
        "val": {"annotations": options.val_annotations, **_counts(val)},
        "recipe": {
            **asdict(recipe),
            **asdict(options.shape()),
            "keep_empty": options.keep_empty,
            "normalization": normalization(),
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **evaluate(model, val, options.workers, device),
    }


def _epochs(recipe: Hyperparameters, images: int) -> int:
    """Begun by the recipe's steps; InputError if a batch exceeds the set."""
    return -(-recipe.steps // EpochSampler(images, recipe.batch_size, recipe.seed, 1).steps_per_epoch)


def _counts(of: CocoDataset) -> dict[str, int]:
    return {"images": len(of), "instances": of.instances, "left_out": len(of.left_out)}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def publish_detect(out: Path, report: Report) -> None:
    """Write and print the report."""
    folder, dn = out / FOLDER / "detect", report["dn"]
    title = (
        f"Mask R-CNN on {dn} ({report['from']}): {report['recipe']['steps']:,} steps, "
        f"{report['val']['images']:,} images of {report['val']['annotations']}, AP in percent"
    )
    summary = Table(
        title,
        [dn, *MEASURES],
        [[kind, *(_percent(report[kind][measure]) for measure in MEASURES)] for kind in KINDS],
    )
    categories = Table(
        "AP of each category, in percent",
        ["category", "instances", *KINDS],
        [
            [name, f"{of['instances']:,}", *(_percent(of[kind]) for kind in KINDS)]
            for name, of in report["categories"].items()
        ],
    )
    atomic.write_text(folder / f"{dn}.json", json.dumps(report, indent=2) + "\n")
    atomic.write_text(folder / f"{dn}.md", f"{summary.markdown()}\n{categories.markdown()}")
    summary.show()
    categories.show()
    print(f"{folder}/{dn}.json, {dn}.md")


def make_parser() -> cli.ArgumentParser:
    """All options of the command."""
    parser = cli.parser("detect", DESCRIPTION, EXAMPLE)
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory of dspnet-pretrain")
    parser.add_argument("--dn", required=True, help="the network, such as w0.50")
    cli.add_config_file(parser)
    cli.add_options(parser, DetectOptions)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parsed = make_parser().parse_args(argv)
    options = cli.to_config(DetectOptions, parsed)
    out: Path = parsed.out
    try:
        report = detect(out, parsed.dn, options)
    except KeyboardInterrupt:
        print("what was trained is kept: the same command goes on from there", flush=True)
        raise
    publish_detect(out, report)


if __name__ == "__main__":
    main()
