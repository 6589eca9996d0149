"""Semi-supervised evaluation: labels of a small share of the images, the same share of every class.

The paper's appendix A.3: linear classifiers on frozen representations (learning rate 0.02, 50 epochs, else as in linear
evaluation), and fine-tuning of each network alone (0.001 for the network, 0.02 for its classifier).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.subnets import Family

from ...config import option, positive
from ...data.datasets.images import Subset, dataset_digest
from ...data.datasets.stratified import SEED, checksum, index_text, stratified_subset
from ...data.sampler import EpochSampler
from ...data.views import augmentation
from ...run import fingerprint, loop
from .. import supervised
from ..classifiers import Batch, Classifiers, ClassifierTraining, Hyperparameters, evaluate, kept_batches
from ..plot_data import points
from ..results import Report, accuracy_table, publish
from ..supervised import SupervisedTraining, Together, labelled_batches, new_classifier
from .common import FOLDER, Subject
from .linear import ClassifierOptions

METHODS = ("linear", "finetune")
DESCRIPTION = """\
Give every desired network of a run the labels of a few images, by default 1 and 10 percent of each class: train a
linear classifier on its frozen representation (linear), and fine-tune the network itself, cut out of the family
(finetune; all networks from the same batches). Writes OUT/evaluation/semi.json, semi.md and semi.png, and the images
that were chosen, by their place in the set, as semi-<share>-percent.txt; semi.json has the SHA-256 of each list.

The subsets are a function of the labels and --subset-seed (docs/evaluation.md); the smaller is part of the larger.
After Ctrl-C the same command goes on from there."""
EXAMPLE = """\
  dspnet-evaluate semi runs/first
  dspnet-evaluate semi runs/first --shares 10 --methods finetune
  dspnet-evaluate semi runs/first --config recipes/evaluate/semi_imagenet_50e.yaml --data DIR"""


@dataclass(kw_only=True)
class SemiOptions(ClassifierOptions):
    """Options of `train.evaluate semi`."""

    epochs: int = option(50, "linear: passes over the chosen images")
    lr: float = option(0.02, "linear: learning rate for 256 images")
    shares: str = option("1,10", "percent of the images of each class whose labels are given")
    subset_seed: int = option(SEED, "seed of the choice of images; the published one by default")
    methods: str = option("linear,finetune", "what to do with them")
    finetune_epochs: int = option(50, "finetune: passes over the chosen images")
    finetune_lr: float = option(0.001, "finetune: learning rate of the network for 256 images")
    finetune_head_lr: float = option(0.02, "finetune: learning rate of its classifier for 256 images")
    min_scale: float = option(0.08, "finetune: smallest share of the image's area that a random crop takes")

    def check(self) -> None:
        """Raise InputError for values that no evaluation can have."""
        super().check()
        positive(finetune_epochs=self.finetune_epochs, finetune_lr=self.finetune_lr)
        positive(finetune_head_lr=self.finetune_head_lr)
        augmentation.supervised(augmentation.MIN_IMAGE_SIZE, self.min_scale)
        self.percents()
        self.chosen_methods()

    def percents(self) -> list[float]:
        """The shares, ascending; InputError if one is no number above 0 and at most 100."""
        try:
            percents = sorted(float(share) for share in self.shares.split(","))
        except ValueError:
            percents = []
        if not percents or percents[0] <= 0 or percents[-1] > 100:
            raise InputError(f"--shares are percents such as 1,10, not {self.shares!r}")
        return percents

    def chosen_methods(self) -> list[str]:
        """The methods in their own order; InputError if one is unknown."""
        given = [name.strip() for name in self.methods.split(",")]
        if not set(given) <= set(METHODS):
            raise InputError(f"--methods are of {', '.join(METHODS)}, not {self.methods!r}")
        return [name for name in METHODS if name in given]

    def recipe(self, images: int) -> Hyperparameters:
        """Of a linear classifier for this many images."""
        return replace(super().recipe(images), batch_size=fitting_batch(self.batch_size, images))

    def finetuning(self, images: int) -> supervised.Hyperparameters:
        """For this many images."""
        return supervised.Hyperparameters(
            self.finetune_epochs,
            fitting_batch(self.batch_size, images),
            self.finetune_lr,
            self.finetune_head_lr,
            self.momentum,
            seed=self.seed,
        )


def fitting_batch(largest: int, images: int) -> int:
    """A batch size of at most `largest` that leaves out few images of an epoch: of 500 with 256 there would be 244."""
    whole = min(largest, images)
    even = images // -(-images // whole)
    return min((whole, even), key=lambda size: images % size)


def evaluate_semi(out: Path, options: SemiOptions) -> Report:
    """Accuracies of each subnet of the run in `out` for every share and method; returns what semi.json holds.

    Raises InputError if the run or the images cannot be used.
    """
    options.check()
    subject = Subject(out, options)
    percents, methods = options.percents(), options.chosen_methods()
    chosen = {p: stratified_subset(subject.train_labels, p / 100, options.subset_seed) for p in percents}
    subsets: dict[str, Any] = {}
    for percent, indices in chosen.items():
        file = f"semi-{percent:g}-percent.txt"
        atomic.write_text(out / FOLDER / file, index_text(indices))
        subsets[f"{percent:g} %"] = {
            "images": len(indices),
            "batch_size": fitting_batch(options.batch_size, len(indices)),
            "file": file,
            "sha256": checksum(indices),
        }
    networks: dict[str, dict[str, Any]] = {name: dict(costs) for name, costs in subject.networks.items()}
    found: dict[str, dict[str, Any]] = {}
    if "linear" in methods:
        found |= _linear(subject, options, chosen)
    if "finetune" in methods:
        for percent, indices in chosen.items():
            found[_column(percent, "finetune")] = _finetune(subject, options, percent, indices)
    for column in (_column(percent, method) for percent in percents for method in methods):
        for name, network in networks.items():
            network[column] = asdict(found[column][name])
    return {
        "protocol": "semi",
        "data": subject.data,
        "test_images": len(subject.test),
        "step": subject.trained.step,
        "subset_seed": options.subset_seed,
        "subsets": subsets,
        "recipe": {
            **({"linear": asdict(options.recipe(options.batch_size))} if "linear" in methods else {}),
            **({"finetune": asdict(options.finetuning(options.batch_size))} if "finetune" in methods else {}),
        },
        "networks": networks,
    }


def _column(percent: float, method: str) -> str:
    return f"{percent:g} % {method}"


def _linear(subject: Subject, options: SemiOptions, chosen: dict[float, list[int]]) -> dict[str, Any]:
    """Features of the largest subset, which contains the others, are computed once."""
    trained, device = subject.trained, subject.trained.device
    subnets = list(trained.family)
    trained.measure(subnets, subject.train, subject.data, options.workers)
    test = trained.features(subnets, subject.test, "test", options.workers)
    largest = chosen[max(chosen)]
    images = Subset(subject.train, largest)
    features = trained.features(subnets, images, f"{max(chosen):g}-percent", options.workers)
    place = {index: row for row, index in enumerate(largest)}
    found = {}
    for percent, indices in chosen.items():
        rows = [place[index] for index in indices]
        train = {name: of[rows] for name, of in features.items()}
        labels = subject.train_labels[indices]
        recipe = options.recipe(len(indices))
        order = EpochSampler(len(indices), recipe.batch_size, recipe.seed, recipe.epochs)
        classifiers = Classifiers({s.name: s.channels[-1] for s in subnets}, subject.classes, recipe.seed)
        training = ClassifierTraining(classifiers.to(device), recipe, order.steps_per_epoch)

        def batches(
            start: int, train: dict[str, Tensor] = train, labels: Tensor = labels, recipe: Hyperparameters = recipe
        ) -> Iterable[Batch]:
            order = EpochSampler(len(labels), recipe.batch_size, recipe.seed, recipe.epochs, start)
            return kept_batches(train, labels, order, device)

        key = fingerprint.digest(trained.weights, dataset_digest(images), indices, asdict(recipe))
        folder = trained.out / FOLDER / "classifiers" / f"semi-{key}"
        loop.run(f"classifiers {percent:g} %", training, batches, folder, device)
        found[_column(percent, "linear")] = evaluate(classifiers, test, subject.test_labels, device)
    return found


def _finetune(subject: Subject, options: SemiOptions, percent: float, indices: list[int]) -> dict[str, Any]:
    """Every network cut out and trained by itself, all on the same batches."""
    trained, device = subject.trained, subject.trained.device
    size = trained.config.image_size
    images = Subset(subject.train, indices)
    recipe = options.finetuning(len(indices))

    def order(start: int = 0) -> EpochSampler:
        return EpochSampler(len(images), recipe.batch_size, recipe.seed, recipe.epochs, start)

    view = augmentation.supervised(size, options.min_scale)
    models = {s.name: new_classifier(trained.cut(s), subject.classes, recipe.seed).to(device) for s in trained.family}
    training = Together(
        {
            s.name: SupervisedTraining(models[s.name], Family([s]), recipe, order().steps_per_epoch)
            for s in trained.family
        }
    )
    key = fingerprint.digest(trained.weights, dataset_digest(images), asdict(recipe), options.min_scale)
    loop.run(
        f"fine-tuning {percent:g} %",
        training,
        lambda start: labelled_batches(images, view, order(start), options.workers, device),
        trained.out / FOLDER / "finetuned" / f"semi-{key}",
        device,
    )
    return supervised.evaluate(
        {s.name: (models[s.name], [s]) for s in trained.family}, images, subject.test, size, options.workers, device
    )


def publish_semi(out: Path, report: Report) -> None:
    """Write and print the report."""
    networks = report["networks"]
    columns = [column for column in next(iter(networks.values())) if "%" in column]
    images = ", ".join(f"{share} is {subset['images']:,} images" for share, subset in report["subsets"].items())
    title = (
        f"Semi-supervised evaluation on {report['data']}: {images}; {report['test_images']:,} test images, after "
        f"{report['step']:,} steps"
    )
    series = {column: points(networks, column) for column in reversed(columns)}
    table = accuracy_table(title, networks, columns)
    publish(out / FOLDER, "semi", report, table, f"accuracy on {report['data']}", series)
