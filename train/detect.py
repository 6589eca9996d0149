"""`python -m train.detect`: train and evaluate Mask R-CNN with a network of a pretrained family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from dspnet_fast import atomic
from dspnet_fast.errors import InputError

from . import cli
from .data.coco_loader import training_batches
from .data.datasets import coco
from .data.datasets.coco import TRAIN, VAL, CocoDataset, Instances
from .data.sampler import EpochSampler
from .detection.average_precision import KINDS, MEASURES
from .detection.backbones import open_backbone
from .detection.mask_rcnn import DetectorConfig, build_detector, normalization
from .detection.training import DetectionTraining, Hyperparameters, evaluate
from .evaluation.protocols.common import FOLDER
from .evaluation.results import Report
from .run import fingerprint, loop
from .run.device import choose_device
from .run.options import (
    DEVICE_HELP,
    DEVICES,
    STALL_HELP,
    WORKERS_HELP,
    Workers,
    below_one,
    check_options,
    choice,
    count,
    flag,
    not_negative,
    option,
    positive,
)
from .run.tables import Table

DESCRIPTION = """\
Train Mask R-CNN (with --boxes-only Faster R-CNN) with a feature pyramid on a network of a run of dspnet-pretrain, on a
dataset in COCO format, and evaluate its boxes and masks (the paper's figure 6 and table 1(c)). The network is read from
OUT/exported/<dn>, the folder that dspnet-export writes, or else cut out of the newest checkpoint. --weights compares
with random weights and with networks of timm and torchvision. Writes the average precision, in total and of each
category, to OUT/evaluation/detect/<dn>.json and <dn>.md. After Ctrl-C the same command continues.
Needs pycocotools: pip install 'dspnet-fast[detect]'."""
EXAMPLE = """\
  dspnet-detect runs/first --dn w0.50 --coco coco --config recipes/detect/mask-rcnn_coco_180k.yaml
  dspnet-detect runs/first --dn w0.50 --coco coco --steps 9000 --lr-drops 6000,8000 --batch-size 8
  dspnet-detect runs/first --dn w0.50 --coco coco --weights random
  dspnet-detect runs/resnet18 --coco coco --weights torchvision:resnet18=resnet18.pth"""


@dataclass(kw_only=True)
class CocoOptions:
    """data"""

    coco: str | None = option(
        None,
        "folder with annotations/NAME.json and folders of images, or, as Roboflow exports them, with train/ and valid/",
        metavar="DIR",
    )
    train_annotations: str = option(TRAIN[0], "training annotations: the NAME in annotations/NAME.json", metavar="NAME")
    train_images: str = option(TRAIN[1], "name of the folder of the training images in --coco", metavar="DIR")
    val_annotations: str = option(VAL[0], "test annotations: the NAME in annotations/NAME.json", metavar="NAME")
    val_images: str = option(VAL[1], "name of the folder of the test images in --coco", metavar="DIR")
    boxes_only: bool = option(False, "train Faster R-CNN on boxes and ignore masks")
    crowds_as_objects: bool = option(
        False, "treat annotations with iscrowd 1 as single objects, for masks that CVAT exports"
    )
    keep_empty: bool = option(False, "train also on images without annotations, as background")
    max_bad_annotations: int | None = not_negative(
        None, "invalid boxes and masks of each set that are left out; one more is an error [1 in 1,000]"
    )
    workers: Workers = option("auto", WORKERS_HELP)


@dataclass(kw_only=True)
class DetectorOptions:
    """detector"""

    sizes: str = option(
        "640,672,704,736,768,800",
        "shorter side of resized images in pixels: training draws one of these, evaluation uses the last",
        metavar="SIZES",
    )
    max_size: int = count(1333, "longest side of a resized image, in pixels")
    anchor_size: int = count(32, "side of the smallest anchors in pixels; doubled at each pyramid level")
    rois: int = count(512, "regions (RoIs) per image that the box and mask heads are trained on in a step")


@dataclass(kw_only=True)
class DetectOptimizationOptions:
    """optimization"""

    steps: int = count(180_000, "training steps")
    lr_drops: str = option(
        "120000,160000", "steps at which the learning rate is divided by 10; '': none", metavar="STEPS"
    )
    batch_size: int = count(16, "images per step")
    lr: float = positive(0.02, "learning rate per 16 images: the peak is lr * batch_size / 16")
    warmup_steps: int = not_negative(1000, "steps of linear learning rate warm-up")
    momentum: float = below_one(0.9, "SGD momentum")
    weight_decay: float = not_negative(1e-4, "weight decay of tensors with two or more dimensions")
    seed: int = option(0, "seed of new weights, order, flips and sampling")


@dataclass(kw_only=True)
class DetectOptions(DetectOptimizationOptions, DetectorOptions, CocoOptions):
    """Options of `train.detect`."""

    weights: str = option(
        "run",
        "run: those of the pretraining; random; or published ones, timm:NAME[=FILE] or torchvision:NAME[=FILE]",
        metavar="WEIGHTS",
    )
    evaluate_steps: int = not_negative(0, "steps between evaluations; 0: only at the end")
    stall_timeout: float = not_negative(300.0, STALL_HELP)
    device: str = choice("auto", DEVICES, DEVICE_HELP, metavar="DEVICE")

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        check_options(self)
        if min(self.chosen_sizes(), default=0) < 1 or max(self.chosen_sizes()) > self.max_size:
            raise InputError(f"--sizes {self.sizes}: give whole numbers from 1 to --max-size, {self.max_size}")
        if any(not 0 < drop < self.steps for drop in self.hyperparameters().drops):
            raise InputError(f"--lr-drops {self.lr_drops}: give steps before the last of {self.steps}")

    def chosen_sizes(self) -> list[int]:
        """Shorter sides of images, in pixels."""
        return _whole_numbers("sizes", self.sizes)

    def detector(self) -> DetectorConfig:
        """Configuration of the detector."""
        return DetectorConfig(tuple(self.chosen_sizes()), self.max_size, self.anchor_size, self.rois)

    def hyperparameters(self) -> Hyperparameters:
        """Hyperparameters of its training."""
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
        """Training and test set; InputError if they are unusable or have different categories."""
        if self.coco is None:
            raise InputError("--coco is missing: name the folder of a dataset in COCO format")
        root = Path(self.coco).expanduser()
        if not root.is_dir():
            raise InputError(f"--coco {root} is not a folder: name one with annotations/ and images")
        train, val = (
            coco.read(file, folder, self.max_bad_annotations, self.boxes_only, self.crowds_as_objects)
            for file, folder in coco.places(
                root, (self.train_annotations, self.train_images), (self.val_annotations, self.val_images)
            )
        )
        ids = [{category["id"]: category["name"] for category in part.categories} for part in (train, val)]
        if ids[0] != ids[1]:
            different = sorted({str(c) for c in ids[0].items() ^ ids[1].items()})
            raise InputError(f"{train.file} and {val.file} have different categories: {', '.join(different[:10])}")
        for part in (train, val):
            for problem in part.left_out[: coco.MAX_REPORTED]:
                print(f"left out of {part.file.name}: {problem}", flush=True)
            if len(part.left_out) > coco.MAX_REPORTED:
                print(f"left out of {part.file.name}: {len(part.left_out) - coco.MAX_REPORTED:,} more", flush=True)
        return (train if self.keep_empty else train.annotated()), val


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in str(text).split(",") if number.strip()]
    except ValueError as error:
        raise InputError(f"{flag(name)} {text!r}: give whole numbers separated by commas") from error


def detect(out: Path, dn: str | None, options: DetectOptions) -> Report:
    """Train a detector to the end and evaluate it.

    Args:
        out: run directory of the pretraining; with published weights, folder for the results.
        dn: name of the network; None with published weights.
        options: options of the command.

    Returns:
        The report that `publish_detect` writes.

    Raises:
        InputError: if the run or the dataset cannot be used.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    coco.require_pycocotools()
    device = choose_device(options.device)
    backbone = open_backbone(options.weights, out, dn, options.seed)
    network, name = backbone.network, backbone.name
    train, val = options.sets()
    detector, hparams = options.detector(), options.hyperparameters()
    epochs = _epochs(hparams, len(train))
    extra = [name for name in ("boxes_only", "crowds_as_objects") if getattr(options, name)]
    key = fingerprint.digest(*network.parameters(), hparams, detector, train.digest, len(train), train.left_out, *extra)
    model = build_detector(backbone, len(train.categories), detector, hparams.seed, not options.boxes_only).to(device)
    training = DetectionTraining(model, hparams, device)
    print(
        f"{name}: {backbone.source}; {len(train):,} images, {train.instances:,} annotations; {normalization()}",
        flush=True,
    )

    def batches(start: int) -> Iterator[list[Instances]]:
        order = EpochSampler(len(train), hparams.batch_size, hparams.seed, epochs, start)
        return islice(training_batches(train, order, options.workers), hparams.steps - start)

    def measure() -> str:
        scores = evaluate(model, val, options.workers, device)
        return "  ".join(f"{kind} AP {_percent(scores[kind]['AP'])}" for kind in KINDS if kind in scores)

    folder = out / FOLDER / "detect" / f"{name}-{key}"
    loop.run(
        f"detector {name}",
        training,
        batches,
        folder,
        device,
        None,
        measure,
        options.evaluate_steps,
        [training.guard],
        options.stall_timeout,
    )
    return {
        "protocol": "detect",
        "dn": name,
        "from": backbone.source,
        "coco": options.coco,
        "train": {"annotations": options.train_annotations, **_counts(train)},
        "val": {"annotations": options.val_annotations, **_counts(val)},
        "hyperparameters": {
            **asdict(hparams),
            **asdict(detector),
            "keep_empty": options.keep_empty,
            "boxes_only": options.boxes_only,
            "normalization": normalization(),
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **evaluate(model, val, options.workers, device),
    }


def _epochs(hparams: Hyperparameters, images: int) -> int:
    """Number of epochs, rounded up; InputError if a batch is larger than the dataset."""
    return -(-hparams.steps // EpochSampler(images, hparams.batch_size, hparams.seed, 1).steps_per_epoch)


def _counts(part: CocoDataset) -> dict[str, int]:
    return {"images": len(part), "instances": part.instances, "left_out": len(part.left_out)}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def publish_detect(out: Path, report: Report) -> None:
    """Write the report to OUT/evaluation/detect and print it."""
    folder, dn = out / FOLDER / "detect", report["dn"]
    kinds = [kind for kind in KINDS if kind in report]
    name = "Mask" if "mask" in kinds else "Faster"
    title = (
        f"{name} R-CNN on {dn} ({report['from']}): {report['hyperparameters']['steps']:,} steps, "
        f"{report['val']['images']:,} images of {report['val']['annotations']}, AP in percent"
    )
    summary = Table(
        title,
        [dn, *MEASURES],
        [[kind, *(_percent(report[kind][measure]) for measure in MEASURES)] for kind in kinds],
    )
    categories = Table(
        "AP of each category, in percent",
        ["category", "instances", *kinds],
        [
            [category, f"{scores['instances']:,}", *(_percent(scores[kind]) for kind in kinds)]
            for category, scores in report["categories"].items()
        ],
    )
    atomic.write_text(folder / f"{dn}.json", json.dumps(report, indent=2) + "\n")
    atomic.write_text(folder / f"{dn}.md", f"{summary.markdown()}\n{categories.markdown()}")
    summary.show()
    categories.show()
    print(f"{folder}/{dn}.json, {dn}.md")


def make_parser() -> cli.ArgumentParser:
    """The parser of the command."""
    parser = cli.parser("detect", DESCRIPTION, EXAMPLE, "[options] --coco DIR OUT")
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="run directory of dspnet-pretrain, or with published --weights a folder for the results",
    )
    parser.add_argument("--dn", metavar="NAME", help="network of the run, such as w0.50; not with published --weights")
    cli.add_config_file(parser)
    cli.add_options(parser, DetectOptions)
    return parser


def _main(argv: Sequence[str]) -> None:
    parsed = make_parser().parse_args(argv)
    options = cli.to_config(DetectOptions, parsed)
    out: Path = parsed.out
    atomic.check_writable(out)
    publish_detect(out, detect(out, parsed.dn, options))


main = cli.command(_main)

if __name__ == "__main__":
    main()
