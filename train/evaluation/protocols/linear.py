"""Linear evaluation: a linear classifier on the frozen representation of every network (the paper's appendix A.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dspnet_fast.errors import InputError

from ...config import option, positive
from ...data.datasets.images import dataset_digest
from ...data.loader import one_view_batches
from ...data.normalization import normalize
from ...data.sampler import EpochSampler
from ...data.views import augmentation
from ...run import fingerprint, loop
from ..classifiers import Batch, Classifiers, ClassifierTraining, Hyperparameters, evaluate, kept_batches
from ..features import representations
from ..plot_data import points
from ..results import Report, accuracy_table, publish
from .common import FOLDER, EvaluationOptions, Subject

DESCRIPTION = """\
Train a linear classifier on the frozen representation of every desired network of a run, all from the same batches.
Writes OUT/evaluation/linear.json, linear.md and linear.png.

By default features are of the images' evaluation views: computed once per network, kept in OUT/features (which may be
deleted), and read in every epoch. --augment is the paper's: random crops and flips, a new one of each image in every
epoch, so that each of them costs a pass of all networks over the images, 80 times as much by default.
After Ctrl-C the same command goes on from there."""
EXAMPLE = """\
  dspnet-evaluate linear runs/first
  dspnet-evaluate linear runs/first --config recipes/evaluate/linear_imagenet_80e.yaml --data DIR"""


@dataclass(kw_only=True)
class ClassifierOptions(EvaluationOptions):
    """classifier"""

    epochs: int = option(80, "passes over the images")
    batch_size: int = option(256, "images per step, at most")
    lr: float = option(0.2, "learning rate for 256 images; the peak is lr * batch_size / 256, then a cosine to 0")
    momentum: float = option(0.9, "SGD momentum")
    seed: int = option(0, "seed of the classifiers' weights, of order and augmentation")

    def check(self) -> None:
        """Raise InputError for values that no training can have."""
        positive(epochs=self.epochs, batch_size=self.batch_size, lr=self.lr)
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum lies between 0 and 1, not at {self.momentum}")

    def recipe(self, images: int) -> Hyperparameters:
        """For a training set of this size."""
        return Hyperparameters(self.epochs, min(self.batch_size, images), self.lr, self.momentum, self.seed)


@dataclass(kw_only=True)
class LinearOptions(ClassifierOptions):
    """Options of `train.evaluate linear`."""

    augment: bool = option(False, "train on random crops and flips instead of kept features, as the paper does")
    min_scale: float = option(0.08, "smallest share of the image's area that such a crop takes")

    def check(self) -> None:
        """Raise InputError for values that no training can have."""
        super().check()
        augmentation.supervised(augmentation.MIN_IMAGE_SIZE, self.min_scale)


def evaluate_linear(out: Path, options: LinearOptions) -> Report:
    """The accuracy of linear classifiers for each subnet of the run in `out`; returns what linear.json holds.

    Raises InputError if the run or the images cannot be used.
    """
    options.check()
    subject = Subject(out, options)
    trained = subject.trained
    subnets = list(trained.family)
    trained.measure(subnets, subject.train, subject.data, options.workers)
    test = trained.features(subnets, subject.test, "test", options.workers)
    recipe = options.recipe(len(subject.train))

    def order(start: int = 0) -> EpochSampler:
        return EpochSampler(len(subject.train), recipe.batch_size, recipe.seed, recipe.epochs, start)

    if options.augment:
        view = augmentation.supervised(trained.config.image_size, options.min_scale)

        def batches(start: int) -> Iterable[Batch]:
            return _augmented(subject, view, order(start), options)
    else:
        train = trained.features(subnets, subject.train, "train", options.workers)

        def batches(start: int) -> Iterable[Batch]:
            return kept_batches(train, subject.train_labels, order(start), trained.device)

    classifiers = Classifiers({s.name: s.channels[-1] for s in subnets}, subject.classes, recipe.seed)
    training = ClassifierTraining(classifiers.to(trained.device), recipe, order().steps_per_epoch)
    view_key = (options.min_scale,) if options.augment else ()
    key = fingerprint.digest(trained.weights, dataset_digest(subject.train), asdict(recipe), view_key)
    loop.run("classifiers", training, batches, out / FOLDER / "classifiers" / f"linear-{key}", trained.device)
    found = evaluate(classifiers, test, subject.test_labels, trained.device)
    return {
        "protocol": "linear",
        "data": subject.data,
        "train_images": len(subject.train),
        "test_images": len(subject.test),
        "step": trained.step,
        "recipe": {**asdict(recipe), "augment": options.augment, "min_scale": options.min_scale},
        "networks": {name: {**costs, "linear": asdict(found[name])} for name, costs in subject.networks.items()},
    }


def _augmented(
    subject: Subject, view: augmentation.ViewSpec, order: EpochSampler, options: LinearOptions
) -> Iterator[Batch]:
    """Features of new random crops, computed batch by batch."""
    trained, device = subject.trained, subject.trained.device
    loader = one_view_batches(subject.train, view, order, options.workers)
    pixels = (normalize(batch.to(device, non_blocking=True)) for batch in loader)
    features = representations(trained.encoder, trained.family, pixels)
    for of_batch, items in zip(features, order, strict=True):
        yield of_batch, subject.train_labels[[i for _, i in items]].to(device)


def publish_linear(out: Path, report: Report) -> None:
    """Write and print the report."""
    recipe = report["recipe"]
    title = (
        f"Linear evaluation on {report['data']}: {report['train_images']:,} images, {recipe['epochs']} epochs on "
        f"{'random crops' if recipe['augment'] else 'kept features'}, {report['test_images']:,} test images, after "
        f"{report['step']:,} steps"
    )
    table = accuracy_table(title, report["networks"], ["linear"])
    series = {"linear": points(report["networks"], "linear")}
    publish(out / FOLDER, "linear", report, table, f"linear accuracy on {report['data']}", series)
