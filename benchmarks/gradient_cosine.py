"""`python -m benchmarks.gradient_cosine RUN`: how well the gradients of a run's subnets agree, by stage of the network.

On batches of the run's images, the gradient g of every subnet's loss is computed with the weights of the newest
checkpoint. A subnet s is compared with the largest network on the parameters that s uses:

    cosine with s       <g_s, g_largest> / (|g_s| |g_largest|)       below 0: a step for one raises the other's loss
    norm of s           |g_s| / |g_largest|                          above 1: s has the larger share of the step
    cosine with sum     <g_largest, G> / (|g_largest| |G|)           G: sum over subnets, on all parameters
    with next batch     the largest network's gradients on two successive batches: the noise of the gradients
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dspnet_fast.errors import InputError
from train.config import PretrainConfig
from train.data.backends import open_batches
from train.data.bad_images import BadImages
from train.data.datasets.pixels import PixelFormat
from train.data.normalization import prepare
from train.data.pixel_options import read_as
from train.data.sampler import EpochSampler
from train.data.views import augmentation
from train.distributed.process_group import SINGLE_PROCESS
from train.pretraining.dspnet import Taught
from train.pretraining.run import open_train_images
from train.pretraining.trainer import Trainer
from train.run import checkpoint
from train.run.saved_config import read_config
from train.run.schedules import momentum_alpha
from train.teachers.start import teacher_targets
from train.teachers.teacher import open_teacher

STEM = "stem"
CPU = torch.device("cpu")
Gradients = dict[str, dict[str, Tensor]]  # flat gradient by subnet and stage


def stages_of(online: nn.Module, stages: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Parameters of an online network by stage of the encoder and by head."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in online.named_parameters():
        part, _, rest = name.partition(".")
        stage = part if part != "encoder" else next((s for s in stages if rest.startswith(f"{s}.")), STEM)
        found.setdefault(stage, []).append(parameter)
    return found


def gradients_of(trainer: Trainer, images: Tensor, taught: Taught | None, alpha: float) -> Gradients:
    """Gradients of every subnet's loss on a batch, in float64.

    Args:
        trainer: networks and flat buffers.
        images: normalised views [2B, C, S, S].
        taught: the teacher's targets, if there is a teacher.
        alpha: weight of the batch in the target's momentum batch normalisation.
    """
    model, found = trainer.model, {}
    stages = stages_of(model.online, model.online.encoder.stages)
    targets = model.targets(images, alpha)
    for subnet in model.family:
        trainer.flat_buffers.grads.zero_()
        model.accumulate_subnet(images, targets, subnet, taught)
        found[subnet.name] = {
            stage: torch.cat([p.grad.detach().flatten() for p in parameters if p.grad is not None]).double()
            for stage, parameters in stages.items()
        }
    return found


def agreement(batches: Sequence[Gradients]) -> dict[str, dict[str, Tensor]]:
    """Compare the subnets' gradients with the largest network's.

    The parameters that a subnet uses are those whose gradient is not zero in all batches.

    Args:
        batches: gradients on two or more batches, subnets from the smallest to the largest.

    Returns:
        Values of each batch, float64 [batches] or, for "with next batch", [batches - 1], by quantity and stage.
    """
    *smaller, largest = batches[0]
    result: dict[str, dict[str, Tensor]] = {}
    for stage in batches[0][largest]:
        of = {name: torch.stack([batch[name][stage] for batch in batches]) for name in batches[0]}
        full = of[largest]
        found = {}
        for name in smaller:
            used = (of[name] != 0).any(0)
            mine, theirs = of[name][:, used], full[:, used]
            found[f"cosine with {name}"] = torch.cosine_similarity(mine, theirs)
            found[f"norm of {name}"] = mine.norm(dim=1) / theirs.norm(dim=1)
        found["cosine with sum"] = torch.cosine_similarity(full, torch.stack(list(of.values())).sum(0))
        found["with next batch"] = torch.cosine_similarity(full[:-1], full[1:])
        for quantity, values in found.items():
            result.setdefault(quantity, {})[stage] = values
    return result


def measure(out: Path, batches: int) -> dict[str, dict[str, Tensor]]:
    """`agreement` of the subnets of a run on batches of an epoch that follows the last one.

    Args:
        out: run directory, with a checkpoint.
        batches: number of batches, at least 2.

    Raises:
        InputError: there is no such run, or its teacher or images are missing.
    """
    config = read_config(out, PretrainConfig)
    path = checkpoint.newest_of_run(out)
    if batches < 2:
        raise InputError(f"--batches must be at least 2, not {batches}")
    images = read_as(open_train_images(config), PixelFormat.of(config))
    epoch_steps = EpochSampler(len(images), config.batch_size, config.seed, config.epochs).steps_per_epoch
    trainer = Trainer(config, epoch_steps, CPU)
    state = checkpoint.load(path)
    trainer.load_weights(state)
    first = trainer.steps
    sampler = EpochSampler(len(images), config.batch_size, config.seed, config.epochs, first, steps=first + batches)
    bad, teacher = BadImages(len(images)), open_teacher(config, CPU)
    if teacher is not None:
        trainer.teacher = teacher_targets(config, teacher, images, sampler, bad, CPU, SINGLE_PROCESS)
    views = augmentation.byol(config.image_size, config.min_scale, config)
    alpha = momentum_alpha(state["step"], trainer.steps)

    def gradients() -> Iterator[Gradients]:
        for step, batch in enumerate(open_batches(config.data_backend, images, views, sampler, 0, bad, CPU), first):
            taught = None if trainer.teacher is None else trainer.teacher(step, batch)
            yield gradients_of(trainer, prepare(batch, CPU), taught, alpha)

    return agreement(list(gradients()))


def table(found: Mapping[str, Mapping[str, Tensor]], batches: int) -> Table:
    """Means over the batches, by stage and quantity."""
    result = Table("stage", *found, title=f"means over {batches} batches, ± half of the 95 % interval")
    for stage in next(iter(found.values())):
        result.add_row(stage, *(_mean(values[stage]) for values in found.values()))
    return result


def _mean(values: Tensor) -> str:
    return f"{values.mean():.2f} ± {1.96 * values.std() / len(values) ** 0.5:.2f}"


def main() -> None:
    """Print the table of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of dspnet-pretrain")
    parser.add_argument("--batches", type=int, default=16, help="number of batches [%(default)s]")
    options = parser.parse_args()
    try:
        Console().print(table(measure(options.run, options.batches), options.batches))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
