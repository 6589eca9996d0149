"""Linear evaluation: linear classifiers on frozen representations (the paper's appendix A.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ...data.datasets.images import dataset_digest
from ...data.loader import one_view_batches
from ...data.normalization import prepare
from ...data.sampler import EpochSampler
from ...data.views import augmentation
from ...distributed.process_group import end_sharing, refuse_ranks
from ...run import fingerprint, loop
from ...run.options import TWO_IMAGES, below_one, check_options, count, fraction, option, positive
from ..classifiers import Batch, Classifiers, ClassifierTraining, Hyperparameters, evaluate, feature_batches
from ..features import representations
from ..plot_data import points
from ..results import Report, accuracy_table, origin_of, publish
from .common import FOLDER, EvaluationOptions, EvaluationSetup

DESCRIPTION = """\
Train a linear classifier on the frozen representation of every network of a run, all on the same batches.
Writes OUT/evaluation/linear.json, linear.md and linear.png.

By default, features of images without augmentation are computed once and saved in OUT/features, which may be deleted.
With --augment, as in the paper, classifiers learn from random crops and flips: every epoch computes new features, which
takes about 80 times as long with 80 epochs. After Ctrl-C the same command continues."""
EXAMPLE = """\
  dspnet-evaluate linear runs/first
  dspnet-evaluate linear runs/first --config recipes/evaluate/linear_imagenet_80e.yaml --data DIR
  dspnet-evaluate linear runs/resnet18 --weights torchvision:resnet18=moco.pth --data DIR"""


@dataclass(kw_only=True)
class ClassifierOptions(EvaluationOptions):
    """classifier"""

    epochs: int = count(80, "passes over the images")
    batch_size: int = option(256, "largest number of images per step", rule=TWO_IMAGES)
    lr: float = positive(0.2, "learning rate per 256 images: the peak is --lr * --batch-size / 256")
    momentum: float = below_one(0.9, "SGD momentum")
    seed: int = option(0, "seed of classifier weights, order and augmentation")

    def check(self) -> None:
        """Raise InputError for invalid values."""
        check_options(self)

    def hyperparameters(self, images: int) -> Hyperparameters:
        """Hyperparameters for a training set of this many images."""
        return Hyperparameters(self.epochs, min(self.batch_size, images), self.lr, self.momentum, self.seed)


@dataclass(kw_only=True)
class LinearOptions(ClassifierOptions):
    """Options of `train.evaluate linear`."""

    augment: bool = option(False, "train on random crops and flips, as in the paper")
    min_scale: float = fraction(0.08, "with --augment, smallest area of a random crop, as a fraction of the image")

    def check(self) -> None:
        """Raise InputError for invalid values."""
        super().check()
        augmentation.supervised(augmentation.MIN_IMAGE_SIZE, self.min_scale)


def evaluate_linear(out: Path, options: LinearOptions) -> Report:
    """Accuracies of linear classifiers on all networks of a run.

    Args:
        out: run directory.
        options: options of the protocol.

    Returns:
        The report that `publish_linear` writes.

    Raises:
        InputError: if the run or the images cannot be used.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    options.check()
    if options.augment:
        refuse_ranks("--augment runs in one process")
    setup = EvaluationSetup(out, options)
    trained = setup.trained
    subnets = list(trained.family)
    trained.measure_statistics(subnets, setup.train, setup.data, options.workers)
    test = trained.features(subnets, setup.test, "test", options.workers)
    hparams = options.hyperparameters(len(setup.train))

    def order(start: int = 0) -> EpochSampler:
        return EpochSampler(len(setup.train), hparams.batch_size, hparams.seed, hparams.epochs, start)

    if options.augment:
        view = augmentation.supervised(trained.image_size, options.min_scale)

        def batches(start: int) -> Iterable[Batch]:
            return _augmented(setup, view, order(start), options)
    else:
        train = trained.features(subnets, setup.train, "train", options.workers)

        def batches(start: int) -> Iterable[Batch]:
            return feature_batches(train, setup.train_labels, order(start), trained.device)

    end_sharing(setup.world)
    classifiers = Classifiers({s.name: s.channels[-1] for s in subnets}, setup.classes, hparams.seed)
    training = ClassifierTraining(classifiers.to(trained.device), hparams, order().steps_per_epoch)
    view_key = (options.min_scale,) if options.augment else ()
    key = fingerprint.digest(trained.weights, dataset_digest(setup.train), asdict(hparams), view_key)
    loop.run("classifiers", training, batches, out / FOLDER / "classifiers" / f"linear-{key}", trained.device)
    found = evaluate(classifiers, test, setup.test_labels, trained.device)
    return {
        "protocol": "linear",
        "data": setup.data,
        "train_images": len(setup.train),
        "test_images": len(setup.test),
        **setup.origin,
        "hyperparameters": {**asdict(hparams), "augment": options.augment, "min_scale": options.min_scale},
        "networks": {name: {**costs, "linear": asdict(found[name])} for name, costs in setup.networks.items()},
    }


def _augmented(
    setup: EvaluationSetup, view: augmentation.ViewSpec, order: EpochSampler, options: LinearOptions
) -> Iterator[Batch]:
    """Batches of features of random crops and flips."""
    trained, device = setup.trained, setup.trained.device
    loader = one_view_batches(setup.train, view, order, options.workers)
    pixels = (prepare(batch, device) for batch in loader)
    features = representations(trained.model, trained.family, pixels)
    for features_of_batch, items in zip(features, order, strict=True):
        yield features_of_batch, setup.train_labels[[i for _, i in items]].to(device)


def publish_linear(out: Path, report: Report) -> None:
    """Write the report to OUT/evaluation and print it."""
    hparams = report["hyperparameters"]
    title = (
        f"Linear evaluation on {report['data']}: {report['train_images']:,} images, {hparams['epochs']} epochs on "
        f"{'random crops' if hparams['augment'] else 'fixed features'}, {report['test_images']:,} test images, "
        f"{origin_of(report)}"
    )
    table = accuracy_table(title, report["networks"], ["linear"])
    series = {"linear": points(report["networks"], "linear")}
    publish(out / FOLDER, "linear", report, table, "linear accuracy", series)
