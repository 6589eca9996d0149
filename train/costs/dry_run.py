"""What a pretraining run would be: its networks built without memory, its options checked, its cost counted.

Nothing is read but the names of images, if they are here, and the run that --init-from or --resume names; nothing is
written.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dspnet_fast.errors import InputError
from dspnet_fast.models import family as family_of
from dspnet_fast.subnets import sandwich

from ..config import PretrainConfig
from ..data.datasets import DatasetSize, dataset_size, exists_locally
from ..data.sampler import EpochSampler
from ..data.views import augmentation
from ..pretraining.trainer import Trainer
from ..run import checkpoint
from ..run.run_directory import check_run
from ..run.tables import Table, cost_cells, quantity
from . import counting
from .communication import traffic
from .counting import Counted
from .flops import Cost

RANKS = 2, 8, 128  # for which the exchange is counted


@dataclass(frozen=True)
class Memory:
    """Bytes of a run's state on each device, without activations, and of a checkpoint."""

    weights: int
    gradients: int
    momentum: int
    target: int
    checkpoint: int

    @property
    def together(self) -> int:
        """On each device."""
        return self.weights + self.gradients + self.momentum + self.target


@dataclass(frozen=True)
class RunPlan:
    """Of a whole run, or where it is not known how many images there are, of one step.

    Attributes:
        size: of the set of images; None if it is not known.
        images: how many are trained on; None if that is not known.
        epoch_steps: steps in an epoch; None as well.
        costs: of every network, smallest first, without heads.
        trained: in how many steps each is, by expectation.
        counted: multiply-accumulates.
    """

    config: PretrainConfig
    size: DatasetSize | None
    images: int | None
    epoch_steps: int | None
    costs: dict[str, Cost]
    trained: dict[str, float]
    counted: Counted
    memory: Memory


def plan(config: PretrainConfig, resume: bool = False) -> RunPlan:
    """Build, check and count; InputError for options that no run can have, or that the run in config.out forbids.

    What the machine must have that trains, such as images, a device or DALI, is not asked for.
    """
    if config.out:
        check_run(config, resume)
    family = family_of(config.network, config.names())
    sandwich(family, config.subnets_per_step, config.seed, 0)
    augmentation.byol(config.image_size, config.min_scale)
    size = _known_size(config.data)
    images = config.train_images if size is None else images_of(config, size)
    epoch_steps: int | None
    if images is None:  # one step is counted, after those of the full network alone
        epoch_steps, counted_steps, counted_as = None, 1, replace(config, epochs=1, full_only_epochs=0.0)
    else:
        epoch_steps = EpochSampler(images, config.batch_size, config.seed, config.epochs).steps_per_epoch
        counted_steps, counted_as = epoch_steps, config
    costs = counting.network_costs(config)
    trained = counting.sampled_steps(counted_as, counted_steps)
    counted = counting.count(counted_as, counted_steps, costs)
    return RunPlan(config, size, images, epoch_steps, costs, trained, counted, _memory(config))


def images_of(config: PretrainConfig, size: DatasetSize) -> int:
    """How many images a run trains on; InputError if it wants more than there are."""
    wanted = size.train if config.train_images is None else config.train_images
    if wanted > size.train:
        raise InputError(f"--train-images {wanted}, but {config.data} has {size.train}")
    return wanted


def _known_size(data: str) -> DatasetSize | None:
    """None for a set that is neither here nor published; InputError for one that is here and cannot be used."""
    try:
        return dataset_size(data, labelled=False)
    except InputError:
        if exists_locally(data):
            raise
        return None


def _memory(config: PretrainConfig) -> Memory:
    """Of the run's own trainer, on a device without memory."""
    nowhere = torch.device("meta")
    with nowhere:
        trainer = Trainer(config, 1, nowhere)
    if config.init_from is not None:
        with warnings.catch_warnings(action="ignore"):  # of weights that are compared, not copied
            trainer.load_weights(checkpoint.load_of_run(Path(config.init_from), "cpu", print))
    flat = trainer.flat_buffers
    return Memory(
        weights=flat.params.nbytes,
        gradients=flat.grads.nbytes,
        momentum=flat.momenta.nbytes,
        target=flat.targets.nbytes,
        checkpoint=checkpoint.size(trainer.state()),
    )


def show(planned: RunPlan) -> None:
    """Print it."""
    config, counted, memory = planned.config, planned.counted, planned.memory
    whole = planned.epoch_steps is not None
    rows = [
        [
            name,
            *cost_cells({"parameters": of.parameters, "macs": of.macs}),
            f"{of.features:,}",
            f"{planned.trained[name]:,.0f}" if whole else f"{planned.trained[name]:.2f}",
            f"{quantity(counted.online[name])}MAC",
        ]
        for name, of in planned.costs.items()
    ]
    title = f"pretraining, {config.image_size} px; of networks drawn at random the expected number of steps"
    heading = ["network", "params", "MACs", "features", "steps", "online"]
    Table(title, heading, rows).show()
    lines = {"images": _images(planned), "steps": _steps(planned)}
    passes = {"target": "forward", "online": "forward and backward", "optimizer": "LARS and the target's average"}
    for part, macs in counted.parts().items():
        lines[part] = f"{quantity(macs)}MAC  {passes[part]}"
    lines["together"] = f"{quantity(sum(counted.parts().values()))}MAC"
    parts = {"weights": memory.weights, "gradients": memory.gradients, "momentum": memory.momentum}
    lines["memory"] = f"{quantity(memory.together)}B on each device without activations: " + ", ".join(
        f"{name} {quantity(of)}B" for name, of in (parts | {"target": memory.target}).items()
    )
    lines["exchange"] = _exchange(config)
    lines["checkpoint"] = f"{quantity(memory.checkpoint)}B, the newest {config.keep_checkpoints} are kept"
    for name, text in lines.items():
        print(f"{name:14}{text}")


def _exchange(config: PretrainConfig) -> str:
    """What more than one rank would send, of those numbers that can share the parts of the batch."""
    sent = {}
    for ranks in RANKS:
        with contextlib.suppress(InputError):
            sent[ranks] = quantity(traffic(config, ranks).sent)
    shown = ", ".join(f"{count}B on {ranks} ranks" for ranks, count in sent.items())
    return f"each rank sends {shown}, a step" if sent else "none: --bn-groups allows one rank"


def _images(planned: RunPlan) -> str:
    config = planned.config
    if planned.images is None:
        return (
            f"unknown: {config.data} is not on this machine and its size is not published. Counted is one step, after "
            "those of the full network alone; --train-images N counts a run"
        )
    where = "as --train-images says: not on this machine"
    if planned.size is not None:
        where = "counted here" if planned.size.local else "as published: not on this machine"
    return f"{planned.images:,} of {config.data}, {where}"


def _steps(planned: RunPlan) -> str:
    config = planned.config
    if planned.epoch_steps is None:
        return f"1 of {config.batch_size:,} images"
    steps = config.epochs * planned.epoch_steps
    text = f"{steps:,}: {config.epochs} epochs of {planned.epoch_steps:,}, {config.batch_size:,} images each"
    alone = min(steps, config.full_only_steps(planned.epoch_steps))
    if alone and len(planned.costs) > 1:
        text += f"; the first {alone:,} train {list(planned.costs)[-1]} alone"
    return text
