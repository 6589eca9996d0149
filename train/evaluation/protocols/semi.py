"""Semi-supervised evaluation: training with the labels of a few percent of the images of every class.

As in the paper's appendix A.3: linear classifiers on frozen representations (learning rate 0.02, 50 epochs, otherwise
as in linear evaluation), and fine-tuning of each network (learning rate 0.001, classifier 0.02).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.subnets import Family

from ...data.datasets.images import Subset, dataset_digest
from ...data.datasets.stratified import SEED, checksum, index_text, listed_subsets, stratified_subset
from ...data.sampler import EpochSampler
from ...data.views import augmentation
from ...distributed.process_group import end_sharing, refuse_ranks
from ...run import fingerprint, loop
from ...run.options import count, fraction, option, positive
from .. import supervised
from ..classifiers import Batch, Classifiers, ClassifierTraining, Hyperparameters, evaluate, feature_batches
from ..plot_data import points
from ..results import Report, accuracy_table, origin_of, publish
from ..supervised import SupervisedTraining, TrainingGroup, labelled_batches, new_classifier
from .common import FOLDER, EvaluationSetup
from .linear import ClassifierOptions

METHODS = ("linear", "finetune")
DESCRIPTION = """\
Train with the labels of a few images, by default 1 and 10 percent of each class. Two methods: `linear` trains a linear
classifier on the frozen representation of every network of a run; `finetune` cuts the networks out of the family and
fine-tunes each of them, all on the same batches. Writes OUT/evaluation/semi.json, semi.md and semi.png, and the indices
of the labelled images as semi-<share>-percent.txt, whose SHA-256 is in semi.json.

The subsets depend only on the labels and --subset-seed (docs/evaluation.md); smaller subsets are parts of larger ones.
After Ctrl-C the same command continues."""
EXAMPLE = """\
  dspnet-evaluate semi runs/first
  dspnet-evaluate semi runs/first --shares 10 --methods finetune
  dspnet-evaluate semi runs/first --config recipes/evaluate/semi_imagenet_50e.yaml --data DIR"""


@dataclass(kw_only=True)
class SemiOptions(ClassifierOptions):
    """Options of `train.evaluate semi`."""

    epochs: int = count(50, "linear: passes over the labelled images")
    lr: float = positive(0.02, "linear: learning rate per 256 images")
    subset_file: str = option(
        "",
        "lists of labelled images in place of --shares: files with an image's name per line, such as SimCLR's, "
        "separated by commas",
        metavar="FILES",
    )
    shares: str = option("1,10", "percentages of labelled images of each class", metavar="PERCENTS")
    subset_seed: int = option(SEED, "seed that draws the subsets of --shares")
    methods: str = option("linear,finetune", "linear and finetune, or one of them", metavar="METHODS")
    finetune_epochs: int = count(50, "finetune: passes over the labelled images")
    finetune_lr: float = positive(0.001, "finetune: learning rate of the network per 256 images")
    finetune_head_lr: float = positive(0.02, "finetune: learning rate of the classifier per 256 images")
    min_scale: float = fraction(0.08, "finetune: smallest area of a random crop, as a fraction of the image")

    def check(self) -> None:
        """Raise InputError for invalid values."""
        super().check()
        augmentation.supervised(augmentation.MIN_IMAGE_SIZE, self.min_scale)
        self.percents()
        self.chosen_methods()

    def percents(self) -> list[float]:
        """The percentages in ascending order; InputError if one is not between 0 and 100."""
        try:
            percents = sorted(float(share) for share in self.shares.split(","))
        except ValueError:
            percents = []
        if not percents or percents[0] <= 0 or percents[-1] > 100:
            raise InputError(f"--shares must be percentages such as 1,10, not {self.shares!r}")
        return percents

    def chosen_methods(self) -> list[str]:
        """The methods in the order of METHODS; InputError if one is unknown."""
        given = [name.strip() for name in self.methods.split(",")]
        if not set(given) <= set(METHODS):
            raise InputError(f"--methods must be among {', '.join(METHODS)}, not {self.methods!r}")
        return [name for name in METHODS if name in given]

    def hyperparameters(self, images: int) -> Hyperparameters:
        """Hyperparameters of linear classifiers for this many images."""
        return replace(super().hyperparameters(images), batch_size=fitting_batch(self.batch_size, images))

    def finetune_hyperparameters(self, images: int) -> supervised.Hyperparameters:
        """Hyperparameters of fine-tuning for this many images."""
        return supervised.Hyperparameters(
            self.finetune_epochs,
            fitting_batch(self.batch_size, images),
            self.finetune_lr,
            self.finetune_head_lr,
            self.momentum,
            seed=self.seed,
        )


def fitting_batch(largest: int, images: int) -> int:
    """A batch size up to `largest` that drops few images: 256 would drop 244 of 500 images in each epoch."""
    whole = min(largest, images)
    even = max(2, images // -(-images // whole))  # batch normalisation needs two images
    return min((whole, even), key=lambda size: images % size)


def evaluate_semi(out: Path, options: SemiOptions) -> Report:
    """Accuracies of all networks of a run for every percentage and method.

    Args:
        out: run directory.
        options: options of the protocol.

    Returns:
        The report that `publish_semi` writes.

    Raises:
        InputError: if the run or the images cannot be used.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    options.check()
    percents, methods = options.percents(), options.chosen_methods()
    if "finetune" in methods:
        refuse_ranks("--methods finetune runs in one process")
    setup = EvaluationSetup(out, options, trains=True)
    chosen = {p: stratified_subset(setup.train_labels, p / 100, options.subset_seed) for p in percents}
    if options.subset_file:
        chosen = listed_subsets(setup.train, options.subset_file.split(","))
        percents = list(chosen)
    subsets: dict[str, Any] = {}
    for percent, indices in chosen.items():
        file = f"semi-{percent:g}-percent.txt"
        if setup.world.is_main:
            atomic.write_text(out / FOLDER / file, index_text(indices))
        subsets[f"{percent:g} %"] = {
            "images": len(indices),
            "batch_size": fitting_batch(options.batch_size, len(indices)),
            "file": file,
            "sha256": checksum(indices),
        }
    networks: dict[str, dict[str, Any]] = {name: dict(costs) for name, costs in setup.networks.items()}
    found: dict[str, dict[str, Any]] = {}
    if "linear" in methods:
        found |= _linear(setup, options, chosen)
    if "finetune" in methods:
        for percent, indices in chosen.items():
            found[_column(percent, "finetune")] = _finetune(setup, options, percent, indices)
    for column in (_column(percent, method) for percent in percents for method in methods):
        for name, network in networks.items():
            network[column] = asdict(found[column][name])
    return {
        "protocol": "semi",
        "data": setup.data,
        "test_images": len(setup.test),
        **setup.origin,
        **({"subset_files": options.subset_file} if options.subset_file else {"subset_seed": options.subset_seed}),
        "subsets": subsets,
        "hyperparameters": {
            **({"linear": asdict(options.hyperparameters(options.batch_size))} if "linear" in methods else {}),
            **(
                {"finetune": asdict(options.finetune_hyperparameters(options.batch_size))}
                if "finetune" in methods
                else {}
            ),
        },
        "networks": networks,
    }


def _column(percent: float, method: str) -> str:
    return f"{percent:g} % {method}"


def _linear(setup: EvaluationSetup, options: SemiOptions, chosen: dict[float, list[int]]) -> dict[str, Any]:
    """Accuracies of linear classifiers; features are computed for the largest subset, which contains the others."""
    trained, device = setup.trained, setup.trained.device
    subnets = list(trained.family)
    trained.measure_statistics(subnets, setup.train, setup.data, options.workers)
    test = trained.features(subnets, setup.test, "test", options.workers)
    largest = list(dict.fromkeys(itertools.chain(chosen[max(chosen)], *chosen.values())))  # others may be no parts
    images = Subset(setup.train, largest)
    features = trained.features(subnets, images, f"{max(chosen):g}-percent", options.workers)
    end_sharing(setup.world)
    place = {index: row for row, index in enumerate(largest)}
    found = {}
    for percent, indices in chosen.items():
        rows = [place[index] for index in indices]
        train = {name: table[rows] for name, table in features.items()}
        labels = setup.train_labels[indices]
        hparams = options.hyperparameters(len(indices))
        order = EpochSampler(len(indices), hparams.batch_size, hparams.seed, hparams.epochs)
        classifiers = Classifiers({s.name: s.channels[-1] for s in subnets}, setup.classes, hparams.seed)
        training = ClassifierTraining(classifiers.to(device), hparams, order.steps_per_epoch)

        def batches(
            start: int, train: dict[str, Tensor] = train, labels: Tensor = labels, hparams: Hyperparameters = hparams
        ) -> Iterable[Batch]:
            order = EpochSampler(len(labels), hparams.batch_size, hparams.seed, hparams.epochs, start)
            return feature_batches(train, labels, order, device)

        key = fingerprint.digest(trained.weights, dataset_digest(images), indices, asdict(hparams))
        folder = trained.out / FOLDER / "classifiers" / f"semi-{key}"
        loop.run(f"classifiers {percent:g} %", training, batches, folder, device)
        found[_column(percent, "linear")] = evaluate(classifiers, test, setup.test_labels, device)
    return found


def _finetune(setup: EvaluationSetup, options: SemiOptions, percent: float, indices: list[int]) -> dict[str, Any]:
    """Accuracies of networks cut out of the family and fine-tuned separately on the same batches."""
    trained, device = setup.trained, setup.trained.device
    size = trained.image_size
    images = Subset(setup.train, indices)
    hparams = options.finetune_hyperparameters(len(indices))

    def order(start: int = 0) -> EpochSampler:
        return EpochSampler(len(images), hparams.batch_size, hparams.seed, hparams.epochs, start)

    view = augmentation.supervised(size, options.min_scale)
    models = {s.name: new_classifier(trained.cut(s), setup.classes, hparams.seed).to(device) for s in trained.family}
    training = TrainingGroup(
        {
            s.name: SupervisedTraining(models[s.name], Family([s]), hparams, order().steps_per_epoch)
            for s in trained.family
        }
    )
    key = fingerprint.digest(trained.weights, dataset_digest(images), asdict(hparams), options.min_scale)
    loop.run(
        f"fine-tuning {percent:g} %",
        training,
        lambda start: labelled_batches(images, view, order(start), options.workers, device),
        trained.out / FOLDER / "finetuned" / f"semi-{key}",
        device,
        guards=[one.guard for one in training.trainings.values()],
    )
    return supervised.evaluate(
        {s.name: (models[s.name], [s]) for s in trained.family}, images, setup.test, size, options.workers, device
    )


def publish_semi(out: Path, report: Report) -> None:
    """Write the report to OUT/evaluation and print it."""
    networks = report["networks"]
    columns = [column for column in next(iter(networks.values())) if "%" in column]
    images = ", ".join(f"{share} is {subset['images']:,} images" for share, subset in report["subsets"].items())
    title = (
        f"Semi-supervised evaluation on {report['data']}: {images}; {report['test_images']:,} test images, "
        f"{origin_of(report)}"
    )
    series = {column: points(networks, column) for column in reversed(columns)}
    table = accuracy_table(title, networks, columns)
    publish(out / FOLDER, "semi", report, table, "accuracy", series)
