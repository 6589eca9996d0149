"""`python -m train.finetune`: train with labels, all subnets of a family jointly or one network alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dspnet_fast.errors import InputError
from dspnet_fast.models import Network, build, check_network
from dspnet_fast.models import family as family_of
from dspnet_fast.subnets import Family

from . import cli
from .config import SCRATCH, FinetuneConfig, PretrainConfig
from .costs.flops import network_cost
from .data.datasets import open_images
from .data.datasets.images import ImageDataset
from .data.datasets.pixels import PixelFormat
from .data.pixel_options import read_as, resolve_pixels, resumed_pixels
from .data.sampler import EpochSampler
from .data.views import augmentation
from .evaluation.accuracy import Accuracy
from .evaluation.plot_data import points
from .evaluation.pretrained import PretrainedFamily
from .evaluation.protocols.common import FOLDER
from .evaluation.results import Report, accuracy_table, publish
from .evaluation.supervised import Hyperparameters, SupervisedTraining, evaluate, labelled_batches, new_classifier
from .run import checkpoint, loop, trackers
from .run.data_used import data_used, read_data_used, write_data_used
from .run.device import choose_device
from .run.interruption import NOTHING
from .run.log import RunLog
from .run.options import flag
from .run.run_directory import after_ctrl_c, check_run, open_run, raised_epochs, without_bad_images
from .run.saved_config import read_config, with_saved_config
from .selection.kernels import use_kernels

DESCRIPTION = """\
Train a slimmable classifier with labels: one set of weights that classifies at every size of a family (the paper's
appendix B). In each step the full network learns from the labels; the smallest and random other subnets (switches)
learn from the predictions of the full one.

Training starts from a run of dspnet-pretrain: of a family (DSPNet), or of one network (BYOL, with --dns for the
subnets). --from none starts from random weights. --dn cuts one network out of a family and trains it alone.
Writes the accuracy of every subnet to OUT/evaluation/finetune.json, finetune.md and finetune.png."""
EXAMPLE = """\
  dspnet-finetune --from runs/first --out runs/finetuned --epochs 30
  dspnet-finetune --from runs/byol --dns w0.50,w0.75,w1.00 --out runs/from-byol
  dspnet-finetune --from none --network resnet --stem small --dns c8-d1111,c16-d1111 --data cifar10 \\
      --image-size 32 --out runs/scratch
  dspnet-finetune --from runs/first --dn w0.50 --lr 0.01 --out runs/small
  dspnet-finetune --out runs/finetuned --resume"""


def completed(config: FinetuneConfig) -> FinetuneConfig:
    """Fill in options left out by those of the run that training starts from.

    Args:
        config: options as given.

    Returns:
        The configuration with network, stem, dns, data and image_size set.

    Raises:
        InputError: if options contradict the run in `config.from_` or one another.
    """
    if config.from_ == SCRATCH:
        if config.network is None or config.dns is None or config.data is None or config.image_size is None:
            raise InputError("--from none needs --network, --dns, --data and --image-size")
        whole = replace(config, stem=config.stem or "standard")
    else:
        run = read_config(Path(config.from_), PretrainConfig)
        for name in ("network", "stem", *run.pixel_options()):
            if getattr(config, name) not in (None, "auto", getattr(run, name)):
                raise InputError(f"{flag(name)} {getattr(config, name)}, but {config.from_} has {getattr(run, name)}")
        whole = replace(
            config,
            network=run.network,
            stem=run.stem,
            dns=config.dn or config.dns or run.dns,
            dn=None,
            data=config.data or run.data,
            image_size=config.image_size or run.image_size,
            **run.pixel_options(),
        )
    if len(whole.family().names()) > 1 and whole.subnets_per_step < 2:
        raise InputError("--subnets-per-step must be at least 2: the smallest and the full network")
    return whole


def hyperparameters(config: FinetuneConfig) -> Hyperparameters:
    """The hyperparameters among the options."""
    return Hyperparameters(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        head_lr=config.lr if config.head_lr is None else config.head_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        label_smoothing=config.label_smoothing,
        subnets_per_step=config.subnets_per_step,
        distill=not config.no_distillation,
        seed=config.seed,
    )


def starting_network(config: FinetuneConfig, switches: Family) -> Network:
    """The full network of `switches`, from a run or with random weights; InputError if the run does not contain it."""
    if config.from_ != SCRATCH:
        return PretrainedFamily(Path(config.from_), torch.device("cpu")).cut(switches.full)
    options = config.family()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(options.network, switches.full, options.stem, options.in_channels)


def finetune(config: FinetuneConfig, resume: bool) -> Report:
    """Train to the end and evaluate every subnet.

    Args:
        config: configuration, completed by `completed`.
        resume: continue the run in config.out.

    Returns:
        The report that `publish_finetune` writes.

    Raises:
        InputError: if the run or the images cannot be used.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    device = choose_device(config.device)
    trackers.require(config.log_to)
    if resume:
        config = resumed_pixels(config, read_config(Path(config.out), FinetuneConfig))
    check_run(config, resume)
    hparams = hyperparameters(config)
    assert config.data is not None
    train: ImageDataset = open_images(config.data, "train")
    if config.from_ == SCRATCH and not resume:
        config = resolve_pixels(config, train)
    assert config.data is not None and config.image_size is not None
    options, format = config.family(), PixelFormat.of(config)
    check_network(options.network, config.image_size)
    train, test = read_as(train, format), read_as(open_images(config.data, "test"), format)
    if config.from_ != SCRATCH:
        train = without_bad_images(Path(config.from_), train, config.data)
    switches = family_of(options.network, options.names())
    view = augmentation.supervised(config.image_size, config.min_scale)

    before = read_data_used(Path(config.out)) if resume else None
    epoch_steps = EpochSampler(len(train), hparams.batch_size, hparams.seed, hparams.epochs).steps_per_epoch
    used = data_used(config.data, train, test, epoch_steps)
    used, change = used.resumed(before, checkpoint.latest_step(Path(config.out) / "checkpoints"), Path(config.out))
    steps, raised = hparams.epochs * used.epoch_steps, raised_epochs(config) if resume else ""

    def order(start: int = 0) -> EpochSampler:
        return EpochSampler(len(train), hparams.batch_size, hparams.seed, hparams.epochs, start, steps=steps)

    model = new_classifier(starting_network(config, switches), len(train.classes), hparams.seed).to(device)
    training = SupervisedTraining(model, switches, hparams, used.epoch_steps)
    out = open_run(config, resume)
    write_data_used(out, used)
    checkpoints = out / "checkpoints"
    loop.resume(training, checkpoints, device)
    log = RunLog(out, training.step, trackers.names_of(config.log_to))
    for line in (f"data  {used.line()}", *([f"data  {change}"] if change else []), *([raised] if raised else [])):
        print(line, flush=True)
        log.line(line)

    def accuracies() -> dict[str, Accuracy]:
        assert config.image_size is not None
        return evaluate({"": (model, switches)}, train, test, config.image_size, config.workers, device)

    def measure() -> str:
        shares = {name: found.top1 for name, found in accuracies().items()}
        log.metrics(training.step, {"top1": shares})
        return "top 1  " + "  ".join(f"{name} {share:.3f}" for name, share in shares.items())

    try:
        loop.run(
            "finetune",
            training,
            lambda start: labelled_batches(train, view, order(start), config.workers, device),
            checkpoints,
            device,
            lambda step, loss: log.metrics(step, {"loss": loss}),
            measure,
            config.evaluate_epochs * used.epoch_steps,
            [training.guard],
            config.stall_timeout,
        )
    finally:
        log.close()
    found = accuracies()
    networks: dict[str, Any] = {}
    for switch in switches:
        cost = network_cost(options, switch, config.image_size)
        networks[switch.name] = {
            "parameters": cost.parameters,
            "macs": cost.macs,
            "finetuned": asdict(found[switch.name]),
        }
    return {
        "protocol": "finetune",
        "from": config.from_,
        "data": config.data,
        "train_images": len(train),
        "test_images": len(test),
        "hyperparameters": asdict(hparams),
        "networks": networks,
    }


def publish_finetune(out: Path, report: Report) -> None:
    """Write the report to OUT/evaluation and print it."""
    start = "from scratch" if report["from"] == SCRATCH else f"from {report['from']}"
    title = (
        f"Supervised training {start} on {report['data']}: {report['train_images']:,} images, "
        f"{report['hyperparameters']['epochs']} epochs, {report['test_images']:,} test images"
    )
    table = accuracy_table(title, report["networks"], ["finetuned"])
    series = {start: points(report["networks"], "finetuned")}
    publish(out / FOLDER, "finetune", report, table, "accuracy", series)


def _use_kernels(config: FinetuneConfig) -> None:
    assert config.image_size is not None
    out = None if config.from_ == SCRATCH else Path(config.from_)
    device = choose_device(config.device)
    use_kernels(device, config.family(), config.image_size, out, tf32=False, plugins=config.plugins, trains=True)


def make_parser() -> cli.ArgumentParser:
    """The parser of the command."""
    parser = cli.parser("finetune", DESCRIPTION, EXAMPLE, "[options] --from RUN --out DIR")
    cli.add_config_file(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its configuration")
    cli.add_options(parser, FinetuneConfig)
    return parser


def _main(argv: Sequence[str]) -> None:
    parsed = make_parser().parse_args(with_saved_config(argv, FinetuneConfig))
    config = completed(cli.to_config(FinetuneConfig, parsed))
    if not config.out:
        raise InputError("--out is missing: name a new folder for this run, such as --out runs/finetuned")
    if config.fast_kernels:
        _use_kernels(config)
    try:
        report = finetune(config, parsed.resume)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(after_ctrl_c(Path(config.out))) from interrupt
    publish_finetune(Path(config.out), report)


main = cli.command(_main, interrupted=NOTHING)

if __name__ == "__main__":
    main()
