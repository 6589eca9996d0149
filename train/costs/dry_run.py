"""Dry run of pretraining: check the options, build the networks on the meta device, count the cost.

Reads only the names of local images and the run that --init-from or --resume names; of a teacher it builds the network
without its weights. Writes nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dspnet_fast.errors import InputError
from dspnet_fast.models import check_network
from dspnet_fast.models import family as family_of
from dspnet_fast.models.published import Source, check_name
from dspnet_fast.subnets import sandwich

from ..config import PretrainConfig
from ..data.datasets import DatasetSize, dataset_size, exists_locally
from ..data.sampler import EpochSampler
from ..data.views import augmentation
from ..pretraining import recipe
from ..pretraining.trainer import Trainer
from ..run import checkpoint
from ..run.run_directory import check_run
from ..run.tables import Table, cost_cells, quantity
from ..teachers.teacher import TeacherFacts, cached_views, expected_facts, with_teacher
from .communication import traffic
from .flops import NetworkCost, RunCost, expected_steps, network_costs, run_cost

RANKS = 2, 8, 128  # numbers of ranks for which the all-reduce traffic is shown


@dataclass(frozen=True)
class Memory:
    """Bytes of a run's state on each device by part, without activations, and of a checkpoint."""

    parts: dict[str, int]
    checkpoint: int


@dataclass(frozen=True)
class RunEstimate:
    """Cost of a whole run, or of one step if the number of images is unknown.

    Attributes:
        config: configuration of the run, completed by its recipe.
        choices: values that the recipe chose.
        size: size of the dataset; None if unknown.
        images: number of training images; None if unknown.
        epoch_steps: steps per epoch; None if unknown.
        costs: costs of the networks without heads, smallest first.
        trained: expected number of steps that train each network.
        cost: multiply-accumulates.
        memory: bytes of the state.
        teacher: facts of the teacher; None without one.
    """

    config: PretrainConfig
    choices: dict[str, recipe.Choice]
    size: DatasetSize | None
    images: int | None
    epoch_steps: int | None
    costs: dict[str, NetworkCost]
    trained: dict[str, float]
    cost: RunCost
    memory: Memory
    teacher: TeacherFacts | None = None


def estimate(config: PretrainConfig, resume: bool = False) -> RunEstimate:
    """Check the options of a run and count its cost.

    Images, a GPU or DALI need not be on this machine.

    Args:
        config: configuration of the run.
        resume: whether the run in `config.out` would be continued.

    Raises:
        InputError: if the options are invalid, or do not fit the run in `config.out` or `config.init_from`.
    """
    if config.out:
        check_run(config, resume)
    check_network(config.network, config.image_size)
    family = family_of(config.network, config.names())
    sandwich(family, config.subnets_per_step, config.seed, 0)
    size = known_size(config.data)
    images = known_images(config, size)
    choices = recipe.chosen(config, images)
    config = recipe.complete(config, images)
    augmentation.byol(config.image_size, config.min_scale)
    teacher = expected_facts(config)
    config = with_teacher(config, teacher)
    epoch_steps: int | None
    if images is None:  # count one step after the initial steps that train the full network alone
        epoch_steps, counted_steps, counted_as = None, 1, replace(config, epochs=1, full_only_epochs=0.0)
    else:
        epoch_steps = EpochSampler(images, config.batch_size, config.seed, config.epochs).steps_per_epoch
        counted_steps, counted_as = epoch_steps, config
        recipe.check_sampling(config, images)
    costs = network_costs(config)
    trained = expected_steps(counted_as, counted_steps)
    teacher_cost = None if teacher is None else teacher.cost(config, images)
    counted = run_cost(counted_as, counted_steps, costs, teacher_cost)
    return RunEstimate(config, choices, size, images, epoch_steps, costs, trained, counted, _memory(config), teacher)


def images_of(config: PretrainConfig, size: DatasetSize) -> int:
    """Number of images that a run trains on.

    Args:
        config: configuration of the run.
        size: size of its dataset.

    Raises:
        InputError: if --train-images exceeds the dataset.
    """
    wanted = size.train if config.train_images is None else config.train_images
    if wanted > size.train:
        raise InputError(f"--train-images {wanted}, but {config.data} has {size.train}")
    return wanted


def known_images(config: PretrainConfig, size: DatasetSize | None) -> int | None:
    """Number of images that a run trains on; None if `size` and --train-images are unknown."""
    return config.train_images if size is None else images_of(config, size)


def known_size(data: str) -> DatasetSize | None:
    """Size of a dataset; None if it is neither local nor published. InputError if it is local and unusable."""
    try:
        return dataset_size(data, labelled=False)
    except InputError:
        if exists_locally(data):
            raise
        return None


def _memory(config: PretrainConfig) -> Memory:
    """Sizes of the buffers that the trainer allocates, built on the meta device."""
    meta = torch.device("meta")
    with meta:
        trainer = Trainer(config, 1, meta)
    if config.init_from is not None and (source := Source.parse(config.init_from)):
        check_name(config.network, source)
        if source.file is not None:
            trainer.load_published(source)
    elif config.init_from is not None:
        with warnings.catch_warnings(action="ignore"):  # copying to meta tensors warns; here it only compares shapes
            trainer.load_weights(checkpoint.load_of_run(Path(config.init_from), "cpu", print))
    flat = trainer.flat_buffers
    parts = {"weights": flat.params, "gradients": flat.grads, "momentum": flat.momenta}
    parts |= {"variance": flat.variances, "target": flat.targets}
    sizes = {name: tensor.nbytes for name, tensor in parts.items() if tensor.nbytes}
    return Memory(sizes, checkpoint.size(trainer.state()))


def show(estimated: RunEstimate) -> None:
    """Print an estimate as a table of networks and a list of totals."""
    config, total, memory = estimated.config, estimated.cost, estimated.memory
    whole = estimated.epoch_steps is not None
    rows = [
        [
            name,
            *cost_cells({"parameters": cost.parameters, "macs": cost.macs}),
            f"{cost.features:,}",
            f"{estimated.trained[name]:,.0f}" if whole else f"{estimated.trained[name]:.2f}",
            f"{quantity(total.online[name])}MAC",
        ]
        for name, cost in estimated.costs.items()
    ]
    title = f"pretraining at {config.image_size} px; steps: expected number for randomly drawn networks"
    heading = ["network", "params", "MACs", "features", "steps", "online MACs"]
    Table(title, heading, rows).show()
    lines = {"images": _images(estimated), "steps": _steps(estimated)}
    passes = {"target": "forward", "online": "forward and backward", "optimizer": "optimizer step and moving average"}
    if estimated.teacher is not None:
        passes["teacher"] = _teacher(config, estimated.teacher)
    for part, macs in total.parts().items():
        lines[part] = f"{quantity(macs)}MAC  {passes[part]}"
    lines["total"] = f"{quantity(sum(total.parts().values()))}MAC"
    lines["memory"] = f"{quantity(sum(memory.parts.values()))}B on each device without activations: " + ", ".join(
        f"{name} {quantity(size)}B" for name, size in memory.parts.items()
    )
    if estimated.teacher is not None:
        bytes_each = 4 if config.precision == "fp32" else 2
        lines["memory"] += f"; and the teacher's {quantity(bytes_each * estimated.teacher.parameters)}B"
    lines["all-reduce"] = _all_reduce(config)
    lines["checkpoint"] = f"{quantity(memory.checkpoint)}B each; the newest {config.keep_checkpoints} are kept"
    for name, text in lines.items():
        print(f"{name:14}{text}")
    if estimated.images is not None:
        print(*recipe.lines(estimated.choices, estimated.images), sep="\n")


def _all_reduce(config: PretrainConfig) -> str:
    """Bytes that each rank sends in a step, for the numbers of ranks among which the batch can be split."""
    sent = {}
    for ranks in RANKS:
        with contextlib.suppress(InputError):
            sent[ranks] = quantity(traffic(config, ranks).sent)
    shown = ", ".join(f"{count}B on {ranks} ranks" for ranks, count in sent.items())
    return f"each rank sends {shown} per step" if sent else "none: --bn-groups allows one rank"


def _teacher(config: PretrainConfig, facts: TeacherFacts) -> str:
    kept = {1: "every image once", 2: "every image and its mirror image once"}[cached_views(config)]
    when = "forward" if config.teacher_cache is None else f"forward, {kept}"
    return f"{when}: {facts.architecture}, {quantity(facts.macs)}MAC for a view of {facts.image_size} px"


def _images(estimated: RunEstimate) -> str:
    config = estimated.config
    if estimated.images is None:
        return (
            f"unknown: {config.data} is not on this machine and its size is not published. The counts are for one "
            "step after the initial full-network steps; --train-images N counts a whole run"
        )
    where = "as --train-images says: not on this machine"
    if estimated.size is not None:
        where = "counted here" if estimated.size.local else "as published: not on this machine"
    return f"{estimated.images:,} of {config.data}, {where}"


def _steps(estimated: RunEstimate) -> str:
    config = estimated.config
    if estimated.epoch_steps is None:
        return f"1, of {config.batch_size:,} images"
    steps = config.epochs * estimated.epoch_steps
    text = f"{steps:,}: {config.epochs} epochs of {estimated.epoch_steps:,} steps, {config.batch_size:,} images each"
    alone = min(steps, config.full_only_steps(estimated.epoch_steps))
    if alone and len(estimated.costs) > 1:
        text += f"; the first {alone:,} train only {list(estimated.costs)[-1]}"
    return text
