"""Values of the options that are not given: chosen for the number of images and steps (docs/recipes.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dspnet_fast.errors import InputError
from dspnet_fast.models import family as family_of
from dspnet_fast.models import has_attention
from dspnet_fast.subnets import sandwich

from ..config import ADAMW, PAPER, PretrainConfig
from ..data.sampler import EpochSampler
from ..run.options import flag

MIN_BATCH, MAX_BATCH = 32, 256
GROUP = 16  # images per ghost batch norm group, at least
# Learning rates of LARS; independent of the batch, because the steps are normalised. MobileNetV3 collapses at 1.5.
RESNET_PEAK, PEAK = 1.5, 0.3
ADAMW_PEAK, TAUGHT_PEAK = ADAMW["base_lr"], 2e-3  # learning rates of AdamW, the second with a teacher
ATTENTION_PEAK = 5e-4  # of AdamW for networks with attention heads
TAU_SHARE = 0.1  # averaging time of the target, as a share of the run
MIN_TAU, MAX_TAU = 0.97, 0.99
WARMUP_EPOCHS = 10.0
MIN_SCALE, LONG_RUN = 0.2, 20_000  # steps from which the paper's smaller crops are used


@dataclass(frozen=True)
class Length:
    """How long to train.

    Attributes:
        viewed: number of images over all epochs.
        min_epochs, max_epochs: bounds of the epochs.
        steps: a smaller batch than MAX_BATCH is used if it takes that to reach this number of steps.
    """

    viewed: int
    min_epochs: int
    max_epochs: int
    steps: int


BYOL = Length(1_000_000, 100, 1000, 2_000)
TAUGHT = Length(60_000, 3, 100, 900)  # with a teacher


@dataclass(frozen=True)
class Choice:
    """A value of an option, and the reason for it."""

    value: Any
    reason: str


def chosen(config: PretrainConfig, images: int | None, ranks: int = 1) -> dict[str, Choice]:
    """Choose values of the options that the configuration leaves open.

    Args:
        config: a configuration; its other options are used as they are.
        images: number of training images; None if it is unknown, which only the cost of a step allows.
        ranks: number of processes.

    Returns:
        Choices by name of the option.

    Raises:
        InputError: if the number of images is unknown and the batch size depends on it.
    """
    found: dict[str, Choice] = {}
    if images is None:
        if config.batch_size is None:
            raise InputError(
                f"--recipe auto chooses the batch size for the number of images, and {config.data} is not on this "
                "machine: give --batch-size, --train-images or --recipe paper"
            )
        images = config.batch_size

    def choose(name: str, value: Any, reason: str) -> Any:
        given = getattr(config, name)
        if given is None:
            found[name] = Choice(value, reason)
        return value if given is None else given

    length, learner = (BYOL, "BYOL") if config.teacher is None else (TAUGHT, "a family with a teacher")
    attention = has_attention(config.network)
    reason = "usual for networks with attention" if attention and length is BYOL else f"for {learner}"
    optimizer = choose("optimizer", "lars" if length is BYOL and not attention else "adamw", reason)
    passes = f"{length.min_epochs} to {length.max_epochs:,} passes"
    epochs = min(max(round(length.viewed / images), length.min_epochs), length.max_epochs)
    epochs = choose("epochs", epochs, f"{length.viewed:,} images for {learner}, in {passes}")
    groups = config.bn_groups or ranks * config.grad_accum_steps
    unit = math.lcm(groups, ranks * config.grad_accum_steps)
    batch = _batch_size(images, epochs, groups, unit, length.steps)
    reason = f"{length.steps:,} steps or more, if {MIN_BATCH} to {MAX_BATCH} images give them"
    batch = choose("batch_size", batch, reason)
    epoch_steps = max(1, images // max(1, batch))
    steps = epochs * epoch_steps
    warmup = min(WARMUP_EPOCHS, epochs / 10)
    if round(warmup * epoch_steps) > steps / 10:
        warmup = steps // 10 / epoch_steps
    choose("warmup_epochs", warmup, f"{WARMUP_EPOCHS:g} epochs, but at most a tenth of the run")
    if optimizer == "lars":
        peak = RESNET_PEAK if config.network == "resnet" else PEAK
    elif attention:
        peak = ATTENTION_PEAK
    else:
        peak = ADAMW_PEAK if length is BYOL else TAUGHT_PEAK
    note = ", lower because of attention" if attention and optimizer == "adamw" else ""
    choose("base_lr", peak * 256 / max(1, batch), f"a peak of {peak:g} for batches of any size{note}")
    tau = min(max(1 - 1 / (TAU_SHARE * steps), MIN_TAU), MAX_TAU)
    choose("tau", round(tau, 4), f"for {steps:,} steps")
    min_scale = MIN_SCALE if steps < LONG_RUN else PAPER["min_scale"]
    choose("min_scale", min_scale, f"smaller crops make the task harder, which pays off from {LONG_RUN:,} steps on")
    if optimizer == "adamw":
        choose("weight_decay", ADAMW["weight_decay"], "usual with AdamW")
    else:
        choose("weight_decay", PAPER["weight_decay"], "as in the paper")
    return found


def _batch_size(images: int, epochs: int, groups: int, unit: int, steps: int) -> int:
    """The largest batch that gives `steps`: a multiple of `unit`, with GROUP images per group if possible."""
    batch = MAX_BATCH
    while batch > MIN_BATCH and epochs * (images // batch) < steps:
        batch //= 2
    batch = max(batch, GROUP * groups)
    return max(min(-(-batch // unit), images // unit), 1) * unit


def complete(config: PretrainConfig, images: int | None, ranks: int = 1) -> PretrainConfig:
    """The configuration with the values of `chosen`."""
    values = {name: choice.value for name, choice in chosen(config, images, ranks).items()}
    return replace(config, **values) if values else config


def lines(choices: Mapping[str, Choice], images: int) -> list[str]:
    """Lines for the screen about chosen values; none if there are none."""
    if not choices:
        return []
    return [f"recipe  chosen for {images:,} images, because not given:"] + [
        f"recipe  {flag(name)} {_text(choice.value)}: {choice.reason}" for name, choice in choices.items()
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def check_sampling(config: PretrainConfig, images: int) -> None:
    """Check that every subnet of a completed configuration is trained in at least one step.

    Args:
        config: a completed configuration.
        images: number of training images.

    Raises:
        InputError: if a subnet is trained in no step.
    """
    epoch_steps = EpochSampler(images, config.batch_size, config.seed, config.epochs).steps_per_epoch
    family = family_of(config.network, config.names())
    steps, first = config.epochs * epoch_steps, config.full_only_steps(epoch_steps)
    missing = set(family.names) - {family.full.name}
    for step in range(first, steps):
        missing -= {subnet.name for subnet in sandwich(family, config.subnets_per_step, config.seed, step)}
        if not missing or config.subnets_per_step <= 2:
            break
    if missing:
        names = ", ".join(name for name in family.names if name in missing)
        raise InputError(
            f"{names} would not be trained: of {steps} steps the first {min(first, steps)} train {family.full} alone, "
            f"and later ones {config.subnets_per_step} networks each. Use more --epochs, "
            + ("a smaller --full-only-epochs" if config.full_only_epochs is not None else "fewer --warmup-epochs")
            + ", more --subnets-per-step, or fewer --dns"
        )
