"""Dense linear probe: a linear classifier of pixels on frozen feature maps, for images with masks.

A 1 x 1 convolution on the last feature map, whose channels are normalised, classifies every position; the logits are
resized bilinearly to the pixels of the view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspnet_fast.errors import InputError

from ...data.datasets.images import dataset_digest
from ...data.datasets.masks import UNKNOWN, open_masked
from ...data.datasets.pixels import PixelFormat
from ...data.mask_loader import mask_views
from ...data.pixel_options import read_as
from ...data.sampler import EpochSampler
from ...distributed.process_group import end_sharing
from ...run import fingerprint, loop
from ...run.options import TWO_IMAGES, count, option, positive
from ...run.progress import Monitor
from ...run.tables import Table, cost_cells, percent
from ..classifiers import Batch, ClassifierTraining, feature_batches
from ..overlap import Overlap, overlap, pixel_counts
from ..plot_data import points
from ..pretrained import EvaluatedFamily, PretrainedFamily
from ..published import PublishedNetwork
from ..results import Report, origin_of, publish
from ..verdict import UNTRAINED, Baseline, Score, Verdict, judge
from .common import FOLDER, EvaluationOptions, EvaluationSetup
from .linear import ClassifierOptions

MAX_CLASSES = 250  # more are instances, depths or colours
LARGEST_VALUE = 65535
TEST_BATCH = 16  # images
MAJORITY = "majority class"
DESCRIPTION = """\
Train a linear classifier of pixels on the frozen last feature map of every network of a run, all on the same batches,
and on that of untrained networks. --data is a folder of images beside a folder of masks, PNG files with the index of a
class in every pixel, as VOC, ADE20K and Cityscapes have them, or has COCO's layout. Writes the mean intersection over
union to OUT/evaluation/dense.json, dense.md and dense.png.

The shorter side of images and masks is resized and the centre cropped. Feature maps are computed once and saved in
OUT/features, which may be deleted. After Ctrl-C the same command continues."""
EXAMPLE = """\
  dspnet-evaluate dense runs/first --data VOCdevkit/VOC2012
  dspnet-evaluate dense runs/first --data ADEChallengeData2016 --ignore-labels 0,255
  dspnet-evaluate dense runs/first --data cells --masks annotated --epochs 50"""


@dataclass(kw_only=True)
class DenseOptions(ClassifierOptions):
    """Options of `train.evaluate dense`."""

    masks: str = option(
        "", "name of the folder of masks beside the folder of images [recognised: masks, labels, ...]", metavar="NAME"
    )
    ignore_labels: str = option(
        str(UNKNOWN), "values of pixels that are neither trained on nor counted, or none", metavar="VALUES"
    )
    epochs: int = count(20, "passes over the images")
    batch_size: int = option(16, "largest number of images per step", rule=TWO_IMAGES)
    lr: float = positive(1.6, "learning rate per 256 images: the peak is --lr * --batch-size / 256")

    def ignored(self) -> list[int]:
        """The values in `ignore_labels`."""
        try:
            return [] if self.ignore_labels == "none" else [int(value) for value in self.ignore_labels.split(",")]
        except ValueError as error:
            raise InputError(f"--ignore-labels {self.ignore_labels!r}: give whole numbers, or none") from error

    def check(self) -> None:
        """Raise InputError for invalid values."""
        super().check()
        self.ignored()


class DenseSetup(EvaluationSetup):
    """A family and images with masks; attributes as of `EvaluationSetup`, but `masked` in place of labels.

    Attributes:
        masked: training and test images with masks.
    """

    def open_splits(self, out: Path, options: EvaluationOptions, format: PixelFormat) -> None:
        """Open both splits, and check that the networks have feature maps."""
        assert isinstance(options, DenseOptions)
        self.masked = open_masked(self.data, "train", options.masks), open_masked(self.data, "test", options.masks)
        if self.masked[0].names != self.masked[1].names:
            raise InputError(f"the training and the test images of {self.data} have different categories")
        self.train, self.test = (read_as(one.images, format) for one in self.masked)
        if len(self.train) < 2 or not len(self.test):
            raise InputError(
                f"{self.data} has {len(self.train)} training and {len(self.test)} test images with masks: give at "
                "least two and one"
            )
        try:
            if isinstance(self.trained, PublishedNetwork):
                self.trained.map_shape(self.trained.family.full)
            else:
                _ = self.trained.encoder.dense_features
        except InputError as error:
            raise InputError(f"a dense probe needs a feature map: {error}") from error


class DenseClassifiers(nn.Module):
    """Linear classifiers of pixels of several networks.

    Args:
        shapes: channels, height and width of the feature map of each network.
        classes: number of classes C.
        image_size: height and width S of the views.
        seed: seed of the weights.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], classes: int, image_size: int, seed: int) -> None:
        super().__init__()
        self.shapes, self.image_size = dict(shapes), image_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, classes, 1))
                for channels, _, _ in shapes.values()
            )

    def forward(self, features: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Logits [B, C, S, S] of features [B, F * h * w], one network after another: together they are large."""
        for (name, shape), layer in zip(self.shapes.items(), self.layers, strict=True):
            logits = layer(features[name].unflatten(1, shape))
            yield name, F.interpolate(logits, (self.image_size, self.image_size), mode="bilinear")


class DenseTraining(ClassifierTraining):
    """Training of classifiers of pixels; implements `train.run.loop.Training`."""

    def train_step(self, batch: Batch) -> Tensor:
        """Train one step; returns the mean loss of the networks."""
        features, targets = batch
        self.classifiers.train()
        self._optimizer.zero_grad()
        losses = []
        for _, logits in self.classifiers(features):
            loss = F.cross_entropy(logits, targets.long(), ignore_index=UNKNOWN)
            loss.backward()
            losses.append(loss.detach())
        self.update()
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Targets:
    """Classes of the pixels of the views.

    Attributes:
        values: value in the masks of each class.
        names: names of the classes.
        train: uint8 [N, S, S], index of the class, or UNKNOWN.
        test: likewise of the test images.
    """

    values: list[int]
    names: list[str]
    train: Tensor
    test: Tensor


def load_targets(setup: DenseSetup, options: DenseOptions) -> Targets:
    """Load the views of all masks.

    Raises:
        InputError: a mask is none or does not fit its image, or there are too few or too many classes.
    """
    size, workers = setup.trained.image_size, options.workers
    views = [
        mask_views(masked, size, f"masks of {split}", workers)
        for masked, split in zip(setup.masked, ("train", "test"), strict=True)
    ]
    found = sorted({value for view in views for value in view.unique().tolist()})
    ignored = options.ignored()
    values = [value for value in found if value not in ignored]
    if found[0] < 0 or found[-1] > LARGEST_VALUE or len(values) > MAX_CLASSES:
        raise InputError(
            f"the masks of {setup.data} have {len(values):,} values from {found[0]} to {found[-1]:,}: these are no "
            f"indices of at most {MAX_CLASSES} classes, but perhaps instances, depths or smoothed edges"
        )
    if len(values) < 2:
        listed = ", ".join(map(str, found))
        raise InputError(
            f"the masks of {setup.data} have the values {listed}, of which --ignore-labels {options.ignore_labels} "
            "leaves fewer than two classes: give --ignore-labels none, or masks of several classes"
        )
    table = torch.full((LARGEST_VALUE + 1,), UNKNOWN, dtype=torch.uint8)
    table[values] = torch.arange(len(values), dtype=torch.uint8)
    train, test = (table[view.long()] for view in views)
    for targets, images in ((train, setup.train), (test, setup.test)):
        if (empty := (targets == UNKNOWN).flatten(1).all(1)).any():
            raise InputError(
                f"{int(empty.sum()):,} of {len(images):,} masks have no class but --ignore-labels "
                f"{options.ignore_labels}, such as that of {images.file(int(empty.nonzero()[0]))}: take them out"
            )
    names = setup.masked[0].names
    return Targets(values, [names.get(value, str(value)) for value in values], train, test)


def evaluate_dense(out: Path, options: DenseOptions) -> Report:
    """Mean IoU of linear classifiers of pixels on all networks of a run.

    Args:
        out: run directory.
        options: options of the protocol.

    Returns:
        The report that `publish_dense` writes.

    Raises:
        InputError: if the run, the images or the masks cannot be used.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    options.check()
    setup = DenseSetup(out, options)
    trained, device = setup.trained, setup.trained.device
    loaded = load_targets(setup, options) if setup.world.is_main else None  # the other ranks compute features only
    families: dict[str, EvaluatedFamily] = {"": trained}
    if not options.published:
        families[f"{UNTRAINED} "] = PretrainedFamily(out, device, True, setup.world)
    shapes: dict[str, tuple[int, int, int]] = {}
    train: dict[str, Tensor] = {}
    test: dict[str, Tensor] = {}
    for prefix, family in families.items():
        subnets = list(family.family)
        family.measure_statistics(subnets, setup.train, setup.data, options.workers, prefix)
        shapes |= {f"{prefix}{subnet}": family.map_shape(subnet) for subnet in subnets}
        for features, images, split in ((train, setup.train, "train"), (test, setup.test, "test")):
            maps = family.features(subnets, images, f"{prefix}{split}", options.workers, maps=True)
            features.update({f"{prefix}{name}": table for name, table in maps.items()})
    end_sharing(setup.world)
    assert loaded is not None
    targets = loaded
    hparams = options.hyperparameters(len(setup.train))

    def order(start: int = 0) -> EpochSampler:
        return EpochSampler(len(setup.train), hparams.batch_size, hparams.seed, hparams.epochs, start)

    classifiers = DenseClassifiers(shapes, len(targets.values), trained.image_size, hparams.seed).to(device)
    training = DenseTraining(classifiers, hparams, order().steps_per_epoch)
    weights = [family.weights for family in families.values()]
    key = fingerprint.digest(*weights, dataset_digest(setup.train), targets.train, asdict(hparams))
    folder = out / FOLDER / "classifiers" / f"dense-{key}"
    loop.run(
        "classifiers",
        training,
        lambda start: feature_batches(train, targets.train, order(start), device),
        folder,
        device,
    )
    found = _evaluate(classifiers, test, targets, device)
    networks = {
        name: {
            **costs,
            "dense": asdict(found[name]),
            **({} if options.published else {UNTRAINED: asdict(found[f"{UNTRAINED} {name}"])}),
        }
        for name, costs in setup.networks.items()
    }
    report = {
        "protocol": "dense",
        "data": setup.data,
        "train_images": len(setup.train),
        "test_images": len(setup.test),
        "classes": dict(zip(targets.names, targets.values, strict=True)),
        "ignored": options.ignored(),
        **setup.origin,
        "hyperparameters": asdict(hparams),
        "map": {name: list(shape) for name, shape in shapes.items() if not name.startswith(UNTRAINED)},
        "networks": networks,
        "majority_class": _majority(targets),
    }
    report["verdict"] = _verdict(report).to_json()
    return report


@torch.no_grad()
def _evaluate(
    classifiers: DenseClassifiers, features: Mapping[str, Tensor], targets: Targets, device: torch.device
) -> dict[str, Overlap]:
    classifiers.eval()
    counts: dict[str, list[Tensor]] = {name: [] for name in classifiers.shapes}
    starts = range(0, len(targets.test), TEST_BATCH)
    with Monitor("pixels", len(starts)) as monitor:
        for start in starts:
            rows = slice(start, start + TEST_BATCH)
            wanted = targets.test[rows].to(device)
            for name, logits in classifiers({name: table[rows].to(device) for name, table in features.items()}):
                counts[name].append(pixel_counts(logits.argmax(1), wanted, len(targets.values)).cpu())
            monitor.advance()
    return {name: overlap(torch.cat(parts), targets.names) for name, parts in counts.items()}


def _majority(targets: Targets) -> dict[str, Any]:
    """The overlap if every pixel is predicted to be of the most frequent class of the training images."""
    known = targets.train[targets.train != UNKNOWN].long()
    largest = int(torch.bincount(known, minlength=len(targets.values)).argmax())
    parts = [
        pixel_counts(torch.full(part.shape, largest), part, len(targets.values))
        for part in targets.test.split(TEST_BATCH)
    ]
    return {"class": targets.names[largest], **asdict(overlap(torch.cat(parts), targets.names))}


def _verdict(report: Report) -> Verdict:
    def score(found: Mapping[str, Any]) -> Score:
        return Score(found["mean_iou"], found["interval"])

    networks = report["networks"]
    baselines = [Baseline(MAJORITY, score(report["majority_class"]))]
    if UNTRAINED in next(iter(networks.values())):
        untrained = {name: score(network[UNTRAINED]) for name, network in networks.items()}
        baselines.insert(0, Baseline(UNTRAINED, untrained))
    on = f"mean IoU on {report['test_images']:,} images"
    return judge({name: score(network["dense"]) for name, network in networks.items()}, baselines, on)


def _table(report: Report) -> Table:
    networks = report["networks"]
    states = [state for state in ("dense", UNTRAINED) if state in next(iter(networks.values()))]
    heading = ["network", "params", "MACs", "mean IoU", "pixels", *(["untrained", "pixels"] if states[1:] else [])]
    rows = [[name, *cost_cells(network), *_cells(network, states)] for name, network in networks.items()]
    majority = report["majority_class"]
    name = f"{MAJORITY}, {majority['class']}"
    rows.append([name, "", "", *_cells({"dense": majority}, ["dense"]), *([""] * (2 * len(states) - 2))])
    hparams = report["hyperparameters"]
    title = (
        f"Linear classifiers of pixels on {report['data']}: {len(report['classes'])} classes, "
        f"{report['train_images']:,} images, {hparams['epochs']} epochs, {report['test_images']:,} test images, "
        f"{origin_of(report)}. ± is the half-width of the 95 % interval over test images"
    )
    return Table(f"{title}.", heading, rows)


def _cells(results: Mapping[str, Any], states: list[str]) -> list[str]:
    cells = []
    for state in states:
        found = results[state]
        cells += [percent(found["mean_iou"], found["interval"]), percent(found["pixel_accuracy"])]
    return cells


def publish_dense(out: Path, report: Report) -> None:
    """Write the report to OUT/evaluation and print it."""
    networks = report["networks"]
    states = {"dense": "pretrained", UNTRAINED: UNTRAINED}
    series = {
        label: points(networks, state, "mean_iou")
        for state, label in states.items()
        if state in next(iter(networks.values()))
    }
    lines = {MAJORITY: report["majority_class"]["mean_iou"]}
    publish(out / FOLDER, "dense", report, _table(report), "mean IoU", series, lines)
    print(*report["verdict"]["details"], report["verdict"]["conclusion"], sep="\n")
